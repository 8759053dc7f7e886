"""Samplers by name: which training samples an epoch has, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Sampler

from flashtask.core.errors import BadDataError, UnknownNameError, UsageError
from flashtask.core.seeded_sampler import EpochSampler, WeightedSampler

__all__ = ["SAMPLERS", "SamplerLike", "balanced_sampler", "check_sampler", "weighted_sampler"]

#: A name in SAMPLERS, or a sampler of torch's kind.
SamplerLike = str | Sampler[int]

SAMPLERS = {
    "balanced": "every class equally often on average, with replacement",
    "weighted": "in proportion to the numbers of weight_field, with replacement",
}


def check_sampler(sampler: object) -> None:
    """Refuse what is neither None, one of SAMPLERS nor a sampler.

    Raises:
        UnknownNameError: with the nearest names.
        UsageError: something else.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise UnknownNameError("sampler", sampler, SAMPLERS)
    elif isinstance(sampler, Sampler):
        EpochSampler(sampler)
    elif sampler is not None:
        raise UsageError(f"sampler must be {', '.join(SAMPLERS)} or a torch sampler, not {sampler!r}")


def balanced_sampler(targets: np.ndarray[Any, Any] | None) -> WeightedSampler:
    """Draws as many samples as there are, with equal chances for the classes.

    Args:
        targets: class indices (N,); None if the samples have targets of another kind.

    Raises:
        UsageError: there are no class indices.
    """
    if targets is None:
        raise UsageError(
            'sampler="balanced" needs one label per image',
            fix='sampler="weighted" with weight_field, or a torch sampler',
        )
    counts = np.bincount(targets)
    return WeightedSampler(1 / counts[targets])


def weighted_sampler(weights: np.ndarray[Any, Any] | None) -> WeightedSampler:
    """Draws samples by their weights, which the loss then does not use.

    Raises:
        UsageError: there are none.
        BadDataError: all are 0.
    """
    if weights is None:
        raise UsageError('sampler="weighted" needs weights of the samples', fix='weight_field="COLUMN", for a table')
    if not weights.any():
        raise BadDataError("the weights of all training samples are 0")
    return WeightedSampler(weights)
