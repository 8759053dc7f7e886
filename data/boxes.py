"""`BoxTable` and `BoxReader`: boxes of many images in flat columns, and what a model gets of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from flashtask.core.errors import BadDataError
from flashtask.data.box_drawing import draw_boxes
from flashtask.data.samples import Column
from flashtask.data.spatial import SpatialReader
from flashtask.data.targets import Source, TargetReader, match_labels

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CROWD", "BoxReader", "BoxTable"]

#: The label of a region with many objects that are not told apart (COCO's `iscrowd`).
CROWD = -1
#: Share of a box that a crop must leave for the box to be trained on.
_LEAST_VISIBLE = 0.25


@dataclass(frozen=True, eq=False)
class BoxTable:
    """The boxes of N images, M in all, in columns that worker processes share.

    Args:
        offsets: (N + 1,) int64; the boxes of image i are `offsets[i]` to `offsets[i + 1]`.
        boxes: (M, 4) float32: left, top, right, bottom in pixels of the upright picture, 0 at its left and upper edge.
        labels: (M,) int32, positions in `names`.
        is_crowd: (M,) bool: regions that count neither as found nor as missed.
        areas: (M,) float32, square pixels by which COCO's metrics call an object small, medium or large.
        names: of the classes.
        ids: what the annotations call them, such as COCO's category ids; they need not be dense.
    """

    offsets: Column
    boxes: Column
    labels: Column
    is_crowd: Column
    areas: Column
    names: tuple[str, ...]
    ids: tuple[int, ...]

    def of(self, row: int) -> slice:
        """Where the boxes of an image are."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def told(self, row: int) -> bytes:
        """What the annotations of an image hold beside the labels, for a digest."""
        own = self.of(row)
        told: bytes = self.boxes[own].tobytes() + self.is_crowd[own].tobytes()
        return told

    def counts(self, rows: Column) -> dict[str, int]:
        """How many boxes of each class some images have, crowds left out."""
        found = np.zeros(len(self.names), dtype=np.int64)
        for row in rows.tolist():
            own = self.of(row)
            np.add.at(found, self.labels[own][~self.is_crowd[own]], 1)
        return dict(zip(self.names, found.tolist(), strict=True))


@dataclass(frozen=True)
class BoxReader(SpatialReader):
    """Boxes with a label each; an image has any number of them. The column of targets holds rows of the `BoxTable`.

    Args:
        fields: the columns of a table of boxes: x1, y1, x2, y2, label.
        labels: the classes in the order of the outputs; those that a training image has.
        category_ids: what the training annotations call each class, for COCO's list of results.
        table: the boxes of this data; a checkpoint does not hold them.
    """

    kind = "boxes"
    stacks = False

    labels: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    table: BoxTable | None = field(default=None, repr=False, compare=False)

    def reading(self, other: TargetReader) -> Self:
        """This reader, for the boxes of another one's data."""
        return replace(super().reading(other), table=getattr(other, "table", None))

    def learned(self, raw: Column, source: Source) -> Self:
        """With the classes that the training images have, in the order of their ids.

        Raises:
            BadDataError: there is no box.
        """
        table = self._table
        counts = table.counts(raw)
        order = sorted(zip(table.ids, table.names, strict=True))
        found = [(number, name) for number, name in order if counts[name]]
        if not found:
            raise BadDataError(f"{source.argument} {source.place!r} has images, but no boxes")
        ids, names = zip(*found, strict=True)
        return replace(self, labels=tuple(names), category_ids=tuple(ids))

    def read(self, raw: Column, source: Source) -> Column:
        """The rows (N,) int64 as they are, once every label is known."""
        found = [name for name, count in self._table.counts(raw).items() if count]
        match_labels(sorted(found), self.labels, source)
        return raw

    @property
    def _table(self) -> BoxTable:
        assert self.table is not None
        return self.table

    @cached_property
    def _outputs(self) -> Column:
        """For each class of the table its position in `labels`; `CROWD` for one that only crowds have."""
        places = {name: place for place, name in enumerate(self.labels)}
        return np.array([places.get(name, CROWD) for name in self._table.names], dtype=np.int64)

    def target(self, value: Any, size: tuple[int, int]) -> dict[str, Any]:
        """`boxes` (n, 4) and `labels` (n,), with `CROWD` for regions that the loss ignores; and all `in_file`."""
        from torchvision import tv_tensors

        table = self._table
        own = table.of(int(value))
        boxes, is_crowd = torch.from_numpy(table.boxes[own]), torch.from_numpy(table.is_crowd[own])
        labels = torch.from_numpy(self._outputs[table.labels[own]])
        # Without clamping a crop leaves the whole box, so `finished` knows how much of it is left.
        moving: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size[::-1], clamping_mode=None)
        whole = {"boxes": boxes, "labels": labels, "is_crowd": is_crowd, "size": torch.tensor(size)}
        whole["areas"] = torch.from_numpy(table.areas[own])
        return {"boxes": moving, "labels": labels.where(~is_crowd, CROWD), "in_file": whole}

    def finished(self, target: Any) -> dict[str, Any]:
        """Boxes clipped to the input, without those of which less than a quarter is left."""
        height, width = target["boxes"].canvas_size
        boxes = target["boxes"].as_subclass(torch.Tensor).float()
        clipped = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        sides, left = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
        kept = (left.prod(1) >= _LEAST_VISIBLE * sides.prod(1)) & (left > 0.5).all(1)
        return {**target, "boxes": clipped[kept], "labels": target["labels"][kept]}

    def lines(self, target: Any) -> list[str]:
        """How many boxes of each class."""
        counts = Counter(self._name(label) for label in target["labels"].tolist())
        return [", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no objects"]

    def draw(self, image: Image, target: Any) -> Image:
        """The boxes with their labels."""
        labels = target["labels"].tolist()
        return draw_boxes(image, target["boxes"].tolist(), [self._name(one) for one in labels], labels)

    def _name(self, label: int) -> str:
        return "crowd" if label == CROWD else self.labels[label]

    def summary(self, raw: Column) -> str:
        """How many boxes each class has, the most frequent first."""
        counts = Counter({name: count for name, count in self._table.counts(raw).items() if count})
        return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(20))

    def strata(self, raw: Column) -> Sequence[str]:
        """The rarest class of each image, so that a split keeps the shares of all."""
        table, counts = self._table, self._table.counts(raw)
        found = []
        for row in raw.tolist():
            names = {table.names[label] for label in table.labels[table.of(row)]}
            found.append(min(names, key=lambda name: (counts[name], name)) if names else "")
        return found

    def describe(self) -> str:
        """How many classes there are."""
        return f"boxes of {len(self.labels)} class{'es' if len(self.labels) != 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, without the boxes."""
        return {name: value for name, value in replace(self, table=None)._plain().items() if name != "table"}

    def _plain(self) -> dict[str, Any]:
        return super().to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reader that `to_dict` wrote."""
        return super().from_dict({name: value for name, value in values.items() if name != "table"})

    def _check(self) -> None:
        super()._check()
        if not isinstance(self.labels, tuple) or not all(isinstance(name, str) for name in self.labels):
            raise ValueError("labels are not a list of texts")
        if len(self.category_ids) != len(self.labels) or not all(type(one) is int for one in self.category_ids):
            raise ValueError("category_ids are not a whole number for each label")
