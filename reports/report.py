"""`Report`: everything that the page of a run shows, as HTML, JSON or a picture."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.files import atomic_write, atomic_write_text
from flashtask.data.page_style import page_template
from flashtask.reports.charts import Chart, calibration_chart, curve_chart, history_charts, number_charts, runs_charts
from flashtask.reports.evaluation import Evaluation, plain
from flashtask.reports.history import History
from flashtask.reports.page import PAGE
from flashtask.reports.several import SeveralRuns
from flashtask.reports.statistics import Interval

__all__ = ["FORMATS", "Album", "Card", "Report", "sentence_of"]

FORMATS = ("html", "json", "png")
#: Classes of which the whole matrix is shown; of more, the pairs that are confused most.
_MOST_CLASSES, _MOST_CONFUSED = 16, 24
#: Rows of the table of classes, and columns of slices unless some are asked for.
_MOST_ROWS, _MOST_COLUMNS = 60, 12


class Card(NamedTuple):
    """Pictures with what is to be said about them.

    Args:
        pictures: addresses; empty ones are not shown.
        title: what is wrong or right, in a few words.
        name: of the sample.
        detail: more.
    """

    pictures: tuple[str, ...]
    title: str
    name: str
    detail: str = ""


class Album:
    """Counts the bytes of pictures, so that a page stays small enough to be sent by mail.

    Args:
        most: bytes of all pictures.
    """

    def __init__(self, most: int = 3_600_000) -> None:
        self.left, self.left_out = most, 0

    def add(self, address: str) -> str:
        """The address, or nothing where there is no room for it."""
        if len(address) > self.left:
            self.left_out += 1
            return ""
        self.left -= len(address)
        return address


@dataclass(repr=False)
class Report:
    """A finished run as a page.

    Args:
        title: of the page.
        facts: what was trained, and how: names with values.
        command: that repeats the run; empty if there is none.
        history: of the run.
        metrics: of the epoch whose weights the model has.
        monitor: the metric that decides which epoch is best.
        evaluation: of the samples; None if there is no data to judge the model on.
        remark: why there is none, or what is left out.
        worst: the samples with the largest errors.
        uncertain: those that the model is least certain of.
        cells: of the confusion matrix, by truth and prediction.
        objects: errors about objects by kind, with how many there are.
        findings: what is suspicious about the data: title, how many, advice, cards.
        heat_maps: what the heat maps beside the worst and most uncertain samples show; empty if there are none.
        slices_by: columns that samples are sliced by; None means all.
        several: the runs, if it is the page of several.
    """

    title: str
    facts: Mapping[str, str]
    command: str
    history: History
    metrics: Mapping[str, float]
    monitor: str
    evaluation: Evaluation | None = None
    remark: str = ""
    worst: Sequence[Card] = ()
    uncertain: Sequence[Card] = ()
    cells: Mapping[tuple[str, str], Sequence[Card]] = field(default_factory=dict)
    objects: Mapping[str, tuple[int, Sequence[Card]]] = field(default_factory=dict)
    findings: Sequence[tuple[str, int, str, Sequence[Card]]] = ()
    heat_maps: str = ""
    slices_by: Sequence[str] | None = None
    several: SeveralRuns | None = None

    def __str__(self) -> str:
        return self.sentence

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        if self.several is not None:
            return self.several.sentence
        if self.evaluation is not None:
            found = self.evaluation
            return sentence_of(found.interval(), found.scoring.title, len(found), found.part)
        known = {name: value for name, value in self.metrics.items() if name == self.monitor}
        shown = ", ".join(f"{name} is {value:.4f}" for name, value in known.items())
        return shown or "Nothing was measured."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: facts, metrics, history, and each sample with its prediction; no pictures."""
        return {
            "title": self.title,
            "sentence": self.sentence,
            "facts": dict(self.facts),
            "command": self.command or None,
            "metrics": plain(dict(self.metrics)),
            "history": [plain(row) for row in self.history],
            **({} if self.several is None else {"runs": self.several.to_dict()}),
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(self.slices_by),
            "findings": [{"kind": title, "count": count} for title, count, _, _ in self.findings],
        }

    def to_html(self) -> str:
        """The page: one file without scripts and without links to anything outside of it."""
        found = self.evaluation
        confusion = None if found is None else _confusion(found, self.cells)
        table, both = (None, None) if found is None else (found.calibration(), found.calibrations())
        tables = {} if table is None else {"this model": table}
        if found is not None and both is not None:
            names = ("this model", "with a temperature") if found.temperature is None else ("before", "this model")
            tables = dict(zip(names, both, strict=True))
        curves = [] if found is None else found.curves()
        charts = [] if found is None else number_charts([s.judgement.numbers for s in found.samples])
        best = {one.label: one for one in curves}
        classes = [] if found is None else found.per_class()
        slices = _slices(found, self.slices_by)
        return str(
            page_template(PAGE).render(
                title=self.title,
                report=self,
                sentence=self.sentence,
                history_charts=_curves(self),
                runs=_runs(self.several),
                confusion=confusion,
                classes=[(one, best.get(one.label)) for one in classes[:_MOST_ROWS]],
                more_classes=max(0, len(classes) - _MOST_ROWS),
                unit="" if found is None else found.scoring.unit,
                curve_chart=curve_chart(curves) if curves else None,
                calibration=table,
                calibrations=both,
                calibration_chart=calibration_chart(tables) if tables else None,
                number_charts=charts,
                slices=slices[: None if self.slices_by else _MOST_COLUMNS],
                more_columns=[] if self.slices_by else [one["column"] for one in slices[_MOST_COLUMNS:]],
                metrics=_shown_metrics(found.metrics if found is not None and found.metrics else self.metrics),
                number=_number,
            )
        )

    def _repr_html_(self) -> str:
        """The page in a frame of a notebook, which keeps its style to itself."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.to_html())}" style="width:100%;height:640px;border:0"></iframe>'

    def save(self, path: str | os.PathLike[str], form: str | None = None) -> Path:
        """Write the report; a file of that name is replaced.

        Args:
            path: of the file.
            form: `html`, `json` or `png` (the charts alone); None goes by the ending.

        Raises:
            UsageError: another format.
            OutputError, StorageError: it cannot be written.
        """
        file = Path(path)
        form = form or file.suffix.lower().removeprefix(".") or "html"
        if form not in FORMATS:
            fix = did_you_mean(form, FORMATS) or f"the formats are {', '.join(FORMATS)}"
            raise UsageError(f"a report is not written as {form!r}", fix=fix)
        if form == "png":
            from flashtask.reports.figure import figure_png

            with atomic_write(file) as target:
                target.write(figure_png(self.history, self.monitor, self.evaluation, self.title))
        else:
            text = self.to_html() if form == "html" else json.dumps(self.to_dict(), allow_nan=False) + "\n"
            atomic_write_text(file, text)
        return file


def _curves(report: Report) -> list[Chart]:
    """Of the history, or of the histories of several runs."""
    if report.several is None:
        return history_charts(report.history, report.monitor)
    return runs_charts({one.name: one.history for one in report.several.runs}, report.monitor)


def _runs(several: SeveralRuns | None) -> dict[str, Any] | None:
    """The rows of several runs, with bars from the lowest to the highest end of their intervals."""
    if several is None:
        return None
    ends = [value for one in several.intervals for value in one[1:4] if not math.isnan(value)]
    low, span = (min(ends), (max(ends) - min(ends)) or 1.0) if ends else (0.0, 1.0)
    rows = []
    for run, one in zip(several.runs, several.intervals, strict=True):
        left, right, middle = (
            50.0 if math.isnan(value) else 100 * (value - low) / span for value in (one.low, one.high, one.value)
        )
        bar = {"left": left, "width": max(0.5, right - left), "middle": middle}
        rows.append({"run": run, "count": len(run.evaluation), "interval": one, **bar})
    return {
        "rows": rows,
        "whole": 100 * (several.over_runs.value - low) / span,
        "deviation": statistics.stdev(one.value for one in several.intervals),
    }


def sentence_of(result: Interval, title: str, count: int, part: str) -> str:
    """The result in one sentence, with the interval if there is one."""
    noun = {"val": "validation", "test": "test"}.get(part, part)
    first = f"{title or f'{part}_{result.name}'} is {_number(result.value)} on {count:,} {noun} samples"
    if math.isnan(result.low):
        return f"{first}."
    ends = f"{_number(result.low)} and {_number(result.high)}"
    return f"{first}; on other samples like these it would be between {ends} ({result.level:.0%} interval)."


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.4g}"


def _shown_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of validation or test, without the parts of the loss and what could not be measured."""
    names = [n for n in metrics if n.startswith(("val_", "test_", "mean ")) and "_loss_" not in n]
    return {name: metrics[name] for name in names if not math.isnan(metrics[name])}


