"""`Instances`: the objects of an image with the pixels of each, as a prediction."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from flashtask.data.instance_drawing import draw_instances
from flashtask.data.masks import run_lengths
from flashtask.data.shapes import Block, shape_block, shape_text
from flashtask.tasks.prediction_files import write_image
from flashtask.tasks.predictions import Boxes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Instances"]


@dataclass(frozen=True)
class Instances(Boxes):
    """Any number of objects an image, each with a label, a box and a mask; the one with the highest score first.

    Args:
        masks: of each object, COCO's run lengths in pixels of the upright file: `size` (height, width) and `counts`.
        size: (width, height) of the file.
    """

    formats: ClassVar[tuple[str, ...]] = ("coco", "png")

    masks: tuple[Mapping[str, Any], ...]
    size: tuple[int, int]

    def mask(self, number: int) -> np.ndarray[Any, Any]:
        """The mask (height, width) bool of an object."""
        found = np.zeros(self.size[::-1], dtype=bool)
        block = self._blocks()[number]
        found[block.place] = block.inside
        return found

    @property
    def areas(self) -> tuple[int, ...]:
        """Pixels of each object."""
        return tuple(sum(run_lengths(mask["counts"], self.size)[1::2]) for mask in self.masks)

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, the number of objects as `count`, and lists of `labels`, `scores`, `boxes` and `areas` in pixels."""
        return {**super().as_row(), "areas": list(self.areas)}

    def to_dict(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """As `as_row`, with the `masks` as COCO's run lengths."""
        return {**super().to_dict(), "masks": [dict(mask) for mask in self.masks]}

    def draw(self, image: Image) -> Image:
        """A copy of a picture with each object in a colour of its own, its label and score.

        Args:
            image: the file's picture, upright, in its own size.
        """
        words = [f"{label} {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        return draw_instances(image, self._blocks(), self.boxes, words)

    def as_image(self) -> Image:
        """The label image: 0 beside all, 1 for the first object, 2 for the second, ...; better ones lie over others."""
        import PIL.Image

        values = np.zeros(self.size[::-1], dtype=np.uint8 if len(self.masks) < 256 else np.uint16)
        for number, block in reversed(list(enumerate(self._blocks(), 1))):
            values[block.place][block.inside] = number
        return PIL.Image.fromarray(values)

    @classmethod
    def write(
        cls, form: str, predictions: Iterable[Self], output: str | os.PathLike[str], names: Mapping[str, str]
    ) -> None:
        """COCO's list of results, or `output/NAME.png` for each image: a label image in the size of its file."""
        if form == "png":
            for one in predictions:
                write_image(one.as_image(), Path(output, f"{names[one.path or '']}.png"))
        else:
            super().write(form, predictions, output, names)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The image's part of COCO's list of results, as of boxes, with the `segmentation` of each object."""
        found = super().to_coco(image_id)
        return [{**one, "segmentation": dict(mask)} for one, mask in zip(found, self.masks, strict=True)]

    def _blocks(self) -> list[Block]:
        return [shape_block(shape_text(mask), self.size) for mask in self.masks]
