"""The `Report` of several runs of one training: what they say together, as one page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.plain_json import read_json
from flashtask.reports.history import History
from flashtask.reports.report import Report
from flashtask.reports.several import OneRun, SeveralRuns
from flashtask.tasks.run_report import Pictures, duration, facts_of_run

if TYPE_CHECKING:
    from flashtask.tasks.finished_run import FinishedRun

__all__ = ["report_of_runs"]

_FACTS = ("Task", "Backbone", "Head", "Strategy", "Data", "Targets", "Where", "Versions")


def report_of_runs(
    folder: Path, finished: Sequence[FinishedRun], part: str | None = None, slices: Sequence[str] | None = None
) -> Report:
    """The page of runs that are finished.

    Args:
        folder: of all, with `summary.json`.
        finished: the runs in the order of the summary.
        part: `val` or `test`; None means validation data.
        slices: columns that the samples are sliced by; None means all.

    Raises:
        UnknownNameError: no sample has such a column.
    """
    summary = read_json(folder / "summary.json")
    rows = zip(summary["runs"], finished, strict=True)
    several = SeveralRuns([_one_run(entry, run, part or "val") for entry, run in rows])
    found, first = several.evaluation, finished[0]
    facts = {name: value for name, value in facts_of_run(first, first.data).items() if name in _FACTS}
    varies = "folds" if several.has_folds and summary["varies"] == "seed" else summary["varies"]
    facts |= {
        "Time": duration(summary["seconds"]),
        "Runs": f"{len(finished)}, which differ in: {varies}",
        "Folder": str(folder.absolute()),
    }
    metrics = {f"mean {name}": one["mean"] for name, one in summary["metrics"].items() if part in (None, "val")}
    title = f"{summary.get('backbone') or first.task.name}: {folder.name}"
    command = ""
    if (folder / "recipe.yaml").exists():
        command = f"flashtask finetune {shlex.quote(str(folder.absolute() / 'recipe.yaml'))}"
    made = Report(title, facts, command, History(), metrics, first.task.monitor, found, several=several)
    if slices:
        found.slices(slices)
        made.slices_by = tuple(slices)
    Pictures(first.task, first.data, found).fill_of_several(made, several)
    return made


def _one_run(entry: dict[str, Any], run: FinishedRun, part: str) -> OneRun:
    facts = (entry["name"], entry["seed"], entry["split_seed"], entry["fold"], entry.get("seconds") or 0.0)
    return OneRun(*facts, run.history, run.evaluation(part))
