"""Charts as plain numbers that a template draws as SVG: lines over axes with round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flashtask.reports.history import History, phases_of
from flashtask.reports.statistics import Calibration, Curve, thinned

__all__ = ["Chart", "calibration_chart", "curve_chart", "history_charts", "label_chart", "number_charts", "runs_charts"]

#: Size of the drawing and of its margins, in units of the SVG.
WIDTH, HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
#: Points of a scatter, and lines of a chart, at the most.
_MOST_POINTS, _MOST_LINES = 600, 8


class Line(NamedTuple):
    """A line of a chart.

    Args:
        name: in the legend; empty for none.
        path: `x,y` of its points in units of the SVG.
        dots: its points where they are marked.
        kind: a CSS class.
    """

    name: str
    path: str
    dots: list[tuple[float, float]]
    kind: str

    def with_dots(self) -> Line:
        """The line with all its points marked."""
        points = (one.split(",") for one in self.path.split())
        return self._replace(dots=[(float(x), float(y)) for x, y in points])


@dataclass
class Chart:
    """A chart, ready to be drawn.

    Args:
        title: above it.
        across: what lies on the horizontal axis.
        upwards: what lies on the vertical one.
        lines: of points.
        x_ticks: place and text.
        y_ticks: place and text.
        bands: of phases: left, width, text.
        has_dots: whether points are marked and not joined.
    """

    title: str
    across: str
    upwards: str
    lines: list[Line] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    bands: list[tuple[float, float, str]] = field(default_factory=list)
    has_dots: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


Series = tuple[str, Sequence[float], Sequence[float], str]


def _chart(
    title: str,
    across: str,
    upwards: str,
    series: Sequence[Series],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    has_dots: bool = False,
) -> Chart | None:
    """The chart of some series (name, xs, ys, kind); None if there is nothing to draw.

    A zero lies below the lowest tick of a logarithmic axis, at a tick of its own.
    """
    points = [(x, y) for _, xs, ys, _ in series for x, y in zip(xs, ys, strict=True) if _is_drawn(x, y, log)]
    heights = [y for _, y in points if y or not log]
    if not heights:
        return None
    x_ends = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    y_ends = y_range or (min(heights), max(heights))
    x_ticks = _ticks(*x_ends, whole=across == "epoch")
    y_ticks = _decades(*y_ends) if log else _ticks(*y_ends)
    floor = y_ticks[0] ** 2 / y_ticks[1] if len(heights) < len(points) else None
    if floor is not None:
        y_ticks = [floor, *y_ticks]
    x_ends = (min(x_ends[0], x_ticks[0]), max(x_ends[1], x_ticks[-1]))
    y_ends = (min(y_ends[0], y_ticks[0]), max(y_ends[1], y_ticks[-1]))
    to_x = _scale(x_ends[0], x_ends[1], _LEFT, WIDTH - _RIGHT)
    to_y = _scale(y_ends[0], y_ends[1], HEIGHT - _BOTTOM, _TOP, log=log)
    made = Chart(title, across, upwards, has_dots=has_dots)
    for name, own_xs, own_ys, kind in series:
        dots = [(to_x(x), to_y(y or floor or y)) for x, y in zip(own_xs, own_ys, strict=True) if _is_drawn(x, y, log)]
        if dots:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
            few = dots if has_dots or len(dots) == 1 else []
            made.lines.append(Line(name, path, [(round(x, 1), round(y, 1)) for x, y in few], kind))
    made.x_ticks = [(round(to_x(x), 1), f"{x:,.6g}") for x in x_ticks]
    words = [f"{y:.0e}".replace("e-0", "e-") if log else f"{y:,.6g}" for y in y_ticks]
    words = words if floor is None else ["0", *words[1:]]
    made.y_ticks = [(round(to_y(y), 1), text) for y, text in zip(y_ticks, words, strict=True)]
    return made


def _is_drawn(x: float, y: float, log: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (y >= 0 or not log)


def _scale(low: float, high: float, first: float, last: float, *, log: bool = False) -> Callable[[float], float]:
    if log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0
    return lambda value: first + ((math.log10(value) if log else value) - low) / span * (last - first)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to six round numbers from the lower end or below to the upper end or above."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * times for times in (1, 2, 2.5, 5, 10) if span / (size * times) <= 5)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    if whole:
        last = max(first + 1, math.floor(high / step + 1e-9))
    return [round(number * step, 12) for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(high) - 1e-9))
    step = max(1, (last - first) // 5)
    return [10.0**power for power in range(first, last + 1, step)]


def history_charts(history: History, metric: str) -> list[Chart]:
    """Loss, the metric that decides, and learning rates over epochs, with the phases of the strategy.

    Args:
        history: of the run.
        metric: as it is logged, with `val_`.
    """
    if not history:
        return []
    epochs, names = history.column("epoch"), history.columns
    ends = (min(epochs), max(epochs))

    def series(chosen: Sequence[tuple[str, str]]) -> list[Series]:
        found = [(shown, name) for shown, name in chosen if name in names]
        return [(shown, epochs, history.column(name), f"s{n}") for n, (shown, name) in enumerate(found)]

    losses = series([("training", "train_loss"), ("validation", "val_loss")])
    metrics = series([(metric, metric)]) if metric not in ("val_loss", "train_loss") else []
    rates = series(_different_rates(history))
    found = [
        _chart("Loss", "epoch", "loss", losses, x_range=ends),
        _chart(metric, "epoch", metric, metrics, x_range=ends) if metrics else None,
        _chart("Learning rate", "epoch", "rate", rates, x_range=ends, log=True) if rates else None,
    ]
    charts = [chart for chart in found if chart is not None]
    phases = phases_of(history)
    if len(phases) > 1 and len(epochs) > 1:
        ticks = [(x, float(text.replace(",", ""))) for x, text in charts[0].x_ticks]
        (x0, e0), (x1, e1) = ticks[0], ticks[-1]
        bands = []
        for number, (first, last, count) in enumerate(phases):
            left = x0 + (epochs[first] - e0) / (e1 - e0) * (x1 - x0)
            stop = epochs[last] if last < len(epochs) else epochs[-1]
            right = min(float(WIDTH - _RIGHT), x0 + (stop - e0) / (e1 - e0) * (x1 - x0))
            bands.append((round(left, 1), round(max(0.0, right - left), 1), f"phase {number}: {count:,} train"))
        for chart in charts:
            chart.bands = bands
    return charts


def _different_rates(history: History) -> list[tuple[str, str]]:
    """Learning rates as (names, column), those that are equal in all epochs once."""
    found: dict[tuple[float, ...], list[str]] = {}
    for name in history.columns:
        if name.startswith("learning_rate"):
            found.setdefault(tuple(np.nan_to_num(history.column(name), nan=-1.0).tolist()), []).append(name)
    return [(", ".join(n.removeprefix("learning_rate_") for n in own), own[0]) for own in found.values()][:_MOST_LINES]


def runs_charts(histories: Mapping[str, History], metric: str) -> list[Chart]:
    """The metric that decides and the loss of validation over epochs, a line for each of the first eight runs.

    Args:
        histories: by the names of the runs.
        metric: as it is logged, with `val_`.
    """
    found = []
    for name in dict.fromkeys([metric, "val_loss"]):
        own = {run: one for run, one in [*histories.items()][:_MOST_LINES] if name in one.columns}
        series = [
            (run, one.column("epoch"), one.column(name), f"s{number}") for number, (run, one) in enumerate(own.items())
        ]
        found.append(_chart(name, "epoch", name, series))
    return [chart for chart in found if chart is not None]


def curve_chart(curves: Sequence[Curve]) -> Chart | None:
    """Precision over recall, of the classes with the smallest areas if there are many."""
    chosen = sorted(curves, key=lambda one: one.average_precision)[:_MOST_LINES]
    series = []
    for number, one in enumerate(map(thinned, sorted(chosen, key=lambda one: one.label))):
        recall, precision = [0.0, *one.recall.tolist()], [float(one.precision[0]), *one.precision.tolist()]
        series.append((f"{one.label} ({one.average_precision:.3f})", recall, precision, f"s{number}"))
    return _chart("Precision over recall", "recall", "precision", series, x_range=(0, 1), y_range=(0, 1))


def calibration_chart(tables: Mapping[str, Calibration]) -> Chart | None:
    """How often what got a score was right.

    Args:
        tables: by what the legend calls them.
    """
    series = [("perfect", [0.0, 1.0], [0.0, 1.0], "even")]
    for number, (name, table) in enumerate(tables.items()):
        known = table.counts > 0
        series.append((name, table.scores[known].tolist(), table.right[known].tolist(), f"s{number}"))
    made = _chart("Calibration", "score", "share that is right", series, x_range=(0, 1), y_range=(0, 1))
    if made is not None:
        made.lines[1:] = [line.with_dots() for line in made.lines[1:]]
    return made


def number_charts(numbers: Sequence[Any]) -> list[Chart]:
    """The predicted number over the true one, a chart for each.

    Args:
        numbers: of each sample, by name the true and the predicted number.
    """
    names = list(dict.fromkeys(name for one in numbers for name in one))[:_MOST_LINES]
    found = []
    for name in names:
        own = [one[name] for one in numbers if name in one]
        rows = np.unique(np.linspace(0, len(own) - 1, min(len(own), _MOST_POINTS)).round().astype(int)).tolist()
        truth, said = [own[row][0] for row in rows], [own[row][1] for row in rows]
        ends = (min(*truth, *said), max(*truth, *said))
        made = _chart(name, "truth", "predicted", [("", truth, said, "s0")], x_range=ends, y_range=ends, has_dots=True)
        even = _chart(name, "truth", "predicted", [("", ends, ends, "even")], x_range=ends, y_range=ends)
        if made is not None and even is not None:
            made.lines.insert(0, even.lines[0])
            found.append(made)
    return found


def label_chart(
    points: Sequence[tuple[float, ...]], metric: str, forecast: tuple[float, ...] | None = None
) -> Chart | None:
    """A metric over the number of labels, each doubling as wide as the next.

    Args:
        points: labels, value, lower and upper end of the interval.
        metric: its name.
        forecast: the same for more labels.
    """
    places = [math.log2(one[0]) for one in points]
    ends = [one[1:] for one in points]
    series: list[Series] = [(metric, places, [one[0] for one in ends], "s0")]
    bounds = [("95 % interval", 1), ("", 2)]
    series += [(name, places, [one[place] for one in ends], "even") for name, place in bounds]
    if forecast is not None:
        series.append(("if a power law goes on", [math.log2(forecast[0])], [forecast[1]], "s1"))
        for place in (2, 3):
            series.append(("", [places[-1], math.log2(forecast[0])], [ends[-1][place - 1], forecast[place]], "even"))
    made = _chart(metric, "labels", metric, series)
    if made is None:
        return None
    (left, first), (right, last) = (
        (x, float(text.replace(",", ""))) for x, text in (made.x_ticks[0], made.x_ticks[-1])
    )
    ticks = [(left + (math.log2(size) - first) / (last - first) * (right - left), size) for size, *_ in points]
    shown = [ticks[-1]]
    for one in reversed(ticks[:-1]):
        if shown[-1][0] - one[0] > 40:
            shown.append(one)
    made.x_ticks = [(round(x, 1), f"{size:,.0f}") for x, size in reversed(shown)]
    made.lines[0] = made.lines[0].with_dots()
    return made
