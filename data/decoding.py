"""The first, deterministic steps from a file to a tensor: what is decoded, how large, and what can be kept of it.

A `Fitting` gives the bytes of the final size, and only the normalisation is left to do. A `Decoding` gives the picture
itself, where random steps come next. Both say how large a picture they need, so that a JPEG that is much larger is
decoded at a fraction of its size: at least twice as large as what the resize that follows makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from flashtask.core.preprocessing import Preprocessing
from flashtask.data.images import Encoded, load_scaled

__all__ = ["Decoding", "FirstSteps", "Fitting", "Pixels"]

#: uint8 of shape (H, W), or (H, W, 3) for colour. A grey picture keeps one channel also where three are wanted.
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

#: How much larger than the resized picture a decoded one must stay, along each side.
_SPARE = 2


@dataclass(frozen=True)
class Decoding:
    """Decode, and no more.

    Args:
        channels: 3 or 1.
        least: the shorter side that is needed, in pixels; None decodes every pixel.
    """

    channels: int
    least: int | None = None

    def read(self, source: Encoded, name: str = "") -> Pixels:
        """The pixels of a file, of its bytes or of a PIL image; `name` is for messages."""
        least = None if self.least is None else self._least
        return np.array(load_scaled(source, self.channels, least, name=name, keep_grey=True)[0])

    def _least(self, whole: tuple[int, int]) -> tuple[int, int]:
        assert self.least is not None
        return self.least, self.least


@dataclass(frozen=True)
class Fitting:
    """Decode, resize, and crop at the centre or pad, by timm's three crop modes.

    Args:
        preprocessing: of the backbone.
    """

    preprocessing: Preprocessing

    def read(self, source: Encoded, name: str = "") -> Pixels:
        """The pixels of a file, of its bytes or of a PIL image, in the size that the backbone takes.

        Args:
            source: what is decoded.
            name: what messages call it; by default the path.
        """
        least = self._least if self.preprocessing.decode == "scaled" else None
        image, whole = load_scaled(source, self.preprocessing.input_size[0], least, name=name, keep_grey=True)
        return self.fit(image, whole)

    def fit(self, image: Image.Image, whole: tuple[int, int] | None = None) -> Pixels:
        """The pixels of a decoded picture, in the size that the backbone takes.

        Args:
            image: in mode RGB or L.
            whole: (width, height) before it was decoded at a fraction of that; its own size if not given.
        """
        size = self._resized(whole or image.size)
        if size != image.size:
            image = image.resize(size, getattr(Image.Resampling, self.preprocessing.interpolation.upper()))
        if self.preprocessing.crop_mode == "border":
            image = self._padded(image)
        return np.array(self._cropped(image))

    def _least(self, whole: tuple[int, int]) -> tuple[int, int]:
        width, height = self._resized(whole)
        return _SPARE * width, _SPARE * height

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after the resize."""
        width, height = size
        down, across = (math.floor(side / self.preprocessing.crop_pct) for side in self.preprocessing.input_size[1:])
        if self.preprocessing.crop_mode == "squash":
            return across, down
        if self.preprocessing.crop_mode == "center" and down == across:
            # The longer side is rounded down, as in torchvision.
            return (down, int(down * height / width)) if width <= height else (int(down * width / height), down)
        ratios = (height / down, width / across)
        ratio = max(ratios) if self.preprocessing.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)

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


#: What a transform begins with; hashable, so that what it gives can be kept by it.
FirstSteps = Decoding | Fitting
