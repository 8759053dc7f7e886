"""Loaders that give features in the place of inputs, as long as the run's backbone is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashtask.trainer.feature_cache.sources import SampleFeatures
from flashtask.trainer.loading import OrderedBatches

__all__ = ["FeatureLoader"]


class FeatureLoader:
    """A loader of the engine's own, which gives features in the epochs in which the whole backbone is frozen.

    The samples of a batch and their order are the same; everything else is asked of the loader it stands for.

    Args:
        loader: with the engine's own order.
        features: of its samples.
        run: the fit run that says in which epochs the backbone is frozen.
    """

    def __init__(self, loader: Any, features: SampleFeatures, run: Any) -> None:
        self.loader, self.features, self.run = loader, features, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.run.epoch
        if not self.run.is_frozen(epoch):
            return iter(self.loader)
        order = self.loader.batch_sampler
        assert isinstance(order, OrderedBatches)
        return (self.features.batch(places, epoch) for places in order)
