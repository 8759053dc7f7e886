"""The charts of a report as one picture, by matplotlib: for papers and for places that show no pages."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtask.reports.evaluation import Evaluation
from flashtask.reports.history import History, phases_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "figure_png"]

#: Classes that have names at the axes, and lines of a chart.
_MOST_NAMES, _MOST_LINES = 20, 8


def figure(history: History, monitor: str, evaluation: Evaluation | None, title: str = "") -> Figure:
    """Loss, the metric that decides, and as far as there are such the confusion matrix, curves, calibration, numbers.

    Args:
        history: of the run.
        monitor: the metric that decides, as it is logged.
        evaluation: of the samples; None draws the history alone.
        title: above all.
    """
    from matplotlib.figure import Figure as MatplotlibFigure

    class Shown(MatplotlibFigure):
        """A figure that a notebook shows, also where pyplot is not in use."""

        def _repr_png_(self) -> bytes:
            held = io.BytesIO()
            self.savefig(held, format="png")
            return held.getvalue()

    drawn: list[Any] = []
    if history:
        drawn.append(lambda axes: _history(axes, history, ["train_loss", "val_loss"], "loss"))
        if monitor in history.columns and monitor != "val_loss":
            drawn.append(lambda axes: _history(axes, history, [monitor], monitor))
    if evaluation is not None:
        if evaluation.has_classes:
            drawn.append(lambda axes: _matrix(axes, evaluation))
        if evaluation.curves():
            drawn.append(lambda axes: _curves(axes, evaluation))
        if evaluation.calibration() is not None:
            drawn.append(lambda axes: _calibration(axes, evaluation))
        if any(one.judgement.numbers for one in evaluation.samples):
            drawn.append(lambda axes: _numbers(axes, evaluation))
    columns = min(3, max(1, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    made = Shown(figsize=(4.2 * columns, 3.4 * rows), layout="constrained", dpi=120)
    for place, draw in enumerate(drawn):
        draw(made.add_subplot(rows, columns, place + 1))
    if title:
        made.suptitle(title)
    return made


def figure_png(history: History, monitor: str, evaluation: Evaluation | None, title: str = "") -> bytes:
    """The same as the bytes of a PNG file."""
    held = io.BytesIO()
    figure(history, monitor, evaluation, title).savefig(held, format="png")
    return held.getvalue()


def _history(axes: Axes, history: History, names: list[str], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in (name for name in names if name in history.columns):
        axes.plot(history.column("epoch"), history.column(name), label=name, marker="o" if len(history) == 1 else "")
    for first, _, _ in phases_of(history)[1:]:
        axes.axvline(history[first]["epoch"], color="0.7", linestyle=":")
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _matrix(axes: Axes, found: Evaluation) -> None:
    matrix, classes = found.confusion_matrix(), found.classes
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1e-12)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="truth")
    if len(classes) <= _MOST_NAMES:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for (row, column), count in np.ndenumerate(matrix):
            dark = shares[row, column] > 0.5
            axes.text(column, row, f"{count:,.0f}", ha="center", va="center", color="white" if dark else "black")


def _curves(axes: Axes, found: Evaluation) -> None:
    for one in sorted(found.curves(), key=lambda one: one.average_precision)[:_MOST_LINES]:
        axes.plot(one.recall, one.precision, label=f"{one.label} ({one.average_precision:.3f})")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize="small")


def _calibration(axes: Axes, found: Evaluation) -> None:
    table = found.calibration()
    assert table is not None
    known = table.counts > 0
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--")
    axes.plot(table.scores[known], table.right[known], marker="o")
    axes.set(xlabel="score", ylabel="share that is right", title=f"calibration error {table.error:.3f}")


def _numbers(axes: Axes, found: Evaluation) -> None:
    names = dict.fromkeys(name for one in found.samples for name in one.judgement.numbers)
    for name in [*names][:_MOST_LINES]:
        pairs = [one.judgement.numbers[name] for one in found.samples if name in one.judgement.numbers]
        truth, said = zip(*pairs, strict=True)
        axes.scatter(truth, said, s=8, label=name)
        axes.axline((min(truth), min(truth)), slope=1, color="0.6", linestyle="--")
    axes.set(xlabel="truth", ylabel="predicted")
    axes.legend(frameon=False)
