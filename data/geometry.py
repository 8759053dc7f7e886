"""Where a picture lies in the input that was made of it, for targets and predictions that are places in the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Geometry", "each_tv_tensor"]


@dataclass(frozen=True)
class Geometry:
    """A resize, then a crop or a padding. Sizes are (width, height) in pixels.

    Args:
        whole: of the upright picture in the user's file.
        resized: of it after the resize.
        left: columns of the resized picture that are cut off at its left; below 0 so many are added.
        top: rows that are cut off above it, or added.
        size: of the input.
    """

    whole: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    size: tuple[int, int]

    def apply(self, target: Any, fill: int = 0) -> Any:
        """What lies in the whole picture, as it lies in the input.

        Args:
            target: tv_tensors (`Mask`, `BoundingBoxes`, `KeyPoints`) of the whole picture, also in dictionaries, lists
                and tuples; all else is kept.
            fill: value of a mask beside the picture.
        """
        return each_tv_tensor(target, lambda one: self._moved(one, fill))

    def _moved(self, target: Any, fill: int) -> Any:
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        width, height = self.size
        if not isinstance(target, tv_tensors.Mask):
            resized = functional.resize(target, [self.resized[1], self.resized[0]])
            return functional.crop(resized, self.top, self.left, height, width)
        # The pixel whose middle is nearest, as for images; torchvision's own resize of masks takes the one before.
        columns, across = self._sources(width, self.left, 0)
        rows, down = self._sources(height, self.top, 1)
        moved = target[..., rows[:, None], columns]
        return tv_tensors.wrap(moved.where(down[:, None] & across, fill), like=target)

    def _sources(self, length: int, start: int, axis: int) -> tuple[Tensor, Tensor]:
        """For each pixel of the input along an axis: the pixel of the whole picture, and whether there is one."""
        import torch

        places = torch.arange(length) + start
        is_inside = (places >= 0) & (places < self.resized[axis])
        sources = ((places + 0.5) * (self.whole[axis] / self.resized[axis])).long()
        return sources.clamp(0, self.whole[axis] - 1), is_inside

    def points_in_file(self, points: Tensor) -> Tensor:
        """Points of the input as points of the user's file.

        Args:
            points: (..., 2), x and y in pixels of the input, 0 at its left and upper edge; two corners of boxes too.
        """
        offset = points.new_tensor((self.left, self.top))
        scale = points.new_tensor([whole / resized for whole, resized in zip(self.whole, self.resized, strict=True)])
        return (points + offset) * scale

    def map_in_file(
        self, maps: Tensor, mode: str = "bilinear", rows: range | None = None, columns: range | None = None
    ) -> Tensor:
        """Maps over the input as maps over the user's file; beside the input the nearest value counts.

        Args:
            maps: (C, h, w) floats, over the whole input at any resolution.
            mode: `bilinear`, or `nearest` for numbers of classes.
            rows: of the file, for a part of a large one; all if not given.
            columns: of the file; all if not given.

        Returns:
            (C, height, width) of the file, or of its rows and columns.
        """
        import torch

        axes = []
        parts = (range(self.whole[0]) if columns is None else columns, range(self.whole[1]) if rows is None else rows)
        for part, whole, resized, start, length in zip(
            parts, self.whole, self.resized, (self.left, self.top), self.size, strict=True
        ):
            pixels = torch.arange(part.start, part.stop, device=maps.device, dtype=maps.dtype)
            middles = (pixels + 0.5) * (resized / whole) - start
            axes.append(middles * (2 / length) - 1)
        down, across = torch.meshgrid(axes[1], axes[0], indexing="ij")
        grid = torch.stack([across, down], dim=-1)[None]
        return torch.nn.functional.grid_sample(maps[None], grid, mode, "border", align_corners=False)[0]


def each_tv_tensor(target: Any, change: Callable[[Any], Any]) -> Any:
    """A structure with `change` of every tv_tensor in it; all else is kept."""
    from torchvision import tv_tensors

    if isinstance(target, tv_tensors.TVTensor):
        return change(target)
    if isinstance(target, Mapping):
        return {name: each_tv_tensor(value, change) for name, value in target.items()}
    if isinstance(target, (list, tuple)):
        return type(target)(each_tv_tensor(value, change) for value in target)
    return target
