"""A dense head for objects with keypoints: at each place of a feature pyramid also where the keypoints are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo
from flashtask.core.number_checks import is_whole
from flashtask.heads.detection import DetectionHead, tower

__all__ = ["KeypointHead"]

#: Offsets are predicted in so many strides, about the half side of the objects of a level.
_REACH = 4.0


class KeypointHead(DetectionHead):
    """A `DetectionHead` with keypoints, each an offset from the place (Maji et al., YOLO-Pose, 2022).

    Args:
        features: of a backbone that gives maps.
        num_outputs: classes; the background is not one.
        num_keypoints: of each object; a task takes it from the data.
        width: as of `DetectionHead`.
        depth: as of `DetectionHead`; the tower of the keypoints has as many convolutions.
        least_stride: as of `DetectionHead`.

    Shape: a list of maps to a dictionary: `maps` as of `DetectionHead`; and `points`, a map (B, 3 * num_keypoints, H,
        W) for each of `strides`: x and y of each keypoint, in pixels of the image from the middle of the place, then a
        logit for each, whether it is there.
    """

    def __init__(
        self,
        features: FeatureInfo,
        num_outputs: int,
        *,
        num_keypoints: int = 17,
        width: int = 128,
        depth: int = 2,
        least_stride: int = 8,
    ) -> None:
        super().__init__(features, num_outputs, width=width, depth=depth, least_stride=least_stride)
        if not is_whole(num_keypoints):
            raise UsageError(f"num_keypoints must be a whole number of at least 1, not {num_keypoints!r}")
        self.point_tower = tower(width, depth)
        self.offsets = nn.Conv2d(width, 2 * num_keypoints, 3, padding=1)
        self.visible = nn.Conv2d(width, num_keypoints, 3, padding=1)
        for layer in (self.offsets, self.visible):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, maps: list[Tensor]) -> dict[str, Any]:  # type: ignore[override]
        """Distances and logits of boxes, and offsets and logits of keypoints, of each level."""
        found, points = [], []
        for place, level in enumerate(self.pyramid(maps)):
            found.append(self.answer(place, self.class_tower(level), self.box_tower(level)))
            of_points = self.point_tower(level)
            # Beyond these limits a keypoint is outside of any picture, and half precision overflows.
            offsets = self.offsets(of_points).clamp(-64, 64) * (_REACH * self.strides[place])
            points.append(torch.cat([offsets, self.visible(of_points)], dim=1))
        return {"maps": found, "points": points}
