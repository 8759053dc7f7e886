"""A feature pyramid over the maps of a backbone, for heads that answer at several scales."""

from __future__ import annotations

from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo

__all__ = ["FeaturePyramid"]


class FeaturePyramid(nn.Module):
    """Maps of one width at strides that double, each with what the coarser ones know (Lin et al., 2017).

    The maps of the backbone from `least_stride` on are taken; coarser levels are made of the last by strided
    convolutions, up to `most_stride` (P6 of Tian et al., FCOS, 2019).

    Args:
        features: of the backbone.
        width: channels of every level.
        least_stride: pixels of the image in a pixel of the finest level, along one side.
        most_stride: of the coarsest.

    Shape: a list of maps (B, C, H, W) to a list of maps (B, width, H, W), the finest first.
    """

    def __init__(self, features: FeatureInfo, width: int, *, least_stride: int = 8, most_stride: int = 64) -> None:
        super().__init__()
        self.taken = [
            place for place, stride in enumerate(features.reductions) if least_stride <= stride <= most_stride
        ]
        if not self.taken:
            raise UsageError(
                f"the backbone has maps at strides {features.reductions}, none from {least_stride} to {most_stride}",
                fix='head_options={"least_stride": 4}',
            )
        self.strides = tuple(features.reductions[place] for place in self.taken)
        self.lateral = nn.ModuleList(nn.Conv2d(features.channels[place], width, 1) for place in self.taken)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.taken)
        self.coarser = nn.ModuleList()
        while self.strides[-1] * 2 <= most_stride:
            self.coarser.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            self.strides = (*self.strides, self.strides[-1] * 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """A level for each of `strides`."""
        levels = [lateral(maps[place]) for lateral, place in zip(self.lateral, self.taken, strict=True)]
        for place in range(len(levels) - 1, 0, -1):
            size = levels[place - 1].shape[-2:]
            levels[place - 1] = levels[place - 1] + nn.functional.interpolate(levels[place], size, mode="nearest")
        found = [output(level) for output, level in zip(self.output, levels, strict=True)]
        for coarser in self.coarser:
            found.append(coarser(found[-1].relu()))
        return found
