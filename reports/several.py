"""Several runs of one training beside each other: what they say together, and where they differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from flashtask.reports.evaluation import Evaluation, plain
from flashtask.reports.history import History
from flashtask.reports.judgement import Judged
from flashtask.reports.statistics import Interval

__all__ = ["OneRun", "SeveralRuns", "Tally", "joined", "mean_interval"]

#: The quantile of Student's t of a two-sided interval of 95 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
#: That of the normal distribution, and how it is corrected for more degrees of freedom.
_Z = 1.96


class OneRun(NamedTuple):
    """One of several runs.

    Args:
        name: of its folder.
        seed: of the training.
        split_seed: of the split.
        fold: from 1; None where there are none.
        seconds: that it took.
        history: of it.
        evaluation: of its samples.
    """

    name: str
    seed: int
    split_seed: int
    fold: int | None
    seconds: float
    history: History
    evaluation: Evaluation


class Tally(NamedTuple):
    """What several runs make of a sample.

    Args:
        judged: by the run with the largest error.
        wrong: in how many of them a class was taken for another.
        runs: that have judged it.
        error: the mean of their errors.
    """

    judged: Judged
    wrong: int
    runs: int
    error: float


@dataclass(frozen=True)
class SeveralRuns:
    """Runs of one training with other seeds, other splits, or over folds; at least two.

    Args:
        runs: in their order.
    """

    runs: Sequence[OneRun]

    @property
    def has_folds(self) -> bool:
        """Whether each run validates on a fold of its own."""
        return self.runs[0].fold is not None

    @property
    def has_same_samples(self) -> bool:
        """Whether all runs are judged on the same samples."""
        names = {tuple(one.name for one in run.evaluation.samples) for run in self.runs}
        return len(names) == 1

    @cached_property
    def evaluation(self) -> Evaluation:
        """The samples of all runs; those of the same input are drawn together for intervals."""
        return joined([run.evaluation for run in self.runs])

    @cached_property
    def intervals(self) -> list[Interval]:
        """The metric of each run, on other samples like its own."""
        return [run.evaluation.interval(times=400) for run in self.runs]

    @cached_property
    def over_runs(self) -> Interval:
        """The mean of the runs, over more runs that differ as these do."""
        return mean_interval([one.value for one in self.intervals], self.intervals[0].name)

    @cached_property
    def over_samples(self) -> Interval:
        """The mean of the runs, on other samples like these; of runs on the same samples also over more runs.

        With the same samples the distances of both intervals from the mean add up as independent errors do (MOVER; Zou
        and Donner, 2008). The runs of other splits and folds differ by their samples already.
        """
        own = self.evaluation.interval()
        if not self.has_same_samples:
            return own
        mean, runs = self.over_runs.value, self.over_runs
        low = mean - math.hypot(own.value - own.low, mean - runs.low)
        high = mean + math.hypot(own.high - own.value, runs.high - mean)
        return Interval(own.name, mean, low, high, method=f"{own.method}, and {runs.method}")

    @property
    def sentence(self) -> str:
        """The result in one sentence, with what the runs and what the samples leave open."""
        found, over_runs, over_samples = self.evaluation, self.over_runs, self.over_samples
        title = found.scoring.title or f"{found.part}_{over_runs.name}"
        values = [one.value for one in self.intervals]
        noun = {"val": "validation", "test": "test"}.get(found.part, found.part)
        count = len({one.input for one in found.samples})
        ends = f"the {len(self.runs)} runs lie {_between(min(values), max(values))}"
        if self.has_folds:
            first = f"{title} is {_shown(over_samples.value)} out of fold on {count:,} samples"
            like = f"on other samples like these it would be {_between(*over_samples[2:4])} (95% interval)"
            return f"{first}; {like}; {ends}."
        first = f"{title} is {_shown(over_runs.value)}, the mean of {len(self.runs)} runs"
        more = f"over more runs the mean would be {_between(*over_runs[2:4])}"
        if self.has_same_samples:
            on = f"on the same {count:,} {noun} samples"
            too = f"and on other samples as well, {_between(*over_samples[2:4])} (95% intervals)"
            return f"{first} {on}; {more}, {too}; {ends}."
        return f"{first} with {noun} samples of their own; {more} (95% interval); {ends}."

    @cached_property
    def tallies(self) -> list[Tally]:
        """What the runs make of each sample, in the order of the samples."""
        own: dict[str, list[Judged]] = {}
        for one in self.evaluation.samples:
            own.setdefault(one.input, []).append(one)
        found = []
        for judged in own.values():
            errors = [one.judgement.error for one in judged if not math.isnan(one.judgement.error)]
            worst = max(judged, key=lambda one: -math.inf if math.isnan(one.judgement.error) else one.judgement.error)
            mean = statistics.fmean(errors) if errors else math.nan
            found.append(Tally(worst, sum(one.is_wrong for one in judged), len(judged), mean))
        return found

    def worst(self, k: int = 12) -> list[Tally]:
        """The samples with the largest errors in the mean of the runs; of classes only those that are wrong in one."""
        wrong = [one for one in self.tallies if not one.judged.judgement.pairs or one.wrong]
        return sorted(wrong, key=lambda one: -math.inf if math.isnan(one.error) else -one.error)[:k]

    def disputed(self, k: int = 12) -> list[Tally]:
        """The samples that some runs have right and others wrong, those on which they disagree most first."""
        found = [one for one in self.tallies if 0 < one.wrong < one.runs]
        return sorted(found, key=lambda one: (abs(one.wrong / one.runs - 0.5), -one.error))[:k]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain values for JSON: the runs with their metrics and intervals."""
        facts = ("name", "seed", "split_seed", "fold", "seconds")
        return [
            {
                **{name: getattr(run, name) for name in facts},
                "result": plain(interval._asdict()),
                "metrics": plain(dict(run.evaluation.metrics)),
            }
            for run, interval in zip(self.runs, self.intervals, strict=True)
        ]


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """The samples of several evaluations together; those of several runs are drawn together for intervals.

    Args:
        parts: at least one.
    """
    samples = tuple(one for part in parts for one in part.samples)
    groups: list[str] | None = None
    if all(part.groups is not None for part in parts):
        groups = [name for part in parts for name in part.groups or ()]
    elif len({one.input for one in samples}) < len(samples):
        groups = [one.input for one in samples]
    return Evaluation(parts[0].part, {}, samples, parts[0].labels, parts[0].scoring, groups)


def mean_interval(values: Sequence[float], name: str = "") -> Interval:
    """The mean of some runs with its 95 % interval over more runs, by Student's t.

    Args:
        values: of each run; of one alone there is no interval.
        name: of the metric.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(name, mean, math.nan, math.nan)
    free = count - 1
    quantile = _T[free - 1] if free <= len(_T) else _Z + (_Z**3 + _Z) / (4 * free)
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(name, mean, mean - half, mean + half, method=f"Student's t over {count} runs")


def _between(low: float, high: float) -> str:
    return f"between {_shown(low)} and {_shown(high)}"


def _shown(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.4g}"
