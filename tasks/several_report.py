"""The `Report` of several runs of one training: what they say together, as one page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.plain_json import read_json
from flashtask.reports.history import History
from flashtask.reports.report import Report
from flashtask.reports.several import OneRun, SeveralRuns
from flashtask.tasks.finished_run import FinishedRun
from flashtask.tasks.run_report import Pictures, duration, facts_of_run

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["are_several_in", "report_of_runs", "report_of_several"]

_FACTS = ("Task", "Backbone", "Head", "Strategy", "Data", "Targets", "Where", "Versions")


def are_several_in(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of several runs, as `--repeats` and `--folds` leave it."""
    file = Path(path).expanduser() / "summary.json"
    return file.is_file() and "runs" in read_json(file)


def report_of_several(
    folder: str | os.PathLike[str],
    part: str | None = None,
    *,
    slices: Sequence[str] | None = None,
    trainer: Trainer | None = None,
    judged_on: Callable[[FinishedRun], Any] | None = None,
) -> Report:
    """Judge the model of each run in a folder on its own validation data.

    Args:
        folder: of several runs that are finished.
        part: `val` or `test`; None means validation data.
        slices: columns that the samples are sliced by; None means all.
        trainer: whose devices the models are judged on; None means one with the defaults.
        judged_on: gives other data for a run; None means its own.

    Raises:
        UsageError: it is not such a folder.
        UnknownNameError: no sample has such a column.
    """
    place = Path(folder).expanduser()
    if not are_several_in(place):
        raise UsageError(f"{place} does not hold several runs", fix=f"flashtask report {place}")
    finished = []
    for one in read_json(place / "summary.json")["runs"]:
        finished.append(FinishedRun(place / one["name"], trainer=trainer))
        if judged_on is not None:
            finished[-1].data = judged_on(finished[-1])
    return report_of_runs(place, finished, part, slices)


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
    several = SeveralRuns([_row(told, run, part or "val") for told, run in rows])
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


def _row(told: dict[str, Any], run: FinishedRun, part: str) -> OneRun:
    facts = (told["name"], told["seed"], told["split_seed"], told["fold"], told.get("seconds") or 0.0)
    return OneRun(*facts, run.history, run.evaluation(part))
