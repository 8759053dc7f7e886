"""`SpatialReader`: targets that are places in the image, such as masks, boxes and keypoints, and move with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.utils.data import default_collate

from flashtask.data.geometry import each_tv_tensor
from flashtask.data.targets import TargetReader

__all__ = ["SpatialReader"]


class SpatialReader(TargetReader):
    """Base of readers whose targets go through the transforms of the image.

    `read` gives a row a sample that says where its target is or what it is: the path of a mask, coordinates. `target`
    makes tv_tensors of a row when the sample is loaded; they are resized, cropped, flipped and padded with the image.
    """

    #: Value of a mask beside the picture, where the image is padded.
    fill: ClassVar[int] = 0
    #: Whether the targets of all samples have the same shapes, so that those of a batch are stacked. Else, as with
    #: boxes, a batch has a list of them.
    stacks: ClassVar[bool] = True

    def target(self, value: Any, size: tuple[int, int]) -> Any:
        """The target of a sample, in pixels of its upright picture.

        Args:
            value: its row of what `read` gives.
            size: (width, height) of the picture.

        Returns:
            tv_tensors (`Mask`, `BoundingBoxes`, `KeyPoints`), alone or in dictionaries, lists and tuples, beside
            whatever else belongs to the target, such as the labels of boxes. A coordinate of 0 is the left or upper
            edge of the picture; torchvision's flip of `KeyPoints` takes it for the middle of the first pixel.
        """
        raise NotImplementedError

    def finished(self, target: Any) -> Any:
        """What a batch holds of a target that lies in the model's input; by default plain tensors.

        Boxes and points may lie outside of it: `torchvision.transforms.v2.SanitizeBoundingBoxes` leaves such boxes out.
        """
        return each_tv_tensor(target, lambda one: one.as_subclass(torch.Tensor))

    def collate(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch from those of its samples."""
        return default_collate(list(targets)) if self.stacks else list(targets)
