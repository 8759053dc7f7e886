"""One pass over the frozen part of a module: the features that it gives for every sample, each once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtask.core.errors import UsageError

__all__ = ["FeaturePass", "FrozenFeatures"]


class FrozenFeatures(NamedTuple):
    """What stands in a batch for its inputs, where the frozen part has been run on them already.

    Args:
        values: the features, (B, ...).
    """

    values: Tensor


class FeaturePass:
    """Collects what a module's `frozen_features` gives for batches, on the CPU in float32.

    Args:
        module: offers `frozen_features(batch)`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: Any) -> None:
        """Take a batch, in eval mode; the caller has moved it and set the number format.

        Raises:
            UsageError: `frozen_features` gave no features and targets of the same number of samples.
        """
        self.module.eval()
        given = self.module.frozen_features(batch)
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(one, Tensor) for one in given)):
            raise self._wrong(f"gave {type(given).__name__}")
        features, targets = given
        if not features.ndim or features.shape[:1] != targets.shape[:1]:
            raise self._wrong(f"gave features {tuple(features.shape)} and targets {tuple(targets.shape)}")
        self._features.append(features.detach().to("cpu", torch.float32))
        self._targets.append(targets.detach().to("cpu"))

    def collected(self) -> tuple[Tensor, Tensor]:
        """Features (N, ...) and targets (N, ...) of all batches so far, in the order of the pass."""
        return torch.cat(self._features), torch.cat(self._targets)

    def _wrong(self, what: str) -> UsageError:
        return UsageError(
            f"{type(self.module).__name__}.frozen_features {what}",
            why="features and targets of every sample of the batch are needed",
            fix="return self.backbone(inputs), targets",
        )
