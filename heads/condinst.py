"""A dense head for objects with masks: at each place also the weights of a small network that draws the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtask.core.feature_info import FeatureInfo
from flashtask.heads.detection import DetectionHead, tower

__all__ = ["MASK_LAYERS", "NUM_PARAMETERS", "CondInstHead"]

#: Channels of the mask features.
_CHANNELS = 8
#: Inputs and outputs of each layer of the network that draws a mask; the first takes two coordinates too.
MASK_LAYERS = ((_CHANNELS + 2, _CHANNELS), (_CHANNELS, _CHANNELS), (_CHANNELS, 1))
#: Weights and biases of that network: 169.
NUM_PARAMETERS = sum(before * after + after for before, after in MASK_LAYERS)


class CondInstHead(DetectionHead):
    """A `DetectionHead` with masks (Tian et al., Conditional Convolutions for Instance Segmentation, 2020).

    Each place predicts the weights of three layers of 1 x 1 convolutions. These draw the mask of the object at the
    place from features that all objects share and from the distance of each pixel to the place.

    Args:
        features: of a backbone that gives maps.
        num_outputs: classes; the background is not one.
        width: as of `DetectionHead`.
        depth: as of `DetectionHead`; the tower of the mask features has as many convolutions.
        least_stride: as of `DetectionHead`; masks are drawn in steps of so many pixels, and enlarged.

    Shape: a list of maps to a dictionary: `maps` as of `DetectionHead`; `controllers`, a map (B, 169, H, W) for each of
        `strides`; and `features` (B, 8, H, W) at the least stride.
    """

    def __init__(
        self, features: FeatureInfo, num_outputs: int, *, width: int = 128, depth: int = 2, least_stride: int = 8
    ) -> None:
        super().__init__(features, num_outputs, width=width, depth=depth, least_stride=least_stride)
        self.controller = nn.Conv2d(width, NUM_PARAMETERS, 3, padding=1)
        nn.init.normal_(self.controller.weight, std=0.01)
        # Around weights as those of any new layer: products of three that are nearly 0 would hardly learn.
        layers = [nn.Conv2d(before, after, 1) for before, after in MASK_LAYERS]
        weights = [part.detach().flatten() for layer in layers for part in layer.parameters()]
        self.controller.bias = nn.Parameter(torch.cat(weights))
        self.mask_tower = nn.Sequential(*tower(width, depth), nn.Conv2d(width, _CHANNELS, 1))

    def forward(self, maps: list[Tensor]) -> dict[str, Any]:  # type: ignore[override]
        """Distances, logits, weights of the masks, and mask features."""
        found, controllers = [], []
        levels = self.pyramid(maps)
        for place, level in enumerate(levels):
            of_boxes = self.box_tower(level)
            found.append(self.answer(place, self.class_tower(level), of_boxes))
            controllers.append(self.controller(of_boxes))
        return {"maps": found, "controllers": controllers, "features": self.mask_tower(levels[0])}
