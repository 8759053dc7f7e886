"""Boxes and their labels drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_boxes"]

#: Colours that are told apart on photographs, by class.
_COLOURS = ("#ff3b30", "#00c7ff", "#ffd60a", "#34c759", "#bf5af2", "#ff9f0a", "#0a84ff", "#ff2d92")
#: Above this number of boxes the labels would cover the picture.
_MOST_LABELS = 15


def draw_boxes(image: Image, boxes: Sequence[Sequence[float]], words: Sequence[str], classes: Sequence[int]) -> Image:
    """A copy of a picture, in mode RGB, with boxes and what is written at each.

    Args:
        image: to draw on.
        boxes: left, top, right, bottom in its pixels.
        words: for each box.
        classes: a number for each box, which chooses its colour.
    """
    from PIL import ImageDraw, ImageFont

    made = image.convert("RGB").copy()
    pen = ImageDraw.Draw(made)
    width = max(1, round(max(image.size) / 300))
    font = ImageFont.load_default(max(9, max(image.size) // 45))
    for box, number in zip(boxes, classes, strict=True):
        left, top, right, bottom = box
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=_colour(number), width=width)
    # With one class the colour says it all, if nothing but its name is to be written.
    if len(boxes) > _MOST_LABELS or (len(set(words)) == 1 and len(boxes) > 1):
        return made
    for box, text, number in zip(boxes, words, classes, strict=True):
        place = (box[0], max(0.0, box[1]))
        pen.rectangle(pen.textbbox(place, text, font), fill=_colour(number))
        pen.text(place, text, "black", font)
    return made


def _colour(number: int) -> str:
    return "#ffffff" if number < 0 else _COLOURS[number % len(_COLOURS)]
