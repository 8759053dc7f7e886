"""The head for maps that keeps fine detail: the decoder of a U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashtask.core.feature_info import FeatureInfo
from flashtask.heads.fpn import block, check_width, enlarged

__all__ = ["UNetHead"]


class UNetHead(nn.Module):
    """The decoder of a U-Net (Ronneberger et al., arXiv:1505.04597): from the coarsest map to the finest, step by step.

    Args:
        features: of the backbone.
        num_outputs: channels of the result.
        width: channels at the finest map, at least 1; each coarser one has twice as many, at most 256.
        dropout: share of channels set to 0 before the last layer in training, in [0, 1).

    Shape: maps (B, C, h, w), the finest first, to (B, num_outputs, H, W) in the pixels of the image.
    """

    takes = "maps"

    def __init__(self, features: FeatureInfo, num_outputs: int, *, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        check_width("unet", width, dropout)
        channels = list(features.channels)
        self.reduction = features.reductions[0]
        widths = [min(width * 2**place, max(width, 256)) for place in range(len(channels))]
        self.bottom = _double(channels[-1], widths[-1])
        self.steps = nn.ModuleList(
            _double(widths[place + 1] + channels[place], widths[place]) for place in reversed(range(len(channels) - 1))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(width, num_outputs, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H, W) of maps."""
        *finer, coarsest = maps
        now = self.bottom(coarsest)
        for step, one in zip(self.steps, reversed(finer), strict=True):
            larger = functional.interpolate(now, one.shape[-2:], mode="nearest")
            now = step(torch.cat([larger, one], dim=1))
        return enlarged(self.out(self.dropout(now)), self.reduction)


def _double(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(block(before, after), block(after, after))
