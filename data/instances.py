"""`InstanceTable` and `InstanceReader`: boxes with the pixels of each object, and what a model gets of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flashtask.data.boxes import BoxReader, BoxTable
from flashtask.data.instance_drawing import draw_instances
from flashtask.data.samples import Column
from flashtask.data.shapes import Block, shape_block

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["InstanceReader", "InstanceTable", "layers_of"]


@dataclass(frozen=True, eq=False)
class InstanceTable(BoxTable):
    """The objects of N images, M in all, in columns that worker processes share.

    Args:
        shapes: (M,) text, the JSON of each object's polygons or run lengths; see `data/shapes.py`. An area of 0 is to
            be counted from these.
    """

    shapes: Column

    def told(self, row: int) -> bytes:
        """Boxes, crowds and shapes of an image, for a digest."""
        return super().told(row) + "\0".join(self.shapes[self.of(row)].tolist()).encode()


@dataclass(frozen=True)
class InstanceReader(BoxReader):
    """Objects with a label, a box and a mask each.

    Args:
        table: the objects of this data; a checkpoint does not hold them.
    """

    kind = "instances"

    table: InstanceTable | None = field(default=None, repr=False, compare=False)

    @property
    def _instances(self) -> InstanceTable:
        return cast("InstanceTable", self._table)

    def target(self, value: Any, size: tuple[int, int]) -> dict[str, Any]:
        """As of boxes, with `masks` (L, H, W) and `numbers` (n,).

        The pixels of an object have its number in one of the L layers, which are as few as objects lie over each other.
        That takes less memory than a mask for each. Crowds have no pixels there. `in_file` has the `shapes` of all.
        """
        from torchvision import tv_tensors

        found = super().target(value, size)
        table = self._instances
        own = table.of(int(value))
        texts, crowds = table.shapes[own].tolist(), table.is_crowd[own].tolist()
        blocks = [None if is_crowd else shape_block(text, size) for text, is_crowd in zip(texts, crowds, strict=True)]
        masks = tv_tensors.Mask(torch.from_numpy(layers_of(blocks, size)))
        in_file = {**found["in_file"], "shapes": texts}
        return {**found, "masks": masks, "numbers": torch.arange(1, len(texts) + 1), "in_file": in_file}

    def finished(self, target: Any) -> dict[str, Any]:
        """Boxes clipped to the input, without those of which less than a quarter is left; their numbers remain."""
        numbered = super().finished({**target, "labels": target["numbers"]})
        kept = numbered["labels"]
        masks = target["masks"].as_subclass(torch.Tensor)
        return {**numbered, "masks": masks, "labels": target["labels"][kept - 1], "numbers": kept}

    def draw(self, image: Image, target: Any) -> Image:
        """The objects in colours of their own, with their labels."""
        labels, boxes = target["labels"].tolist(), target["boxes"].tolist()
        blocks = [Block(0, 0, (target["masks"] == number).any(0).numpy()) for number in target["numbers"].tolist()]
        shown = [self._name(one) for one in labels]
        return draw_instances(image, blocks, boxes, shown)

    def describe(self) -> str:
        """How many classes there are."""
        return f"masks of objects of {len(self.labels)} class{'es' if len(self.labels) != 1 else ''}"


def layers_of(blocks: Iterable[Block | None], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Objects numbered from 1 in as few layers (L, H, W) int32 as have no object over another; at least one.

    Args:
        blocks: the pixels of each object; None for one that has none, whose number is left out.
        size: (width, height) of the picture.
    """
    layers = [np.zeros(size[::-1], dtype=np.int32)]
    for number, block in enumerate(blocks, 1):
        if block is None or not block.inside.size:
            continue
        parts = (layer[block.place] for layer in layers)
        own = next((part for part in parts if not part[block.inside].any()), None)
        if own is None:
            layers.append(np.zeros_like(layers[0]))
            own = layers[-1][block.place]
        own[block.inside] = number
    return np.stack(layers)
