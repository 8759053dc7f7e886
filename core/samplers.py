"""Samplers whose indices are drawn from (seed, epoch), so that processes share them and a run resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler

from flashtask.core.errors import UsageError
from flashtask.core.seeding import derive_seed, seeded_generators

__all__ = ["EpochSampler", "WeightedSampler"]


class EpochSampler(Sampler[int]):
    """Lets the engine draw a sampler's indices from (seed, epoch): a fit resumes exactly and shares them.

    Outside of the engine its indices are those of the sampler, as it draws them itself.

    Args:
        sampler: has a length and gives indices of the dataset. What it draws from the global generators or from its own
            `generator` depends on (seed, epoch) alone; its `set_epoch` is called if it has one.

    Raises:
        UsageError: it has no length, or it shares samples over processes itself.
    """

    def __init__(self, sampler: Sampler[int]) -> None:
        if not hasattr(sampler, "__iter__") or not hasattr(sampler, "__len__"):
            raise UsageError(f"a sampler gives indices and has a length, and {sampler!r} does not")
        if isinstance(sampler, DistributedSampler):
            raise UsageError(
                "a DistributedSampler shares samples over processes, which the trainer does itself",
                fix="leave it out, or give the sampler that it stands for",
            )
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def indices(self, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The indices of an epoch, the same in every process.

        Raises:
            UsageError: there are not as many as its length says.
        """
        drawn_from = derive_seed("sampler", seed, epoch)
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(epoch)
        if isinstance(own := getattr(self.sampler, "generator", None), torch.Generator):
            own.manual_seed(drawn_from)
        with seeded_generators(drawn_from):
            indices = np.fromiter((int(index) for index in self.sampler), dtype=np.int64)
        if len(indices) != len(self):
            raise UsageError(f"the sampler gave {len(indices)} samples, but its length is {len(self)}")
        return indices


class WeightedSampler(Sampler[int]):
    """As many samples as there are, drawn with replacement, each in proportion to its weight.

    Args:
        weights: (N,), 0 or more, not all of them 0.
    """

    def __init__(self, weights: np.ndarray[Any, Any]) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)

    def __iter__(self) -> Iterator[int]:
        bounds = np.cumsum(self.weights)
        places = torch.rand(len(bounds), dtype=torch.float64).numpy() * bounds[-1]
        yield from np.searchsorted(bounds, places, side="right").tolist()

    def __len__(self) -> int:
        return len(self.weights)
