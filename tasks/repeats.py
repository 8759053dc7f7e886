"""Several runs of one training: with other seeds, other splits, or over folds; and what they say together."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from flashtask.core.errors import UsageError
from flashtask.core.files import atomic_write_text
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import seed_everything
from flashtask.reports.evaluation import Evaluation, plain
from flashtask.reports.judgement import Judged
from flashtask.reports.several import joined, mean_interval
from flashtask.tasks.finished_run import FinishedRun
from flashtask.trainer.checkpoints.newest import checkpoints_in, newest_whole_checkpoint
from flashtask.trainer.fit_result import shown_path
from flashtask.trainer.run_folder import RunFolder, files_of_a_run, remove_remains, require_no_run
from flashtask.trainer.text_table import WIDTH, text_table, wrapped

__all__ = ["VARIES", "PlannedRun", "RepeatedRuns", "Spread", "planned_runs", "repeat_runs", "run_planned"]

#: What differs between repeats: the seed of the training, the split, or both.
VARIES = ("seed", "split", "both")
_PREDICTIONS, _REPORT = "predictions.csv", "report.html"
#: Metrics that the table for people has.
_SHOWN = 4


@dataclass(frozen=True)
class PlannedRun:
    """One of several runs.

    Args:
        name: of its folder.
        folder: where it is written.
        seed: of the training.
        split: arguments of the data: `split_seed`, and `fold` where there are folds.
        repeat: from 1.
        fold: from 1; None where there are none.
        checkpoint: to continue from; None for a run from the beginning.
    """

    name: str
    folder: Path
    seed: int
    split: Mapping[str, Any]
    repeat: int = 1
    fold: int | None = None
    checkpoint: Path | None = None


class Spread(NamedTuple):
    """A metric over several runs.

    Args:
        mean: of the runs.
        deviation: the standard deviation of a sample of runs (n - 1 in the denominator).
        low: the smallest value.
        high: the largest.
    """

    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class RepeatedRuns:
    """Several runs, and what they say together.

    Args:
        folder: that holds the folder of each.
        runs: as they were planned.
        summaries: `summary.json` of each.
        varies: what differed between repeats, one of `VARIES`.
        out_of_fold: every sample that was in a fold, judged by the run that was not trained on it; None without folds.
        always_trained: samples that no fold validates.
    """

    folder: Path
    runs: Sequence[PlannedRun]
    summaries: Sequence[Mapping[str, Any]]
    varies: str = "seed"
    out_of_fold: Evaluation | None = None
    always_trained: int = 0
    #: By run, the samples of its fold.
    _of_folds: Mapping[str, Sequence[Judged]] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> dict[str, Spread]:
        """The metrics of the best epochs, those of validation if there is any: `{"val_accuracy": Spread(...)}`."""
        bests = [summary["best"] for summary in self.summaries]
        names = [name for name in bests[0] if all(isinstance(best.get(name), (int, float)) for best in bests)]
        names = [name for name in names if name.startswith("val_")] or [n for n in names if n.startswith("train_")]
        names.sort(key=lambda name: name == "val_loss")
        return {name: spread_of([float(best[name]) for best in bests]) for name in names}

    def predictions(self) -> Iterator[dict[str, Any]]:
        """A row for each sample that was in a fold: path, repeat, fold, target, the prediction, scores of labels."""
        has_repeats = any(run.repeat > 1 for run in self.runs)
        for run in self.runs:
            for one in self._of_folds.get(run.name, ()):
                row = {"path": one.input, **({"repeat": run.repeat} if has_repeats else {}), "fold": run.fold}
                said = {name: value for name, value in one.row.items() if name != "path"}
                yield {**row, **_targets(one), **said, **_scores(one)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `summary.json` of the folder."""
        facts = self.summaries[0]
        runs = []
        for run, summary in zip(self.runs, self.summaries, strict=True):
            split = {"repeat": run.repeat, "fold": run.fold, "split_seed": run.split["split_seed"]}
            ended = {name: summary.get(name) for name in ("epochs", "seconds", "stopped")}
            runs.append({"name": run.name, "seed": run.seed, **split, **ended, "best": dict(summary["best"])})
        metrics = self.metrics
        found = {
            **{name: facts.get(name) for name in ("task", "backbone", "strategy")},
            "varies": self.varies,
            "best": {name: spread.mean for name, spread in metrics.items()},
            "metrics": {name: plain(spread._asdict()) for name, spread in metrics.items()},
            "runs": runs,
            "seconds": round(sum(summary.get("seconds") or 0.0 for summary in self.summaries), 3),
        }
        if self.out_of_fold is not None:
            interval = self.out_of_fold.interval()
            samples = len({one.input for one in self.out_of_fold.samples})
            of_folds = {"samples": samples, "always_trained": self.always_trained, **plain(interval._asdict())}
            found["out_of_fold"] = of_folds
        return found

    def lines(self) -> Iterator[str]:
        """The runs with mean, deviation, lowest and highest as a table of 80 columns, and what is in the folder."""
        metrics = [*self.metrics.items()][:_SHOWN]
        rows = []
        for run, summary in zip(self.runs, self.summaries, strict=True):
            values = [f"{summary['best'][name]:.4f}" for name, _ in metrics]
            rows.append([run.name, *values, f"{summary.get('seconds') or 0:.1f}"])
        for row, title in enumerate(("mean", "deviation", "lowest", "highest")):
            rows.append([title, *(f"{spread[row]:.4f}" for _, spread in metrics), ""])
        yield text_table(["run", *(name for name, _ in metrics), "seconds"], rows).rstrip()
        yield from wrapped(self._varied(), WIDTH)
        if self.out_of_fold is None and metrics:
            one = mean_interval([float(summary["best"][metrics[0][0]]) for summary in self.summaries], metrics[0][0])
            ends = f"{one.low:.4f} to {one.high:.4f}"
            yield from wrapped(f"mean of {one.name} over more such runs: 95 % interval {ends}", WIDTH)
        if self.out_of_fold is not None:
            one, count = self.out_of_fold.interval(), len({sample.input for sample in self.out_of_fold.samples})
            ends = "" if math.isnan(one.low) else f", 95 % interval {one.low:.4f} to {one.high:.4f}"
            yield from wrapped(f"out of fold: {one.name} {one.value:.4f} on {count:,} samples{ends}", WIDTH)
            if self.always_trained:
                yield f"{self.always_trained:,} samples train in every fold"
            yield f"predictions: {os.path.join(shown_path(self.folder), _PREDICTIONS)}"

    def _varied(self) -> str:
        seeds, splits = ({run.seed for run in self.runs}, {run.split["split_seed"] for run in self.runs})
        folds = max((run.fold or 0 for run in self.runs), default=0)
        over = f" over {folds} folds" if folds else ""
        return f"{len(self.runs)} runs{over}; training seed {_range(seeds)}, split seed {_range(splits)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, standard deviation (0 of a single value) and ends of some values, at least one."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, min(values), max(values))


