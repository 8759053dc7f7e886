"""Loaders that give features in the place of inputs, as long as the run's backbone is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashtask.trainer.feature_cache.sources import SampleFeatures
from flashtask.trainer.loading import OrderedBatches

__all__ = ["FeatureLoader"]

#: Products in the forward pass of a step: with the gradients, some milliseconds of one thread.
_SMALL = 1 << 25


class FeatureLoader:
    """A loader of the engine's own, which gives features in the epochs in which the whole backbone is frozen.

    The samples of a batch and their order are the same; everything else is asked of the loader it stands for.

    Args:
        loader: with the engine's own order.
        features: of its samples.
        epoch: whose features are wanted now; None where the inputs themselves are.
        only_known: give features only if they need not be computed.
    """

    def __init__(
        self, loader: Any, features: SampleFeatures, epoch: Callable[[], int | None], only_known: bool = False
    ) -> None:
        self.loader, self.features, self.epoch, self.only_known = loader, features, epoch, only_known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch()
        if epoch is not None:
            self.features.renew()
        if epoch is None or (self.only_known and not self.features.are_known(epoch)):
            return iter(self.loader)
        return self._features_of(epoch)

    def _features_of(self, epoch: int) -> Iterator[Any]:
        order = self.loader.batch_sampler
        assert isinstance(order, OrderedBatches)
        self.features.prepare(epoch)
        with _fitting_threads(self.features.run, order.own_size):
            for places in order:
                yield self.features.batch(places, epoch)


@contextmanager
def _fitting_threads(run: Any, batch_size: int) -> Iterator[None]:
    """One thread for steps on features that are too small to be shared: on a busy machine they would wait for others.

    With both cores of two in use elsewhere, a step of a linear head on a batch of 32 took 90 ms with two threads, and
    less than 3 ms with one.
    """
    threads = torch.get_num_threads()
    frozen = {p for part in run.module.modules_to_freeze() for p in part.parameters()}
    products = batch_size * sum(p.numel() for p in run.module.parameters() if p not in frozen)
    if run.device.type != "cpu" or threads == 1 or products > _SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
