"""Objects drawn into a picture: the pixels of each in a colour of its own, with a border and a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flashtask.data.box_drawing import draw_labels, numbered_colour

if TYPE_CHECKING:
    from PIL.Image import Image

    from flashtask.data.shapes import Block

__all__ = ["draw_instances"]

#: How much of an object's pixels its colour is.
_STRENGTH = 0.4


def draw_instances(
    image: Image, blocks: Sequence[Block], boxes: Sequence[Sequence[float]], words: Sequence[str]
) -> Image:
    """A copy of a picture, in mode RGB, with the objects tinted and what is written at each.

    Args:
        image: to draw on.
        blocks: the pixels of each object; those of later ones are drawn first.
        boxes: left, top, right, bottom of each; the words are at the upper left corner.
        words: for each object.
    """
    import PIL.Image

    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    for number in reversed(range(len(blocks))):
        inside = blocks[number].inside
        if not inside.size:
            continue
        colour = np.frombuffer(bytes.fromhex(numbered_colour(number)[1:]), dtype=np.uint8).astype(np.float32)
        padded = np.pad(inside, 1)
        whole = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        share = np.where(inside & ~whole, 1.0, _STRENGTH * inside)[..., None]
        own = pixels[blocks[number].place]
        own[:] = own * (1 - share) + colour * share
    made = PIL.Image.fromarray(pixels.round().astype(np.uint8))
    draw_labels(made, boxes, words, range(len(boxes)))
    return made