def planned_runs(
    folder: str | os.PathLike[str],
    *,
    repeats: int = 1,
    folds: int | None = None,
    vary: str = "seed",
    seed: int = 0,
    split_seed: int = 0,
) -> list[PlannedRun]:
    """The runs of `repeat_runs`, in their order; nothing is read or written.

    Raises:
        UsageError: numbers that are too small, or nothing to repeat.
    """
    for name, value, least in (("repeats", repeats, 1), ("folds", folds, 2), ("seed", seed, 0)):
        if value is not None and not is_whole(value, least):
            raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}", fix=f"{name}=5")
    if vary not in VARIES:
        raise UsageError(f"vary must be one of {', '.join(VARIES)}, not {vary!r}", fix='vary="seed"')
    if repeats == 1 and folds is None:
        raise UsageError("there is nothing to repeat", fix="repeats=5, or folds=5")
    made = []
    for repeat in range(1, repeats + 1):
        own_seed = seed + (repeat - 1 if vary in ("seed", "both") else 0)
        own_split = split_seed + (repeat - 1 if vary in ("split", "both") else 0)
        for fold in range(1, folds + 1) if folds else (None,):
            parts = [f"repeat-{repeat}"] if repeats > 1 or fold is None else []
            name = "-".join([*parts, *([f"fold-{fold}"] if fold else [])])
            split = {"split_seed": own_split, **({"fold": f"{fold}/{folds}"} if fold else {})}
            made.append(PlannedRun(name, Path(folder).absolute() / name, own_seed, split, repeat, fold))
    return made


def repeat_runs(
    train: Callable[[PlannedRun], FinishedRun | None],
    folder: str | os.PathLike[str],
    *,
    repeats: int = 1,
    folds: int | None = None,
    vary: str = "seed",
    seed: int = 0,
    split_seed: int = 0,
    resume: bool = False,
) -> RepeatedRuns:
    """Train several times, and sum up: mean and spread of the metrics, with folds also out-of-fold predictions.

    Args:
        train: trains one of the runs, into `run.folder`, with `run.seed`, data made with `**run.split`, and
            `ckpt_path=run.checkpoint`. It may return `trainer.result`; where it returns None the run is opened from its
            folder, whose recipe must lead to the data.
        folder: for a run folder each, `summary.json` and `predictions.csv`.
        repeats: how often everything is trained.
        folds: of each repeat; each sample validates in one of them.
        vary: what differs between repeats: `seed` of the training, `split` seed, or `both`; each counts up by 1.
        seed: of the first repeat's training.
        split_seed: of the first repeat's split.
        resume: go on in a folder: finished runs are not trained again, one that was stopped is continued.

    Raises:
        UsageError: numbers that are too small; or `train` has trained something else than it was given.
        OutputError: the folder is taken.
    """
    plan = planned_runs(folder, repeats=repeats, folds=folds, vary=vary, seed=seed, split_seed=split_seed)

    def one(run: PlannedRun) -> FinishedRun | None:
        if (run.folder / "summary.json").exists():
            return None
        checkpoint = None
        if checkpoints_in(run.folder):
            checkpoint = newest_whole_checkpoint(run.folder)
        elif files_of_a_run(run.folder):
            remove_remains(run.folder)
        seed_everything(run.seed, verbose=False)
        return train(replace(run, checkpoint=checkpoint))

    if not resume:
        for run in plan:
            require_no_run(run.folder)
    claimed = RunFolder(Path(folder), resume=resume)
    try:
        return run_planned(plan, one, claimed, vary)
    finally:
        claimed.release()


