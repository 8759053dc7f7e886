"""The first, deterministic steps from a file to a tensor: what is decoded, how large, and what can be kept of it.

A `Fitting` gives the bytes of the final size, and only the normalisation is left to do; where pictures are cut into
tiles it gives the whole picture, and `cut` does that. A `Decoding` gives the picture
itself, where random steps come next. Both say how large a picture they need, so that a JPEG that is much larger is
decoded at a fraction of its size: at least twice as large as what the resize that follows makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from flashtask.core.preprocessing import Preprocessing, ValueRange
from flashtask.data.geometry import Geometry
from flashtask.data.images import Encoded, load_scaled

__all__ = ["Decoding", "FirstSteps", "Fitting", "Pixels", "Seen"]

#: uint8 of shape (H, W), or (H, W, 3) for colour. A grey picture keeps one channel also where three are wanted.
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

#: What may look at a picture when it is decoded: it, and the (width, height) of the whole one.
Seen = Callable[[Image.Image, tuple[int, int]], object]

#: How much larger than the resized picture a decoded one must stay, along each side.
_SPARE = 2

#: Pixels of a resized picture above which only the crop of it is computed; the two ways differ by rounding.
_MOST_RESIZED = 2**24
#: Half the width of the widest filter (lanczos), in pixels of the larger of source and result.
_REACH = 3


@dataclass(frozen=True)
class Decoding:
    """Decode, and no more.

    Args:
        channels: 3 or 1.
        least: the shorter side that is needed, in pixels; None decodes every pixel.
        value_range: of files with more than 8 bits, as in `Preprocessing`.
    """

    channels: int
    least: int | None = None
    value_range: ValueRange | None = None

    def read(self, source: Encoded, name: str = "", seen: Seen | None = None) -> Pixels:
        """The pixels of a file, of its bytes or of a PIL image; the other arguments are those of `Fitting.read`."""
        least = None if self.least is None else self._least
        image, whole = load_scaled(
            source, self.channels, least, name=name, value_range=self.value_range, keep_grey=True
        )
        if seen is not None:
            seen(image, whole)
        return np.array(image)

    def _least(self, whole: tuple[int, int]) -> tuple[int, int]:
        assert self.least is not None
        return self.least, self.least


@dataclass(frozen=True)
class Fitting:
    """Decode, resize, and crop at the centre or pad, by timm's three crop modes; or decode, to be cut into tiles.

    Args:
        preprocessing: of the backbone.
    """

    preprocessing: Preprocessing

    def read(self, source: Encoded, name: str = "", seen: Seen | None = None) -> Pixels:
        """The pixels of a file, of its bytes, of a PIL image or an array, in the size that the backbone takes.

        Args:
            source: what is decoded.
            name: what messages call it; by default the path.
            seen: is given the decoded picture and its whole (width, height), before it is resized.
        """
        wanted = self.preprocessing
        least = self._least if wanted.decode == "scaled" else None
        image, whole = load_scaled(
            source, wanted.input_size[0], least, name=name, value_range=wanted.value_range, keep_grey=True
        )
        if seen is not None:
            seen(image, whole)
        return self.fit(image, whole)

    def fit(self, image: Image.Image, whole: tuple[int, int] | None = None) -> Pixels:
        """The pixels of a decoded picture, in the size that the backbone takes.

        Args:
            image: in mode RGB or L.
            whole: (width, height) before it was decoded at a fraction of that; its own size if not given.
        """
        if self.is_tiled:
            return np.array(image)
        size = self._resized(whole or image.size)
        if math.prod(size) > _MOST_RESIZED:
            return np.array(self._middle(image, size))
        if size != image.size:
            image = image.resize(size, self._resampling)
        if self.preprocessing.crop_mode == "border":
            image = self._padded(image)
        return np.array(self._cropped(image))

    def geometry(self, whole: tuple[int, int]) -> Geometry:
        """Where a picture of a size (width, height) lies in what `fit` makes of it."""
        resized, size = self._resized(whole), self.preprocessing.input_size[:0:-1]
        is_padded = self.preprocessing.crop_mode == "border"
        starts = []
        for side, wanted in zip(resized, size, strict=True):
            canvas = max(side, wanted) if is_padded else side
            starts.append(_start(canvas, wanted) - (canvas - side) // 2)
        return Geometry(whole, resized, starts[0], starts[1], (size[0], size[1]))

    @property
    def is_tiled(self) -> bool:
        """Whether a picture becomes several inputs."""
        return self.preprocessing.crop_mode == "tile"

    def tiles(self, whole: tuple[int, int]) -> list[Geometry]:
        """Where a picture of a size (width, height) lies in each input that is made of it, row by row.

        Tiles are spread evenly, so the first and the last end where the picture does. There is one input unless
        pictures are cut into tiles.
        """
        if not self.is_tiled:
            return [self.geometry(whole)]
        width, height = self.preprocessing.input_size[:0:-1]
        across, down = (
            _tile_starts(side, wanted, self.preprocessing.tile_overlap)
            for side, wanted in zip(whole, (width, height), strict=True)
        )
        return [Geometry(whole, whole, left, top, (width, height)) for top in down for left in across]

    def cut(self, pixels: Pixels) -> list[Pixels]:
        """The tiles of what `fit` gives, in the order of `tiles`, filled up with the mean where the picture ends."""
        _, height, width = self.preprocessing.input_size
        mean = np.array([round(255 * value) for value in self.preprocessing.mean], dtype=np.uint8)
        if pixels.ndim == 2 and len(mean) > 1:
            pixels = np.repeat(pixels[..., None], len(mean), axis=2)
        found = []
        for place in self.tiles((pixels.shape[1], pixels.shape[0])):
            left, top = max(0, place.left), max(0, place.top)
            part = pixels[top : top + height, left : left + width]
            if part.shape[:2] != (height, width):
                below, right = max(0, -place.top), max(0, -place.left)
                tile = np.empty((height, width, *pixels.shape[2:]), dtype=np.uint8)
                tile[:] = mean if tile.ndim == 3 else mean[0]
                tile[below : below + part.shape[0], right : right + part.shape[1]] = part
                part = tile
            found.append(part)
        return found

    @property
    def _resampling(self) -> Image.Resampling:
        return Image.Resampling[self.preprocessing.interpolation.upper()]

    def _middle(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The centre crop of the resized picture, without resizing the rest of it.

        A strip of 1 x 30,000 pixels whose shorter side becomes 256 would have 2,000,000,000 pixels.
        """
        box, part, wanted = [], [], []
        for side, resized, most in zip(image.size, size, self.preprocessing.input_size[:0:-1], strict=True):
            kept, ratio = min(resized, most), side / resized
            start = _start(resized, kept) * ratio
            # The filter of a pixel at the edge reaches this far beyond it.
            margin = math.ceil(_REACH * max(1.0, ratio)) + 1
            first = max(0, math.floor(start) - margin)
            part.append((first, min(side, math.ceil(start + kept * ratio) + margin)))
            box.append((start - first, start - first + kept * ratio))
            wanted.append(kept)
        image = image.crop((part[0][0], part[1][0], part[0][1], part[1][1]))
        image = image.resize((wanted[0], wanted[1]), self._resampling, (box[0][0], box[1][0], box[0][1], box[1][1]))
        return self._cropped(image)

    def _least(self, whole: tuple[int, int]) -> tuple[int, int]:
        width, height = self._resized(whole)
        return _SPARE * width, _SPARE * height

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after the resize."""
        width, height = size
        if self.is_tiled:
            return size
        down, across = (math.floor(side / self.preprocessing.crop_pct) for side in self.preprocessing.input_size[1:])
        if self.preprocessing.crop_mode == "squash":
            return across, down
        if self.preprocessing.crop_mode == "center" and down == across:
            # The longer side is rounded down, as in torchvision.
            return (down, int(down * height / width)) if width <= height else (int(down * width / height), down)
        ratios = (height / down, width / across)
        ratio = max(ratios) if self.preprocessing.crop_mode == "border" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _padded(self, image: Image.Image) -> Image.Image:
        """In the colour of the mean, half on each side."""
        height, width = self.preprocessing.input_size[1:]
        size = (max(width, image.width), max(height, image.height))
        if size == image.size:
            return image
        mean = tuple(round(255 * value) for value in self.preprocessing.mean)
        if len(mean) > 1:
            image = image.convert("RGB")
        padded = Image.new(image.mode, size, mean if len(mean) > 1 else mean[0])
        padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return padded

    def _cropped(self, image: Image.Image) -> Image.Image:
        """At the centre; what the picture lacks is black."""
        height, width = self.preprocessing.input_size[1:]
        if image.size == (width, height):
            return image
        left, top = (_start(image.width, width), _start(image.height, height))
        return image.crop((left, top, left + width, top + height))


def _start(side: int, wanted: int) -> int:
    """Where a centred crop begins: torchvision rounds halves to the even number, and pads the smaller half first."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def _tile_starts(side: int, wanted: int, overlap: float) -> list[int]:
    """Where tiles begin along an axis; below 0 if the picture is smaller than one."""
    if side <= wanted:
        return [_start(side, wanted)]
    more = math.ceil((side - wanted) / max(1, math.floor(wanted * (1 - overlap))))
    return [round(number * (side - wanted) / more) for number in range(more + 1)]


#: What a transform begins with; hashable, so that what it gives can be kept by it.
FirstSteps = Decoding | Fitting
