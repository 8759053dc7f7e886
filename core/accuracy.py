"""`Accuracy`: the share of samples whose most probable class is the right one, without what torchmetrics brings along.

It equals `torchmetrics.classification.MulticlassAccuracy(average="micro")`, whose import takes as long as torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Accuracy"]


class Accuracy(nn.Module):
    """A metric of class indices: `update` with each batch, then `compute`, then `reset`.

    What it has counted is in no state dict. The engine asks it for the same attributes as a metric of torchmetrics.

    Args:
        num_classes: how many there are.
    """

    correct: Tensor
    total: Tensor
    _update_count: int

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._defaults: dict[str, Tensor] = {"correct": torch.tensor(0), "total": torch.tensor(0)}
        self._forward_cache: Any = None
        self._computed: Any = None
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where it counts: that of the last batch."""
        return self.correct.device

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            outputs: a number for each class, (B, classes); the largest counts.
            targets: class indices, (B,).
        """
        right = (outputs.argmax(dim=1) == targets).sum()
        self.correct = self.correct.to(right.device) + right
        self.total = self.total.to(right.device) + len(targets)
        self._update_count += 1

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Count a batch; the accuracy of that batch alone."""
        self.update(outputs, targets)
        share = (outputs.argmax(dim=1) == targets).float().mean()
        self._forward_cache = share
        return share

    def compute(self) -> Tensor:
        """The accuracy of all batches since the last `reset`, over all processes; 0 if there were none."""
        counts = torch.stack([self.correct, self.total])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        share: Tensor = counts[0].float() / counts[1].clamp(min=1).float()
        return share

    def reset(self) -> None:
        """Forget all counts, as at the start of an epoch."""
        self.correct, self.total = (value.clone() for value in self._defaults.values())
        self._update_count = 0
