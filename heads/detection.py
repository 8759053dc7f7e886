"""A dense head for boxes, without anchors: at each place of a feature pyramid a box and the scores of its classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo
from flashtask.core.number_checks import is_whole
from flashtask.heads.feature_pyramid import FeaturePyramid

__all__ = ["DetectionHead", "tower"]

#: The score that every class has before training, so that the many empty places do not drown the first steps.
_PRIOR = 0.01
#: A box before training reaches so many strides to each side: the middle of the sizes that a level is given.
_REACH = 4.0
#: Channels in a group of a GroupNorm, whose statistics do not depend on how many images are in a batch.
_GROUP = 16


class DetectionHead(nn.Module):
    """Two towers of convolutions over a feature pyramid, shared by its levels (Tian et al., FCOS, 2019).

    The score of a class is trained to be the overlap of the box with the object (Li et al., Generalized Focal Loss,
    2020), so there is no branch for centre-ness, and boxes are ranked by class and place at once.

    Args:
        features: of a backbone that gives maps.
        num_outputs: classes; the background is not one.
        width: channels of the pyramid and the towers, a multiple of 16.
        depth: convolutions in each tower.
        least_stride: pixels between the places of the finest level; 4 finds smaller objects, and takes four times the
            time.

    Shape: a list of maps to a list of maps (B, 4 + num_outputs, H, W), one for each of `strides`: distances from the
        middle of a pixel to the left, upper, right and lower edge of the box in pixels of the image, then logits.
    """

    takes = "maps"

    def __init__(
        self, features: FeatureInfo, num_outputs: int, *, width: int = 128, depth: int = 2, least_stride: int = 8
    ) -> None:
        super().__init__()
        if not is_whole(width) or width % _GROUP or not is_whole(depth, 0) or not is_whole(least_stride):
            raise UsageError(
                f"width must be a multiple of {_GROUP}, depth and least_stride whole numbers, "
                f"not width={width!r}, depth={depth!r}, least_stride={least_stride!r}"
            )
        self.pyramid = FeaturePyramid(features, width, least_stride=least_stride)
        self.strides = self.pyramid.strides
        self.class_tower, self.box_tower = tower(width, depth), tower(width, depth)
        self.classes = nn.Conv2d(width, num_outputs, 3, padding=1)
        self.boxes = nn.Conv2d(width, 4, 3, padding=1)
        #: Of each level, how far its boxes reach, in powers of e.
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for layer in (self.classes, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Distances and logits of each level."""
        levels = self.pyramid(maps)
        return [self.answer(n, self.class_tower(level), self.box_tower(level)) for n, level in enumerate(levels)]

    def answer(self, place: int, of_classes: Tensor, of_boxes: Tensor) -> Tensor:
        """Distances and logits of one level, from what the towers make of it."""
        # Beyond these limits a box is larger than any picture, and its exponent overflows in half precision.
        size = (self.boxes(of_boxes) * self.scales[place]).clamp(-6, 4)
        return torch.cat([size.exp() * (_REACH * self.strides[place]), self.classes(of_classes)], dim=1)


def tower(width: int, depth: int) -> nn.Sequential:
    """Convolutions that keep the width, each with a GroupNorm and a ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(width // _GROUP, width), nn.ReLU()]
    return nn.Sequential(*layers)
