"""One pass over the frozen part of a module: the features that it gives for every sample, each once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtask.core.errors import UsageError

__all__ = ["FeaturePass", "FrozenFeatures", "rows_of_all"]

#: Bytes that one process sends to the others at a time.
_PIECE = 1 << 25


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

    def collected(self, strategy: Any) -> tuple[Tensor, Tensor]:
        """Features (N, ...) and targets (N, ...) of all batches so far, in the order of the pass.

        Args:
            strategy: of the run; every process is given what all of them have collected.
        """
        sizes = strategy.gather([len(batch) for batch in self._features])
        kept = (torch.cat(batches) if batches else None for batches in (self._features, self._targets))
        features, targets = (_in_turn(rows_of_all(strategy, rows), sizes) for rows in kept)
        return features, targets

    def _wrong(self, what: str) -> UsageError:
        return UsageError(
            f"{type(self.module).__name__}.frozen_features {what}",
            why="features and targets of every sample of the batch are needed",
            fix="return self.backbone(inputs), targets",
        )


def rows_of_all(strategy: Any, rows: Tensor | None) -> list[Tensor | None]:
    """The rows that each process has, in the order of their ranks; they are sent in pieces, to save memory.

    Args:
        strategy: over whose processes.
        rows: of this process, on the CPU, (N, ...), N >= 1; None if it has none.
    """
    if strategy.world_size == 1:
        return [rows]
    lengths = strategy.gather(0 if rows is None else len(rows))
    size = strategy.reduce(_PIECE if rows is None else max(1, _PIECE * len(rows) // max(1, rows.nbytes)), "min")
    parts: list[list[Tensor]] = [[] for _ in lengths]
    for first in range(0, max(lengths), size):
        # A part of a tensor would be sent with all that it is a part of.
        own = None if rows is None else rows[first : first + size].clone()
        for kept, part in zip(parts, strategy.gather(own), strict=True):
            if part is not None:
                kept.append(part)
    return [torch.cat(kept) if kept else None for kept in parts]


def _in_turn(by_process: Sequence[Tensor | None], sizes: Sequence[Sequence[int]]) -> Tensor:
    """The rows of the first batch of all processes, then those of the second, ...: the order of the data."""
    batches = [
        () if rows is None else torch.split(rows, list(own)) for rows, own in zip(by_process, sizes, strict=True)
    ]
    return torch.cat([part for parts in zip_longest(*batches) for part in parts if part is not None])
