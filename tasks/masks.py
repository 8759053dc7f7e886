"""`Mask`: the class of each pixel of an image, as a prediction."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from flashtask.data.masks import overlay, rle_counts
from flashtask.tasks.prediction_files import write_image
from flashtask.tasks.predictions import Prediction

if TYPE_CHECKING:
    from PIL.Image import Image

    from flashtask.data.geometry import Geometry

__all__ = ["Mask", "classes_in_file", "classes_of_tiles"]

#: Pixels whose probabilities are brought to the size of a file at once.
_MOST_PIXELS = 2**20


@dataclass(frozen=True, eq=False)
class Mask(Prediction):
    """A class for each pixel of the image's file.

    Args:
        classes: (H, W) uint8, the positions of the classes in `labels`.
        labels: the classes.
        colours: of each class in pictures, `#rrggbb`.
        values: what a written mask has for each class: the numbers of the training masks, where these are numbers.
    """

    formats = ("png",)

    classes: np.ndarray[Any, Any]
    labels: tuple[str, ...]
    colours: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def areas(self) -> dict[str, int]:
        """Pixels of each class."""
        counts = np.bincount(self.classes.ravel(), minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, and for each class `share_LABEL`, its share of the pixels."""
        return {"path": self.path, **{f"share_{label}": n / self.classes.size for label, n in self.areas.items()}}

    def to_dict(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, `size` (height, width), and of each class that occurs the `area` and COCO's run lengths."""
        size = list(self.classes.shape)
        regions = {
            label: {"area": area, "segmentation": {"size": size, "counts": rle_counts(self.classes == number)}}
            for number, (label, area) in enumerate(self.areas.items())
            if area
        }
        return {"path": self.path, "size": size, "classes": regions}

    def lines(self) -> list[str]:
        """Each class with its share, the largest first."""
        ordered = sorted(self.areas.items(), key=lambda one: -one[1])
        return [f"{label} {area / self.classes.size:.1%}" for label, area in ordered if area]

    def draw(self, image: Image) -> Image:
        """A copy of the picture with the classes in colours, and a legend below it."""
        return overlay(image, self.classes, self.labels, self.colours)

    def as_image(self) -> Image:
        """The mask as an image with a palette: what `write` puts into PNG files."""
        import PIL.Image

        made = PIL.Image.fromarray(np.array(self.values, dtype=np.uint8)[self.classes], "L").convert("P")
        palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        for value, colour in zip(self.values, self.colours, strict=True):
            palette[value] = tuple(bytes.fromhex(colour[1:]))
        made.putpalette(palette.ravel().tobytes())
        return made

    @classmethod
    def write(
        cls, form: str, predictions: Iterable[Self], output: str | os.PathLike[str], names: Mapping[str, str]
    ) -> None:
        """Write `output/NAME.png` for each image: class numbers with a palette, in the size of the image's file."""
        for prediction in predictions:
            write_image(prediction.as_image(), Path(output, f"{names[prediction.path or '']}.png"))


def classes_in_file(chances: torch.Tensor, place: Geometry) -> torch.Tensor:
    """The most probable class (H, W) of each pixel of a file, from probabilities (C, h, w) over the input."""
    width, height = place.whole
    if place.whole == place.resized == place.size and (place.left, place.top) == (0, 0):
        return chances.argmax(dim=0)
    rows = max(1, _MOST_PIXELS // width)
    parts = [place.map_in_file(chances, rows=range(top, min(top + rows, height))) for top in range(0, height, rows)]
    return torch.cat([part.argmax(dim=0) for part in parts])


def classes_of_tiles(chances: torch.Tensor, places: Sequence[Geometry]) -> torch.Tensor:
    """The most probable class (H, W) of each pixel of a file, from probabilities over the inputs that were made of it.

    Args:
        chances: (T, C, h, w).
        places: of the file in each input: one, or those of its tiles, in which nothing is resized.
    """
    if len(places) == 1:
        return classes_in_file(chances[0], places[0])
    width, height = places[0].whole
    rows = max(1, _MOST_PIXELS // width)
    parts = [range(top, min(top + rows, height)) for top in range(0, height, rows)]
    return torch.cat([_blended(chances, places, part).argmax(dim=0) for part in parts])


def _blended(chances: torch.Tensor, places: Sequence[Geometry], rows: range) -> torch.Tensor:
    """The sum of the tiles' probabilities (C, rows, W), each with a weight that falls linearly towards its edges.

    It is not divided by the sum of the weights, which is the same for all classes.
    """
    height, width = chances.shape[-2:]
    down, across = (_weights(side).to(chances) for side in (height, width))
    total = chances.new_zeros(chances.shape[1], len(rows), places[0].whole[0])
    for tile, place in zip(chances, places, strict=True):
        # Below 0 the tile begins before the picture.
        top, bottom = max(rows.start, place.top, 0), min(rows.stop, place.top + height)
        left, right = max(place.left, 0), min(place.whole[0], place.left + width)
        if top < bottom:
            own = (slice(top - place.top, bottom - place.top), slice(left - place.left, right - place.left))
            weights = down[own[0], None] * across[own[1]]
            total[:, top - rows.start : bottom - rows.start, left:right] += tile[:, own[0], own[1]] * weights
    return total


def _weights(side: int) -> torch.Tensor:
    """1, 2, 3, ... from both edges to the middle, as shares of the largest."""
    place = torch.arange(side)
    weights = torch.minimum(place, side - 1 - place) + 1
    return weights / weights.max()