def _confusion(found: Evaluation, cells: Mapping[tuple[str, str], Sequence[Card]]) -> dict[str, Any] | None:
    """The matrix with the cards of each cell; of many classes the pairs that are confused most."""
    if not found.has_classes:
        return None
    matrix, classes = found.confusion_matrix(), found.classes
    keys = [*found.labels, ""]
    ids = {key: f"cell-{number}" for number, key in enumerate(cells)}
    galleries = [
        {
            "id": ids[truth, said],
            "truth": truth or found.scoring.nothing,
            "predicted": said or found.scoring.nothing,
            "count": matrix[keys.index(truth), keys.index(said)],
            "cards": cards,
        }
        for (truth, said), cards in cells.items()
    ]
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / totals.clip(min=1e-12)
    whole = len(classes) <= _MOST_CLASSES
    rows = [
        {
            "label": classes[row],
            "cells": [
                {
                    "count": matrix[row, column],
                    "share": shares[row, column],
                    "is_right": row == column,
                    "id": ids.get((keys[row], keys[column])),
                }
                for column in range(len(classes))
            ],
        }
        for row in range(len(classes) if whole else 0)
    ]
    pairs = [(matrix[a, b], a, b) for a in range(len(classes)) for b in range(len(classes)) if a != b and matrix[a, b]]
    confused = [
        {
            "truth": classes[a],
            "predicted": classes[b],
            "count": count,
            "share": shares[a, b],
            "id": ids.get((keys[a], keys[b])),
        }
        for count, a, b in sorted(pairs, key=lambda one: -one[0])[: 0 if whole else _MOST_CONFUSED]
    ]
    return {"classes": classes, "rows": rows, "confused": confused, "galleries": galleries, "count": len(classes)}


def _slices(found: Evaluation | None, by: Sequence[str] | None) -> list[dict[str, Any]]:
    """The slices by column, with bars from the lowest to the highest end of all intervals."""
    slices = [] if found is None else found.slices(by)
    known = [value for one in slices for value in (one.low, one.high, one.result) if not math.isnan(value)]
    if not known or found is None:
        return []
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    whole = found.interval().value
    by_column: dict[str, list[dict[str, Any]]] = {}
    for one in slices:
        places = [100 * (value - low) / span for value in (one.low, one.high, one.result)]
        left, right, middle = (50.0 if math.isnan(place) else place for place in places)
        row = {**one._asdict(), "left": left, "width": max(0.5, right - left), "middle": middle}
        by_column.setdefault(one.column, []).append(row)
    return [{"column": column, "rows": rows, "whole": 100 * (whole - low) / span} for column, rows in by_column.items()]
