"""Keypoints and the lines between them drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashtask.data.box_drawing import draw_boxes, numbered_colour

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_keypoints"]


def draw_keypoints(
    image: Image,
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[Sequence[float]]],
    words: Sequence[str],
    classes: Sequence[int],
    skeleton: Sequence[tuple[int, int]],
) -> Image:
    """A copy of a picture, in mode RGB, with the boxes, keypoints and skeletons of objects.

    Args:
        image: to draw on.
        boxes: of each object left, top, right, bottom in its pixels.
        points: of each object x, y and whether it is there, above 0.5, of each keypoint; others are not drawn.
        words: what is written at each object.
        classes: a number for each object, which chooses its colour.
        skeleton: pairs of keypoints that are joined by a line, where both are there.
    """
    from PIL import ImageDraw

    made = draw_boxes(image, boxes, words, classes)
    pen = ImageDraw.Draw(made)
    radius = max(2.0, max(image.size) / 160)
    for own, number in zip(points, classes, strict=True):
        known = {place: (point[0], point[1]) for place, point in enumerate(own) if point[2] > 0.5}
        for one, two in skeleton:
            if one in known and two in known:
                pen.line((*known[one], *known[two]), fill=numbered_colour(number), width=max(1, round(radius / 2)))
        for place, (x, y) in known.items():
            around = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(around, fill=numbered_colour(place), outline="black")
    return made
