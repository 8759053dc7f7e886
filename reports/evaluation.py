"""`Evaluation`: the samples of a part, each judged, with the metrics of the same pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flashtask.core.errors import UnknownNameError
from flashtask.core.plain_json import number_or_null
from flashtask.reports.confidence import cross_fitted, probabilities, scores_calibration
from flashtask.reports.judgement import Judged, Pair, Scoring
from flashtask.reports.statistics import (
    Calibration,
    ClassCounts,
    Curve,
    Interval,
    Slice,
    calibration,
    class_counts,
    draws,
    ends_of,
    precision_recall,
    sliced,
)

__all__ = ["Evaluation"]

#: Scores are kept this far from 0 and 1 before logarithms are taken.
_LEAST = 1e-12


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a model makes of the samples of a part of its data.

    Args:
        part: `val` or `test`.
        metrics: of all samples, as `validate` or `test` gives them: `val_accuracy`, ...
        samples: in the order of the data.
        labels: the classes; empty without any.
        scoring: how samples were judged.
        groups: of the samples, which are drawn together for intervals; None if there are none.
        temperature: that the scores have; None for none.
    """

    part: str
    metrics: Mapping[str, float]
    samples: tuple[Judged, ...]
    labels: tuple[str, ...] = ()
    scoring: Scoring = field(default_factory=Scoring)
    groups: Sequence[str] | None = None
    temperature: float | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in [*self.metrics.items()][:4])
        return f"Evaluation({len(self.samples):,} samples of {self.part}: {shown})"

    # ---- samples in an order

    def mistakes(self, k: int = 12) -> list[Judged]:
        """The samples with the largest errors, the worst first; of classes only those that are wrong."""
        wrong = [one for one in self.samples if one.is_wrong or (not one.judgement.pairs and one.judgement.error != 0)]
        return sorted(wrong, key=lambda one: -_finite(one.judgement.error))[:k]

    def uncertain(self, k: int = 12) -> list[Judged]:
        """The samples that the model is least certain of; empty if it does not say."""
        known = [one for one in self.samples if one.judgement.certainty is not None]
        return sorted(known, key=lambda one: one.judgement.certainty or 0.0)[:k]

    # ---- classes

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The rows of the confusion matrix: the labels, and what stands for nothing if that occurs."""
        return (*self.labels, self.scoring.nothing) if self.scoring.nothing else self.labels

    @cached_property
    def _pairs(self) -> tuple[Any, Any, Any]:
        """Of all pairs: the sample, the place in the flat matrix, and the weight."""
        place = {label: number for number, label in enumerate(self.labels)} | {"": len(self.labels)}
        size = len(self.labels) + 1
        rows = [
            (number, place[pair.truth] * size + place[pair.predicted], pair.weight)
            for number, one in enumerate(self.samples)
            for pair in one.judgement.pairs
        ]
        found = np.array(rows, dtype=float).reshape(-1, 3)
        return found[:, 0].astype(int), found[:, 1].astype(int), found[:, 2]

    @cached_property
    def _matrix(self) -> np.ndarray[Any, Any]:
        """The matrix (K + 1, K + 1), whose last row and column are for nothing."""
        size = len(self.labels) + 1
        _, place, weight = self._pairs
        return np.bincount(place, weights=weight, minlength=size * size).reshape(size, size)

    def confusion_matrix(self) -> np.ndarray[Any, Any]:
        """How much of each true class (rows) was predicted as which class (columns), in the order of `classes`."""
        return self._matrix if self.scoring.nothing else self._matrix[:-1, :-1]

    def per_class(self) -> list[ClassCounts]:
        """Precision, recall, F1 and how much there is of each class."""
        return class_counts(self._matrix, self.labels) if self.has_classes else []

    @property
    def has_classes(self) -> bool:
        """Whether there are classes to confuse."""
        return bool(self.labels) and len(self._pairs[0]) > 0

    def cell(self, truth: str, predicted: str) -> list[tuple[Judged, Pair]]:
        """The samples that have a pair of classes, the most certain or the largest first."""
        found = [(one, pair) for one in self.samples for pair in one.judgement.pairs if pair[:2] == (truth, predicted)]
        return sorted(found, key=lambda two: (-two[1].weight, -_finite(two[1].score)))

    # ---- the result

    def interval(self, rows: Sequence[int] | None = None, *, times: int | None = None) -> Interval:
        """The metric of `Scoring.metric` with a 95 % interval, by the percentiles of resamples (bootstrap).

        Args:
            rows: places of the samples; None means all.
            times: resamples; None means 1000, of many samples fewer.
        """
        places = np.arange(len(self.samples)) if rows is None else np.array(rows, dtype=int)
        groups = None if self.groups is None else [self.groups[place] for place in places]
        units = len(places) if groups is None else len(set(groups))
        value = float(self._value(self._sums_of(places, np.ones((len(places), 1), np.float32)))[0])
        if units < 2:
            return Interval(self.scoring.metric, value, math.nan, math.nan)
        times = times or int(min(1000, max(100, 2e7 // len(places))))
        drawn = [self._value(self._sums_of(places, often)) for often in draws(groups, len(places), times)]
        method = f"bootstrap over {units:,} {'samples' if groups is None else 'groups'}, {times:,} draws"
        return Interval(self.scoring.metric, value, *ends_of(np.concatenate(drawn)), method=method)

    def common_with(self, other: Evaluation) -> tuple[Evaluation, Evaluation]:
        """Both evaluations of the samples that both have, by name, in the order of this one."""
        theirs = {one.name: place for place, one in enumerate(other.samples)}
        places = [place for place, one in enumerate(self.samples) if one.name in theirs]
        return self._of(places), other._of([theirs[self.samples[place].name] for place in places])

    def _of(self, places: Sequence[int]) -> Evaluation:
        groups = None if self.groups is None else [self.groups[place] for place in places]
        return replace(self, samples=tuple(self.samples[place] for place in places), groups=groups)

    def difference_to(self, other: Evaluation) -> Interval:
        """The metric of `Scoring.metric` less that of another model on the same samples, by a paired bootstrap.

        Args:
            other: of the same samples in the same order.
        """
        count = len(self.samples)
        places = np.arange(count)
        ones = np.ones((count, 1), np.float32)
        units = count if self.groups is None else len(set(self.groups))
        value = float(self._value(self._sums_of(places, ones))[0] - other._value(other._sums_of(places, ones))[0])
        if units < 2:
            return Interval(self.scoring.metric, value, math.nan, math.nan)
        times = int(min(1000, max(100, 2e7 // count)))
        drawn = [
            self._value(self._sums_of(places, often)) - other._value(other._sums_of(places, often))
            for often in draws(self.groups, count, times)
        ]
        method = f"paired bootstrap over {units:,} {'samples' if self.groups is None else 'groups'}, {times:,} draws"
        return Interval(self.scoring.metric, value, *ends_of(np.concatenate(drawn)), method=method)

    def _sums_of(self, places: Any, often: Any) -> Any:
        """The sums (S, draws) of samples at some places that count so often (places, draws)."""
        whole = torch.zeros(len(self.samples), often.shape[1])
        whole[torch.from_numpy(places)] = torch.from_numpy(often)
        return torch.sparse.mm(self._sums, whole).numpy()

    def _value(self, sums: Any) -> Any:
        if self.scoring.value is None:
            with np.errstate(invalid="ignore", divide="ignore"):
                return sums[0] / sums[1]
        return self.scoring.value(*np.split(sums, 3))

    @cached_property
    def _sums(self) -> torch.Tensor:
        """What the metric is made of, added up over samples: (S, N), sparse."""
        if self.scoring.value is None:
            errors = np.array([one.judgement.error for one in self.samples], dtype=np.float32)
            known = ~np.isnan(errors)
            return torch.from_numpy(np.stack([np.where(known, errors, 0), known]).astype(np.float32)).to_sparse()
        size, count = len(self.labels) + 1, len(self.labels)
        sample, place, weight = self._pairs
        truth, predicted = place // size, place % size
        hit = truth == predicted
        row = np.concatenate([truth[hit], count + truth, 2 * count + predicted])
        column = np.concatenate([sample[hit], sample, sample])
        weights = np.concatenate([weight[hit], weight, weight])
        is_class = np.concatenate([truth[hit] < count, truth < count, predicted < count])
        indices = torch.from_numpy(np.stack([row, column])[:, is_class])
        values = torch.from_numpy(weights[is_class].astype(np.float32))
        shape = (3 * count, len(self.samples))
        return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).coalesce()

    # ---- scores

    @cached_property
    def _scores(self) -> dict[str, tuple[Any, Any]]:
        found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for one in self.samples:
            for label, scores in one.judgement.scores.items():
                found[label] += scores
        return {label: tuple(np.array(column) for column in zip(*rows, strict=True)) for label, rows in found.items()}  # type: ignore[misc]

    def curves(self) -> list[Curve]:
        """Precision and recall over thresholds, of each class that has scores."""
        totals = dict.fromkeys(self.labels, 0.0)
        for one in self.samples:
            for pair in one.judgement.pairs:
                if pair.truth:
                    totals[pair.truth] += 1
        made = (precision_recall(label, *self._scores[label], totals[label]) for label in self._scores)
        return [curve for curve in made if curve is not None]

    def calibration(self) -> Calibration | None:
        """Whether scores are probabilities: of the predicted class, or of every label where several may apply."""
        if not self.scoring.classes_exclude:
            whole = [*self._scores.values()]
            return calibration(*(np.concatenate(one) for one in zip(*whole, strict=True))) if whole else None
        best = [
            max(scores[0] for scores in one.judgement.scores.values()) for one in self.samples if one.judgement.scores
        ]
        if not best:
            return None
        scores = np.array(best)
        return calibration(scores[:, 0].astype(float), scores[:, 1].astype(float))

    def calibrations(self) -> tuple[Calibration, Calibration] | None:
        """Calibration without a temperature and with one; None where scores are not those of labels of the samples.

        It is the temperature that the scores have. Without one, the scores of each half of the samples get that which
        was fitted on the other half.
        """
        exclude, own = self.scoring.classes_exclude, self.calibration()
        whole = [self._scores.get(label, ((), ())) for label in self.labels]
        is_of_labels = exclude or self.scoring.unit == "labels"
        if own is None or not is_of_labels or any(len(scores) != len(self.samples) for scores, _ in whole):
            return None
        scores, truth = (np.stack([one[side] for one in whole], axis=1) for side in (0, 1))
        known = np.clip(scores.astype(float), _LEAST, 1 - _LEAST)
        logits = np.log(known) if exclude else np.log(known) - np.log1p(-known)
        if self.temperature is None:
            after = cross_fitted(logits, truth, exclude=exclude, groups=self.groups)
            other = scores_calibration(after, truth, exclude=exclude)
            return None if other is None else (own, other)
        plain_scores = probabilities(logits * self.temperature, exclude=exclude)
        other = scores_calibration(plain_scores, truth, exclude=exclude)
        return None if other is None else (other, own)

    def slices(self, by: Sequence[str] | None = None) -> list[Slice]:
        """The metric of samples that have something in common, with an interval each.

        Args:
            by: columns, such as `folder`, `brightness`, or any of the table that the data came from; None means all.

        Raises:
            UnknownNameError: no sample has such a column.
        """
        known = tuple(dict.fromkeys(name for one in self.samples for name in one.columns))
        if unknown := [name for name in by or () if name not in known]:
            raise UnknownNameError("column", unknown[0], known)
        columns = [{name: one.columns[name] for name in by or known if name in one.columns} for one in self.samples]
        found = []
        for column, slices in sliced(columns).items():
            for value, rows in slices:
                of_slice = self.interval(rows, times=200)
                found.append(Slice(column, value, len(rows), of_slice.value, of_slice.low, of_slice.high))
        return found

    def to_dict(self, slices_by: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain values for JSON: metrics, the interval, classes, and each sample with its prediction.

        Args:
            slices_by: as `slices`.
        """
        result, table, both = self.interval(), self.calibration(), self.calibrations()
        return {
            "part": self.part,
            "metrics": {name: number_or_null(value) for name, value in self.metrics.items()},
            "result": plain(result._asdict()),
            "labels": list(self.labels),
            "confusion_matrix": self.confusion_matrix().tolist() if self.has_classes else None,
            "classes": list(self.classes),
            "per_class": [plain(one._asdict()) for one in self.per_class()],
            "average_precision": {one.label: number_or_null(one.average_precision) for one in self.curves()},
            "calibration_error": None if table is None else number_or_null(table.error),
            "temperature": self.temperature,
            "calibration_error_before": None if both is None else number_or_null(both[0].error),
            "calibration_error_after": None if both is None else number_or_null(both[1].error),
            "slices": [plain(one._asdict()) for one in self.slices(slices_by)],
            "samples": [plain(one.to_dict()) for one in self.samples],
        }


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null."""
    if isinstance(value, float):
        return number_or_null(value)
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value
