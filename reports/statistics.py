"""Numbers about judged samples: confusion matrix, classes, intervals, curves, calibration, slices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Calibration",
    "ClassCounts",
    "Curve",
    "Interval",
    "Slice",
    "calibration",
    "class_counts",
    "draws",
    "ends_of",
    "mean_f1",
    "mean_iou",
    "precision_recall",
    "share_right",
    "sliced",
    "thinned",
]

Array = np.ndarray[Any, Any]

_LEVEL = 0.95
#: Counts of samples that are in memory at a time.
_AT_ONCE = 2_000_000
_BINS = 10
#: Points of a curve that are drawn.
_POINTS = 120


class Interval(NamedTuple):
    """A metric with the range in which it would lie on other samples like these.

    Args:
        name: of the metric.
        value: of all samples.
        low: the lower end; NaN if there are too few samples to say.
        high: the upper end.
        level: the share of such ranges that hold the true value.
        method: how it was found, in words.
    """

    name: str
    value: float
    low: float
    high: float
    level: float = _LEVEL
    method: str = ""


class ClassCounts(NamedTuple):
    """A class in a table.

    Args:
        label: its name.
        support: how much there is of it in truth.
        precision: the share of what was predicted as this class that is; NaN if nothing was.
        recall: the share of what is of this class that was predicted so; NaN if nothing is.
        f1: of the two; NaN if it neither is there nor was predicted.
        iou: what is both over what is either; as `f1`.
    """

    label: str
    support: float
    precision: float
    recall: float
    f1: float
    iou: float


class Curve(NamedTuple):
    """Precision and recall of a class at every threshold.

    Args:
        label: the class.
        thresholds: falling.
        precision: at each.
        recall: at each, rising.
        average_precision: the area under the steps.
        best: the threshold with the highest F1.
    """

    label: str
    thresholds: Array
    precision: Array
    recall: Array
    average_precision: float
    best: float


class Calibration(NamedTuple):
    """Whether scores are probabilities.

    Args:
        counts: scores in each of ten bins of equal width.
        scores: their mean in each bin; NaN for an empty one.
        right: the share of them that were right.
        error: the expected calibration error: the mean distance of the two over all scores.
    """

    counts: Array
    scores: Array
    right: Array
    error: float


class Slice(NamedTuple):
    """Some of the samples.

    Args:
        column: what they have in common.
        value: in words.
        size: how many there are.
        result: the metric on them.
        low: the lower end of its interval.
        high: the upper end.
    """

    column: str
    value: str
    size: int
    result: float
    low: float
    high: float


# ---- metrics of sums over samples: what is right of each class, what there is of it, what was predicted so


def share_right(hits: Array, there: Array, said: Array) -> Array:
    """The share that is right; NaN of nothing. All take (K, ...) and give (...)."""
    return _share(hits.sum(axis=0), there.sum(axis=0))


def mean_f1(hits: Array, there: Array, said: Array) -> Array:
    """The mean of F1 over the classes that occur or were predicted."""
    return _mean_over_classes(2 * hits, there + said)


def mean_iou(hits: Array, there: Array, said: Array) -> Array:
    """The mean of intersection over union, of the same classes."""
    return _mean_over_classes(hits, there + said - hits)


def _mean_over_classes(part: Array, whole: Array) -> Array:
    occurs = whole > 0
    return _share(np.where(occurs, _share(part, whole), 0.0).sum(axis=0), occurs.sum(axis=0))


def _share(part: Array, whole: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(whole > 0, np.true_divide(part, whole), np.nan)
    return found


def class_counts(matrix: Array, labels: Sequence[str]) -> list[ClassCounts]:
    """Precision, recall and F1 of each class of a matrix (K + 1, K + 1), whose last row and column are no class."""
    hits, there, said = matrix.diagonal()[:-1], matrix.sum(axis=1)[:-1], matrix.sum(axis=0)[:-1]
    columns = (there, _share(hits, said), _share(hits, there), _share(2 * hits, there + said))
    whole = zip(labels, *(one.tolist() for one in (*columns, _share(hits, there + said - hits))), strict=True)
    return [ClassCounts(*row) for row in whole]


def draws(groups: Sequence[Any] | None, count: int, times: int, seed: int = 0) -> Iterator[Array]:
    """How often each of some samples counts in resamples of as many: (count, draws), until there are so many draws.

    Args:
        groups: of the samples, which are drawn as a whole; None draws samples.
        count: of the samples.
        times: draws.
        seed: of them.
    """
    generator = np.random.default_rng(seed)
    places = np.arange(count) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(places.max()) + 1
    at_once = max(1, _AT_ONCE // count)
    for start in range(0, times, at_once):
        own = min(at_once, times - start)
        drawn = generator.integers(0, units, (own, units)) + np.arange(own)[:, None] * units
        often = np.bincount(drawn.ravel(), minlength=own * units).reshape(own, units)
        yield often[:, places].T.astype(np.float32)


def ends_of(values: Array) -> tuple[float, float]:
    """The ends of the middle 95 % of the values that are numbers."""
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


# ---- scores


def precision_recall(label: str, scores: Array, right: Array, total: float) -> Curve | None:
    """The curve of one class.

    Args:
        label: the class.
        scores: (n,) of all that might be of the class.
        right: (n,) whether it is.
        total: how many there are in truth.

    Returns:
        None without a score or without anything to find.
    """
    if not len(scores) or not total:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(right[order])
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal scores change together
    found, said = hits[last].astype(float), (last + 1).astype(float)
    precision, recall = found / said, found / total
    area = float((np.diff(np.concatenate([[0.0], recall])) * precision).sum())
    best = float(ordered[last][np.argmax(2 * found / (said + total))])
    return Curve(label, ordered[last], precision, recall, area, best)


def thinned(curve: Curve) -> Curve:
    """The same curve with few points, those at its ends among them."""
    if len(curve.recall) <= _POINTS:
        return curve
    rows = np.unique(np.linspace(0, len(curve.recall) - 1, _POINTS).round().astype(int))
    return curve._replace(thresholds=curve.thresholds[rows], precision=curve.precision[rows], recall=curve.recall[rows])


def calibration(scores: Array, right: Array) -> Calibration | None:
    """How often what got a score was right; None without scores."""
    if not len(scores):
        return None
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    with np.errstate(invalid="ignore"):
        means, shares = (np.bincount(bins, weights=one, minlength=_BINS) / counts for one in (scores, right))
    known = counts > 0
    error = float((counts[known] * np.abs(means - shares)[known]).sum() / len(scores))
    return Calibration(counts, means, shares, error)


# ---- slices


def sliced(
    columns: Sequence[Mapping[str, Any]], least: int = 5, most: int = 12
) -> dict[str, list[tuple[str, list[int]]]]:
    """The samples that have a value of a column in common, by column: numbers in four ranges with equally many.

    Args:
        columns: of each sample; those that have a column in common are compared.
        least: samples of a slice.
        most: slices of a column, the largest first.
    """
    names = dict.fromkeys(name for one in columns for name in one)
    found = {}
    for name in names:
        rows = [row for row, one in enumerate(columns) if name in one]
        values = [columns[row][name] for row in rows]
        is_number = all(isinstance(value, (int, float)) for value in values) and len(set(values)) > most
        slices = _ranges(rows, values) if is_number else _values(rows, values)
        slices = [one for one in slices if len(one[1]) >= least]
        if len(slices) > 1:
            found[name] = slices if is_number else slices[:most]
    return found


def _values(rows: Sequence[int], values: Sequence[Any]) -> list[tuple[str, list[int]]]:
    found: dict[str, list[int]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        found[str(value)].append(row)
    return sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))


def _ranges(rows: Sequence[int], values: Sequence[float]) -> list[tuple[str, list[int]]]:
    ends = np.unique(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    places = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, max(0, len(ends) - 2))
    return [
        (f"{ends[place]:,.6g} to {ends[place + 1]:,.6g}", [rows[i] for i in np.flatnonzero(places == place).tolist()])
        for place in range(len(ends) - 1)
    ]
