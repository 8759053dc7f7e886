"""`Keypoints`: any number of objects an image, each with a box and keypoints, as a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashtask.data.keypoint_drawing import draw_keypoints
from flashtask.tasks.predictions import Boxes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Keypoints"]


@dataclass(frozen=True)
class Keypoints(Boxes):
    """Any number of objects an image, the one with the highest score first.

    Args:
        keypoints: of each object and each of its keypoints x and y in pixels of the upright file, and the probability
            that it is there.
        names: of the keypoints.
        skeleton: pairs of their positions that pictures join by a line.
    """

    keypoints: tuple[tuple[tuple[float, float, float], ...], ...]
    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """As of `Boxes`, with the list `keypoints`: for each object [x, y, probability] by the keypoints' names."""
        points = [{name: list(point) for name, point in zip(self.names, own, strict=True)} for own in self.keypoints]
        return {**super().as_row(), "keypoints": points}

    def draw(self, image: Image) -> Image:
        """A copy of a picture with the boxes, keypoints and skeletons.

        Args:
            image: the file's picture, upright, in its own size.
        """
        words = [f"{label} {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        return draw_keypoints(image, self.boxes, self.keypoints, words, self.category_ids, self.skeleton)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The image's part of COCO's list of results, with `keypoints`: x, y, probability of each in a row."""
        found = super().to_coco(image_id)
        return [
            {**one, "keypoints": [number for point in own for number in point]}
            for one, own in zip(found, self.keypoints, strict=True)
        ]
