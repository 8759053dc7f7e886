"""Calibration of scores by a temperature, thresholds that reach a recall or a precision, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flashtask.reports.statistics import Calibration, Interval, calibration

__all__ = [
    "UnreachableError",
    "conformal_rank",
    "cross_fitted",
    "exact_interval",
    "fitted_temperature",
    "lower_bound",
    "probabilities",
    "scores_calibration",
    "threshold_for_coverage",
    "threshold_for_precision",
    "threshold_for_recall",
]

Array = np.ndarray[Any, Any]

#: The temperatures that are considered.
_LEAST, _MOST = 0.05, 20.0
_LEVEL = 0.95


class UnreachableError(ValueError):
    """No threshold reaches a target.

    Args:
        best: the largest target that one reaches; NaN if there is none.
    """

    def __init__(self, best: float) -> None:
        super().__init__(f"at most {best:g}")
        self.best = best


# ---- temperature


def probabilities(logits: Array, *, exclude: bool) -> Array:
    """Probabilities (N, classes) of logits: those of classes that exclude each other sum to 1."""
    if not exclude:
        return np.exp(-np.logaddexp(0, -logits))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return found


def fitted_temperature(logits: Array, truth: Array, *, exclude: bool) -> float:
    """What logits are to be divided by so that the cross-entropy of their probabilities is least.

    Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        logits: (N, classes).
        truth: (N, classes) zeros and ones.
        exclude: whether one class is right for each sample; else each class is right or not.

    Returns:
        From 0.05 to 20; 1 where the cross-entropy has no minimum there, as when every sample is right.
    """

    def slope(exponent: float) -> float:
        # The cross-entropy is convex in the inverse temperature, so its slope has one zero.
        return float(((probabilities(logits * math.exp(exponent), exclude=exclude) - truth) * logits).sum())

    low, high = -math.log(_MOST), -math.log(_LEAST)
    if not len(logits) or slope(low) >= 0 or slope(high) <= 0:
        return 1.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def cross_fitted(logits: Array, truth: Array, *, exclude: bool, groups: Sequence[Any] | None = None) -> Array:
    """Probabilities of each half of the samples with the temperature that was fitted on the other half.

    Args:
        logits: (N, classes).
        truth: (N, classes) zeros and ones.
        exclude: as of `fitted_temperature`.
        groups: of the samples, which stay together; None if there are none.
    """
    units = np.arange(len(logits)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(units.max()) + 1 if len(units) else 0
    is_first = (np.random.default_rng(0).permutation(count) < count // 2)[units]
    found = np.empty(logits.shape)
    for half in (is_first, ~is_first):
        temperature = fitted_temperature(logits[~half], truth[~half], exclude=exclude)
        found[half] = probabilities(logits[half] / temperature, exclude=exclude)
    return found


def scores_calibration(scores: Array, truth: Array, *, exclude: bool) -> Calibration | None:
    """The calibration of the best class of each sample, or of every label where they do not exclude each other.

    Args:
        scores: (N, classes).
        truth: (N, classes) zeros and ones.
        exclude: whether one class is right for each sample.
    """
    if not exclude:
        return calibration(scores.ravel(), truth.ravel().astype(float))
    best = (np.arange(len(scores)), scores.argmax(axis=1))
    return calibration(scores[best], truth[best].astype(float))


# ---- thresholds


def threshold_for_recall(scores: Array, is_class: Array, target: float) -> float:
    """The split-conformal threshold: a new sample of the class reaches it with a probability of at least the target.

    That holds for any model and any number of samples, on average over validation sets, if new samples are drawn as
    those were. It is the kth smallest of the n scores of the class, with k the whole part of (n + 1)(1 - target).

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005; Angelopoulos and Bates, "A
    gentle introduction to conformal prediction", 2021.

    Args:
        scores: (N,) of the class, of all samples.
        is_class: (N,) whether a sample is of the class.
        target: above 0 and below 1.

    Raises:
        UnreachableError: there are too few samples of the class: with n, at most n / (n + 1) can be promised.
    """
    own = np.sort(scores[is_class])
    place = conformal_rank(len(own), target)
    if place < 1:
        raise UnreachableError(len(own) / (len(own) + 1))
    return _below(scores, float(own[place - 1]))


def conformal_rank(count: int, target: float) -> int:
    """The rank of the split-conformal threshold among the scores of a class, the smallest being 1; 0 for none."""
    return math.floor((count + 1) * (1 - target) + 1e-9)


def threshold_for_precision(scores: Array, is_class: Array, target: float) -> float:
    """The lowest threshold from which on the share of the target is of the class.

    Args:
        scores: (N,) of the class, of all samples.
        is_class: (N,) whether a sample is of the class.
        target: above 0 and below 1.

    Raises:
        UnreachableError: none reaches it; with the highest precision that one has.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(is_class[order])
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal scores change together
    precision = hits[last] / (last + 1)
    reaching = np.flatnonzero(precision >= target)
    if not len(reaching):
        raise UnreachableError(float(precision.max()))
    return _below(scores, float(ordered[last[reaching[-1]]]))


def threshold_for_coverage(scores: Array, target: float) -> float:
    """The highest threshold that a share of the samples reaches.

    Args:
        scores: (N,) of the best class of each sample.
        target: the share, above 0 and up to 1.
    """
    place = min(len(scores), max(1, math.ceil(len(scores) * target - 1e-9)))
    return _below(scores, float(np.sort(scores)[len(scores) - place]))


def _below(scores: Array, score: float) -> float:
    """Halfway between a score and the next lower one, so that rounding moves no sample over the threshold."""
    lower = scores[scores < score]
    return (score + (float(lower.max()) if len(lower) else 0.0)) / 2


# ---- bounds


def exact_interval(name: str, hits: int, count: int) -> Interval:
    """A share with its exact 95 % interval.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 1934.

    Args:
        name: of the share.
        hits: how many of them.
        count: how many there are.
    """
    if not count:
        return Interval(name, math.nan, math.nan, math.nan)
    tail = (1 - _LEVEL) / 2
    high = 1 - lower_bound(count - hits, count, 1 - tail)
    return Interval(name, hits / count, lower_bound(hits, count, 1 - tail), high, method="Clopper-Pearson")


def lower_bound(hits: int, count: int, level: float = _LEVEL) -> float:
    """The lower confidence bound of a share (Clopper and Pearson), by the binomial distribution.

    For the scores that reach a split-conformal threshold it is the bound on the recall given the validation set (Vovk,
    "Conditional validity of inductive conformal predictors", 2012), which is the same quantile of a beta distribution.

    Args:
        hits: how many of them.
        count: how many there are.
        level: the confidence.
    """
    if not hits:
        return 0.0
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    many = np.arange(hits, count + 1)
    ways = factorials[count] - factorials[many] - factorials[count - many]

    def at_least(share: float) -> float:
        return float(np.exp(ways + many * math.log(share) + (count - many) * math.log1p(-share)).sum())

    return _crossing(at_least, 1 - level)


def _crossing(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises from 0 to 1 between 0 and 1 has a value."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