def run_planned(
    plan: Sequence[PlannedRun],
    train: Callable[[PlannedRun], FinishedRun | None],
    claimed: RunFolder,
    vary: str = "seed",
) -> RepeatedRuns:
    """Train each run that is not finished, sum up, and write `summary.json`, `predictions.csv` and the report.

    Args:
        plan: the runs.
        train: called for every one of them; it decides what is left to do.
        claimed: the folder of all.
        vary: what differs between repeats.
    """
    summaries, of_folds, parts, opened, always = [], {}, [], [], 0
    for run in plan:
        finished = train(run) or FinishedRun(run.folder)
        _require_planned(run, finished)
        opened.append(finished)
        summaries.append(finished.summary)
        if run.fold is not None:
            parts.append(finished.evaluation("val"))
            of_folds[run.name] = parts[-1].samples
            always = sum(finished.data.sizes().get(part, 0) for part in ("train", "val"))
        print(f"{run.name}: {_best_words(finished.summary)}", file=sys.stderr)
    out_of_fold = joined(parts) if parts else None
    covered = len({one.input for samples in of_folds.values() for one in samples})
    made = RepeatedRuns(claimed.path, tuple(plan), summaries, vary, out_of_fold, max(0, always - covered), of_folds)
    if out_of_fold is not None:
        _write_predictions(claimed.path / _PREDICTIONS, [*made.predictions()])
    claimed.write_summary(made.to_dict())
    if len(plan) > 1 and all((run.folder / _REPORT).exists() for run in plan):
        _write_report(claimed.path, opened)
    return made


def _write_report(folder: Path, finished: Sequence[FinishedRun]) -> None:
    """Write the page of all runs; if that fails, the training does not."""
    from flashtask.tasks.several_report import report_of_runs

    try:
        report_of_runs(folder, finished).save(folder / _REPORT)
    except Exception as error:
        what = f"the report was not written: {type(error).__name__}: {error}"
        print(f"{what}\n  fix: flashtask report {folder}", file=sys.stderr)


def _require_planned(run: PlannedRun, finished: FinishedRun) -> None:
    """The run in a folder is the one that was planned.

    Raises:
        UsageError: it has another seed or fold, or there is none.
    """
    summary, recipe = finished.summary, finished.recipe
    fix = "Trainer(output_dir=run.folder, seed=run.seed), and **run.split for the data"
    if not summary or finished.folder.absolute() != run.folder:
        raise UsageError(f"{run.name} left no finished run in {run.folder}", fix=fix)
    data: dict[str, Any] = next(iter((recipe.get("data") or {}).values()), {})
    compared = {"seed": (run.seed, summary.get("seed"))}
    compared |= {name: (value, data[name]) for name, value in run.split.items() if name in data}
    for name, (planned, found) in compared.items():
        if planned != found and (name != "split_seed" or run.fold is not None or data.get("val_split")):
            raise UsageError(f"{run.folder} was trained with {name} {found!r}, not {planned!r}", fix=fix)


def _targets(one: Judged) -> dict[str, Any]:
    """The target in words, or as a number; of several numbers a column each."""
    truths = {name: truth for name, (truth, _) in one.judgement.numbers.items()}
    if len(truths) > 1:
        return {f"target_{name}": truth for name, truth in truths.items()}
    return {"target": next(iter(truths.values()), one.target)}


def _scores(one: Judged) -> dict[str, float]:
    """The score of each label, where a sample has one for each."""
    scores = one.judgement.scores
    if not scores or any(len(found) != 1 for found in scores.values()):
        return {}
    return {f"score_{label}": found[0][0] for label, found in scores.items()}


def _write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: json.dumps(one) if isinstance(one, (list, dict)) else one for name, one in row.items()})
    atomic_write_text(path, text.getvalue())


def _best_words(summary: Mapping[str, Any]) -> str:
    best = {name: value for name, value in summary["best"].items() if name.startswith("val_") and value is not None}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in [*best.items()][:_SHOWN])
    return f"{shown or 'trained'} in {summary.get('seconds') or 0.0:.1f} s"


def _range(values: set[int]) -> str:
    return f"{min(values)}" if len(values) == 1 else f"{min(values)} to {max(values)}"
