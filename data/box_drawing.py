"""Boxes and their labels drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_boxes", "draw_labels", "numbered_colour"]

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
    from PIL import ImageDraw

    made = image.convert("RGB").copy()
    pen = ImageDraw.Draw(made)
    width = max(1, round(max(image.size) / 300))
    for box, number in zip(boxes, classes, strict=True):
        left, top, right, bottom = box
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=numbered_colour(number), width=width)
    draw_labels(made, boxes, words, classes)
    return made


def draw_labels(image: Image, boxes: Sequence[Sequence[float]], words: Sequence[str], numbers: Sequence[int]) -> None:
    """Write words at the upper left corners of boxes into a picture, unless there are many.

    Args:
        image: to write into.
        boxes: left, top, right, bottom in its pixels.
        words: for each box.
        numbers: choose the colours.
    """
    from PIL import ImageDraw, ImageFont

    # With one class the colour says it all, if nothing but its name is to be written.
    if len(boxes) > _MOST_LABELS or (len(set(words)) == 1 and len(boxes) > 1):
        return
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(9, max(image.size) // 45))
    for box, text, number in zip(boxes, words, numbers, strict=True):
        place = (box[0], max(0.0, box[1]))
        pen.rectangle(pen.textbbox(place, text, font), fill=numbered_colour(number))
        pen.text(place, text, "black", font)


def numbered_colour(number: int) -> str:
    """A colour, `#rrggbb`, by the number of a class or an object; white below 0."""
    return "#ffffff" if number < 0 else _COLOURS[number % len(_COLOURS)]
