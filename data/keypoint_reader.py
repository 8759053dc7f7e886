"""`KeypointTable` and `KeypointReader`: boxes with keypoints, and what a model gets of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.box_files import KeypointNames
from flashtask.data.boxes import BoxReader, BoxTable
from flashtask.data.keypoint_drawing import draw_keypoints
from flashtask.data.samples import Column
from flashtask.data.targets import Source, TargetReader

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["KeypointReader", "KeypointTable"]


@dataclass(frozen=True, eq=False)
class KeypointTable(BoxTable):
    """The objects of N images, M in all, each with K keypoints, in columns that worker processes share.

    Args:
        points: (M, K, 3) float32: x and y in pixels of the upright picture; 0 not labelled, 1 hidden, 2 visible.
        keypoints: their names.
    """

    points: Column
    keypoints: KeypointNames

    def told(self, row: int) -> bytes:
        """Boxes, crowds and keypoints of an image, for a digest."""
        points: bytes = self.points[self.of(row)].tobytes()
        return super().told(row) + points


@dataclass(frozen=True)
class KeypointReader(BoxReader):
    """Objects with a label, a box and keypoints each.

    Args:
        keypoints: names of the keypoints.
        skeleton: pairs of their positions that are joined by a line.
        flips: for each keypoint the one that it becomes in a mirrored picture; empty if that is not known.
        table: the objects of this data; a checkpoint does not hold them.
    """

    kind = "keypoints"

    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    flips: tuple[int, ...] = ()
    table: KeypointTable | None = field(default=None, repr=False, compare=False)

    def reading(self, other: TargetReader) -> Self:
        """This reader, for the objects of another one's data; what it does not know of mirrors that one may."""
        return replace(super().reading(other), flips=self.flips or getattr(other, "flips", ()))

    @property
    def _objects(self) -> KeypointTable:
        return cast("KeypointTable", self._table)

    def learned(self, raw: Column, source: Source) -> Self:
        """With the classes and keypoints of the training images."""
        found, own = super().learned(raw, source), self._objects.keypoints
        return replace(found, keypoints=own.names, skeleton=own.skeleton, flips=self.flips or own.flips)

    def read(self, raw: Column, source: Source) -> Column:
        """The rows (N,) int64 as they are, once every label and the keypoints are known.

        Raises:
            BadDataError: the data has other keypoints.
        """
        names = self._objects.keypoints.names
        if names != self.keypoints:
            raise BadDataError(
                f"{source.argument}: the keypoints are {', '.join(names)}",
                why=f"those that are known are {', '.join(self.keypoints)}",
            )
        return super().read(raw, source)

    def target(self, value: Any, size: tuple[int, int]) -> dict[str, Any]:
        """As of boxes, with `places` that move like boxes: three marks of the picture, then all keypoints.

        `labels` are numbers of the objects, so that a transform that leaves boxes out says which. `in_file` has all
        `keypoints` (n, K, 3).
        """
        from torchvision import tv_tensors

        found = super().target(value, size)
        points = torch.from_numpy(self._objects.points[self._objects.of(int(value))])
        width, height = size
        marks = torch.tensor([[0.0, 0.0], [width, 0.0], [0.0, height]])
        # Boxes without an extent: torchvision's flip of `KeyPoints` takes 0 for the middle of the first pixel.
        places = torch.cat([marks, points[..., :2].reshape(-1, 2)]).repeat(1, 2)
        moving: Any = tv_tensors.BoundingBoxes(places, format="XYXY", canvas_size=size[::-1], clamping_mode=None)
        return {
            **found,
            "labels": torch.arange(len(points)),
            "classes": found["labels"],
            "places": moving,
            "visible": points[..., 2],
            "in_file": {**found["in_file"], "keypoints": points},
        }

    def finished(self, target: Any) -> dict[str, Any]:
        """Boxes as of `BoxReader`, and `keypoints` (n, K, 3) of those that are kept; what lies outside is not labelled.

        Raises:
            UsageError: the picture was mirrored, and what the keypoints become there is not known.
        """
        found = super().finished({name: target[name] for name in ("boxes", "labels", "in_file")})
        height, width = target["boxes"].canvas_size
        places = target["places"].as_subclass(torch.Tensor)[:, :2].float()
        visible = target["visible"]
        points = torch.cat([places[3:].reshape(*visible.shape, 2), visible[..., None]], dim=-1)
        along, down = places[1] - places[0], places[2] - places[0]
        if along[0] * down[1] - along[1] * down[0] < 0:
            if not self.flips:
                raise UsageError(
                    "a transform mirrors pictures, and what the keypoints become there is not known",
                    fix='flip_pairs=[("left_eye", "right_eye")], or no flips',
                )
            points = points[:, list(self.flips)]
        points = points[found["labels"]]
        inside = ((points[..., :2] >= 0) & (points[..., :2] <= points.new_tensor([width, height]))).all(-1)
        points = points * (inside & (points[..., 2] > 0))[..., None]
        return {**found, "labels": target["classes"][found["labels"]], "keypoints": points}

    def draw(self, image: Image, target: Any) -> Image:
        """The boxes and keypoints with their labels."""
        labels = target["labels"].tolist()
        names = [self._name(one) for one in labels]
        points = target["keypoints"].tolist()
        return draw_keypoints(image, target["boxes"].tolist(), points, names, labels, self.skeleton)

    def describe(self) -> str:
        """How many classes and keypoints there are."""
        return f"{super().describe()} with {len(self.keypoints)} keypoint{'s' if len(self.keypoints) != 1 else ''}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reader that `to_dict` wrote."""
        skeleton = values.get("skeleton") or ()
        pairs = [tuple(one) if isinstance(one, list) else one for one in skeleton]
        return super().from_dict({**values, "skeleton": pairs})

    def _check(self) -> None:
        super()._check()
        count = len(self.keypoints)
        if not isinstance(self.keypoints, tuple) or not all(isinstance(name, str) for name in self.keypoints):
            raise ValueError("keypoints are not a list of texts")
        if not all(
            isinstance(line, tuple) and len(line) == 2 and all(type(end) is int and 0 <= end < count for end in line)
            for line in self.skeleton
        ):
            raise ValueError("the skeleton does not join keypoints")
        if not all(type(one) is int for one in self.flips) or sorted(self.flips) not in ([], list(range(count))):
            raise ValueError("flips do not name each keypoint once")
