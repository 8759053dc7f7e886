"""`Comparison`: what differs between runs, and whether it is more than luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flashtask.core.plain_json import number_or_null
from flashtask.reports.evaluation import Evaluation, plain
from flashtask.reports.judgement import Judged
from flashtask.reports.statistics import ClassCounts, Interval

__all__ = ["Comparison", "Difference", "Flip", "compared", "data_that_differ", "mcnemar", "settings_that_differ"]


class Flip(NamedTuple):
    """A sample that one run got right and the other wrong.

    Args:
        before: as the first run judged it.
        after: as the other did.
    """

    before: Judged
    after: Judged

    @property
    def is_better(self) -> bool:
        """Whether the other run is right."""
        return not self.after.is_wrong


@dataclass(frozen=True)
class Difference:
    """A run beside the first one, on the samples that both were judged on.

    Args:
        common: how many samples that are.
        metric: the metric of the other run less that of the first, with the interval of a paired bootstrap.
        p: of McNemar's exact test on samples that one run got right and the other wrong; None without classes.
        flips: those samples, the ones that became right first.
        per_class: of each class, its row in the first run and in the other.
    """

    common: int
    metric: Interval
    p: float | None
    flips: tuple[Flip, ...]
    per_class: tuple[tuple[ClassCounts, ClassCounts], ...]

    @property
    def is_luck(self) -> bool | None:
        """Whether the difference may be luck, at 5 %; None where there are too few samples to say."""
        if self.p is not None:
            return self.p >= 0.05
        if math.isnan(self.metric.low):
            return None
        return self.metric.low <= 0 <= self.metric.high

    @property
    def verdict(self) -> str:
        """The difference with its interval, and whether it may be luck, in words."""
        text = f"{self.metric.name} {self.metric.value:+.4f}"
        if not math.isnan(self.metric.low):
            text += f" (95 % from {self.metric.low:+.4f} to {self.metric.high:+.4f}, {self.metric.method})"
        if self.is_luck is None:
            return f"{text}; too few samples to say whether it is luck"
        test = "" if self.p is None else f" (McNemar p = {self.p:.2g})"
        return f"{text}; {'this may be luck' if self.is_luck else 'this is more than luck'}{test}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "common_samples": self.common,
            "difference": plain(self.metric._asdict()),
            "mcnemar_p": self.p,
            "may_be_luck": self.is_luck,
            "became_right": [flip.after.name for flip in self.flips if flip.is_better],
            "became_wrong": [flip.after.name for flip in self.flips if not flip.is_better],
            "per_class": [[plain(one._asdict()), plain(two._asdict())] for one, two in self.per_class],
        }


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other; each is compared with the first.

    Args:
        names: of the runs.
        evaluations: of the same part of their data.
        settings: dotted key of the recipe -> its value in each run, where they differ.
        differences: of every run but the first.
        data: what differs in their data, as `data_that_differ` gives it.
    """

    names: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    settings: Mapping[str, tuple[Any, ...]]
    differences: tuple[Difference, ...]
    data: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, tuple[float, ...]]:
        """Every metric that all runs have."""
        first, *others = (one.metrics for one in self.evaluations)
        common = [name for name in first if all(name in other for other in others)]
        return {name: tuple(one.metrics[name] for one in self.evaluations) for name in common}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "runs": list(self.names),
            "part": self.evaluations[0].part,
            "samples": [len(one) for one in self.evaluations],
            "metrics": {name: [number_or_null(one) for one in values] for name, values in self.metrics.items()},
            "settings": {name: plain(values) for name, values in self.settings.items()},
            "data": {name: list(values) for name, values in self.data.items()},
            "differences": [one.to_dict() for one in self.differences],
        }


def compared(
    names: Sequence[str],
    evaluations: Sequence[Evaluation],
    settings: Mapping[str, Sequence[Any]],
    data: Mapping[str, tuple[int | None, ...]],
) -> Comparison:
    """Runs beside the first of them.

    Args:
        names: of the runs.
        evaluations: of the same part, by models of the same task.
        settings: as `settings_that_differ` gives them.
        data: as `data_that_differ` gives it.
    """
    first, *others = evaluations
    return Comparison(
        tuple(names),
        tuple(evaluations),
        {name: tuple(values) for name, values in settings.items()},
        tuple(_difference(first, other) for other in others),
        data,
    )


def _difference(first: Evaluation, other: Evaluation) -> Difference:
    before, after = first.common_with(other)
    pairs = list(zip(before.samples, after.samples, strict=True))
    has_classes = before.has_classes and after.has_classes
    flips = [Flip(*pair) for pair in pairs if pair[0].is_wrong != pair[1].is_wrong] if has_classes else []
    flips.sort(key=lambda flip: (not flip.is_better, flip.after.name))
    better = sum(flip.is_better for flip in flips)
    classes = list(zip(before.per_class(), after.per_class(), strict=False)) if has_classes else []
    return Difference(
        len(pairs),
        after.difference_to(before),
        mcnemar(better, len(flips) - better) if has_classes and first.scoring.unit == "images" else None,
        tuple(flips),
        tuple((one, two) for one, two in classes if one.label == two.label),
    )


def mcnemar(better: int, worse: int) -> float:
    """The p-value of McNemar's exact two-sided test: how likely counts at least as uneven are if both are as good.

    Args:
        better: samples that became right.
        worse: samples that became wrong.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count) if count else 1.0


def settings_that_differ(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys of recipes whose values differ, with the value in each; None where a recipe does not have it."""
    flat = [dict(_leaves("", recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def data_that_differ(data: Sequence[Mapping[str, Mapping[str, str]] | None]) -> dict[str, tuple[int | None, ...]]:
    """How many samples of each part there are in each run, how many also in the first, and how many with its target.

    Args:
        data: of each run, by part the target of each sample by its name; None where it is not known.

    Returns:
        By what is counted, the number in each run, for parts that differ; None where it is not known.
    """
    found: dict[str, tuple[int | None, ...]] = {}
    first = data[0]
    for part in dict.fromkeys(part for own in data for part in own or {}):
        parts = [None if own is None else own.get(part, {}) for own in data]
        if first is None or all(own is None or own == parts[0] for own in parts):
            continue
        known = first.get(part, {})
        common = [None if own is None else {name for name in own if name in known} for own in parts]
        same = [
            None if own is None or names is None else sum(own[name] == known[name] for name in names)
            for own, names in zip(parts, common, strict=True)
        ]
        found[f"{part} samples"] = tuple(None if own is None else len(own) for own in parts)
        found[f"{part} samples of the first"] = tuple(None if names is None else len(names) for names in common)
        found[f"{part} samples of the first, with its target"] = tuple(same)
    return found


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [leaf for name, part in value.items() for leaf in _leaves(f"{prefix}.{name}" if prefix else str(name), part)]
