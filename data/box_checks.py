"""From annotations to a table of samples and one of boxes, once nothing is wrong with any box."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashtask.core.errors import FlashtaskError
from flashtask.data.box_files import Annotations, Points
from flashtask.data.boxes import BoxTable
from flashtask.data.image_source import ImageSource
from flashtask.data.problems import OTHER_ROOT, Problems
from flashtask.data.samples import Column, SampleTable, as_text
from flashtask.data.shapes import turned_shape
from flashtask.data.threads import in_threads

__all__ = ["Pictures", "checked_boxes", "look_at_pictures", "tables_of"]

#: Pixels that a box may lie beyond the edge of its picture; so much is cut off.
_MOST_BEYOND = 1.0
_SIDEWAYS = (5, 6, 7, 8)


def tables_of(
    found: Mapping[str, Annotations], roots: Mapping[str, str], images: ImageSource, *, may_be_missing: bool
) -> tuple[SampleTable, BoxTable, Problems]:
    """The samples of all parts and their boxes, in pixels of the upright pictures; keypoints become such pixels too.

    Of each picture the header is read. Boxes that were drawn in the stored pixels of a picture that lies on its side,
    which the size in the annotations tells, are turned with it.

    Args:
        found: by part.
        roots: for each part the folder that names of images are relative to.
        images: where the pictures are read.
        may_be_missing: pictures that cannot be read are left out later.

    Returns:
        The samples, whose targets are rows of the boxes; the boxes; and what is wrong with them.
    """
    problems = Problems()
    names = list(dict.fromkeys(name for one in found.values() for name in one.ids))
    names += sorted({name for one in found.values() for name in one.names} - set(names))
    ids: dict[str, int] = {}
    for one in found.values():
        ids = {**one.ids, **ids}
    numbers = {name: place for place, name in enumerate(names)}
    samples, columns, start = [], [], 0
    for part, one in found.items():
        problems.take(one.problems)
        image = np.array(one.images, dtype=np.int64)
        order = np.argsort(image, kind="stable")
        pictures = look_at_pictures(one, images, problems, may_be_missing=may_be_missing)
        boxes = checked_boxes(one, pictures, problems)[order]
        one.points = pictures.keypoints(one)
        for number, shape in one.shapes.items():
            if (turn := pictures.turned.get(one.images[number])) is not None:
                one.shapes[number] = turned_shape(shape, *turn)
        labels = np.array([numbers[name] for name in one.names], dtype=np.int32)[order]
        crowds, areas = np.array(one.crowds, dtype=bool)[order], np.array(one.areas, dtype=np.float64)[order]
        areas = np.where(np.isnan(areas) | one.is_relative, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), areas)
        columns.append((np.bincount(image, minlength=len(one.paths)), boxes, labels, crowds, areas))
        rows = np.arange(start, start + len(one.paths), dtype=np.int64)
        groups = as_text(one.groups) if one.groups else None
        samples.append(SampleTable.of_part(part, one.paths, rows, groups=groups, root=roots.get(part, "")))
        start += len(rows)
    counts, boxes, labels, crowds, areas = (np.concatenate(column) for column in zip(*columns, strict=True))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    table = BoxTable(
        offsets,
        boxes.astype(np.float32),
        labels,
        crowds,
        areas.astype(np.float32),
        tuple(names),
        tuple(ids.get(name, -1) for name in names),
    )
    return SampleTable.joined(samples), table, problems


@dataclass
class Pictures:
    """How the numbers of annotations become pixels of upright pictures.

    Args:
        sizes: (N, 2) width and height of each picture; 0 where it cannot be read or is another one.
        is_relative: the numbers are shares of the sides.
        turned: EXIF's orientation, 5 to 8, and the size of a picture as it is stored, of those whose numbers belong to
            the stored pixels.
    """

    sizes: Column
    is_relative: bool
    turned: dict[int, tuple[int, tuple[int, int]]] = field(default_factory=dict)

    def points(self, row: int, points: Column) -> Column:
        """Points (n, 2) of a picture."""
        if self.is_relative:
            scaled: Column = points * np.where(self.sizes[row] > 0, self.sizes[row], 1)
            return scaled
        return _turned(points, *self.turned[row]) if row in self.turned else points

    def boxes(self, images: Column, boxes: Column) -> Column:
        """Boxes (M, 4) of the pictures (M,)."""
        if self.is_relative:
            scaled: Column = boxes * np.tile(np.where(self.sizes > 0, self.sizes, 1)[images], 2)
            return scaled
        for row, turn in self.turned.items():
            own = images == row
            corners = _turned(boxes[own].reshape(-1, 2), *turn).reshape(-1, 2, 2)
            boxes[own] = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return boxes

    def keypoints(self, one: Annotations) -> dict[int, Points]:
        """The keypoints of a part in pixels; those outside of their picture are added to its `keypoint_problems`."""
        found: dict[int, Points] = {}
        for number, points in one.points.items():
            row = one.images[number]
            places = self.points(row, np.array([point[:2] for point in points], dtype=np.float64).reshape(-1, 2))
            is_seen = np.array([point[2] > 0 for point in points], dtype=bool)
            beyond = np.maximum(-places, places - self.sizes[row]).max(axis=1, initial=-np.inf)
            outside = is_seen & (beyond >= _MOST_BEYOND) & (self.sizes[row] > 0).all()
            if outside.any() or not np.isfinite(places).all():
                shown = ", ".join(f"({x:g}, {y:g})" for x, y in places[outside][:3].tolist()) or "not a number"
                width, height = self.sizes[row]
                what = f"{shown} in a picture of {width:.0f} x {height:.0f}"
                one.keypoint_problems.add("keypoint outside of its picture", f"{one.places[number]}: {what}")
            seen = zip(places.tolist(), points, strict=True)
            found[number] = [(x, y, point[2]) if point[2] else (0.0, 0.0, 0) for (x, y), point in seen]
        return found


def look_at_pictures(
    one: Annotations, images: ImageSource, problems: Problems, *, may_be_missing: bool = False
) -> Pictures:
    """Read the header of each picture; those that are missing or of another size are added to the problems."""

    def look(row: int) -> tuple[tuple[int, int], int] | str:
        try:
            given = images.input(one.paths[row])
            size = given.size()
            stated = one.stated[row]
            return size, given.orientation() if stated is not None and stated != size else 1
        except FlashtaskError as error:
            return error.why or error.what

    found = Pictures(np.zeros((len(one.paths), 2)), one.is_relative)
    for row, seen in enumerate(in_threads(look, range(len(one.paths)))):
        name = os.path.basename(one.paths[row])
        if isinstance(seen, str):
            if not may_be_missing and not os.path.exists(one.paths[row]):
                shown = f"{one.paths[row]!r}: the file does not exist"
                if row in one.image_places:
                    shown = f"{one.image_places[row]}: the file does not exist: {one.paths[row]!r}"
                problems.add("missing image", shown, fix=OTHER_ROOT if row in one.image_places else "")
            continue  # one that cannot be read is refused or left out with the others of its part
        (width, height), orientation = seen
        stated = one.stated[row]
        if stated is None or stated == (width, height):
            found.sizes[row] = width, height
        elif stated == (height, width) and orientation in _SIDEWAYS:
            found.sizes[row], found.turned[row] = (width, height), (orientation, stated)
        else:
            what = f"{stated[0]} x {stated[1]} in the annotations, {width} x {height} in the file"
            problems.add("picture of another size", f"{name!r}: {what}")
    return found


def checked_boxes(one: Annotations, pictures: Pictures, problems: Problems) -> Column:
    """The boxes (M, 4) of a part in pixels; what is wrong with them is added to the problems."""
    image = np.array(one.images, dtype=np.int64)
    boxes = pictures.boxes(image, np.array(one.boxes, dtype=np.float64).reshape(-1, 4))
    whole = pictures.sizes[image]
    is_known: Column = np.logical_and.reduce(whole > 0, axis=1)
    for row, kind, what in _faults(boxes, whole, is_known, image, one):
        problems.add(kind, f"{one.places[row]}: {what}", fix=_FIXES.get(kind, ""))
    edge = np.where(is_known[:, None], np.tile(whole, 2), np.inf)
    clipped: Column = np.clip(boxes, 0, edge)
    return clipped


_FIXES = {
    "box outside of its picture": "correct the boxes; those that are less than 1 pixel beyond the edge are clipped",
    "box that is there twice": "remove the copies",
}


def _faults(
    boxes: Column, whole: Column, is_known: Column, image: Column, one: Annotations
) -> Iterator[tuple[int, str, str]]:
    """The row, the kind and the description of each box that cannot be used."""
    names = one.names
    is_finite: Column = np.logical_and.reduce(np.isfinite(boxes), axis=1)
    is_empty: Column = is_finite & ((boxes[:, 2:] <= boxes[:, :2]).any(axis=1))
    beyond = np.maximum(-boxes[:, :2], boxes[:, 2:] - whole).max(axis=1, initial=-np.inf)
    inside = np.minimum(boxes[:, 2:], whole) - np.maximum(boxes[:, :2], 0)
    is_outside: Column = is_finite & is_known & ((beyond >= _MOST_BEYOND) | (inside <= 0).any(axis=1)) & ~is_empty
    seen: dict[Any, int] = {}
    for row in range(len(boxes)):
        shown = ", ".join(f"{number:g}" for number in boxes[row])
        if not is_finite[row]:
            yield row, "box that is not finite", shown
        elif is_empty[row]:
            yield row, "empty box", f"{shown} (left, top, right, bottom) has no area"
        elif is_outside[row]:
            width, height = whole[row]
            yield row, "box outside of its picture", f"{shown} in a picture of {width:.0f} x {height:.0f}"
        else:
            first = seen.setdefault((image[row], *boxes[row].tolist()), row)
            if first != row and names[first] == names[row]:
                yield row, "box that is there twice", f"{names[row]} {shown}"
            elif first != row:
                what = f"{shown} is {names[row]!r}, and {names[first]!r} in {one.places[first]}"
                yield row, "box with two labels", what


def _turned(points: Column, orientation: int, stored: tuple[int, int]) -> Column:
    """Points (n, 2) in the pixels of a file that lies on its side, in those of the upright picture.

    Args:
        points: x and y.
        orientation: EXIF's, 5 to 8.
        stored: (width, height) of the file as it is stored.
    """
    width, height = stored
    across, down = points.T
    # Of 6 and 7 the upper edge becomes the right one.
    return np.stack(
        [height - down if orientation in (6, 7) else down, across if orientation in (5, 6) else width - across], axis=1
    )
