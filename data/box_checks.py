"""From annotations to a table of samples and one of boxes, once nothing is wrong with any box."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flashtask.core.errors import FlashtaskError
from flashtask.data.box_files import Annotations
from flashtask.data.boxes import BoxTable
from flashtask.data.image_source import ImageSource
from flashtask.data.problems import Problems
from flashtask.data.samples import Column, SampleTable
from flashtask.data.shapes import turned_shape
from flashtask.data.threads import in_threads

__all__ = ["tables_of"]

#: Pixels that a box may lie beyond the edge of its picture; so much is cut off.
_MOST_BEYOND = 1.0
_SIDEWAYS = (5, 6, 7, 8)


def tables_of(
    found: Mapping[str, Annotations], roots: Mapping[str, str], images: ImageSource, *, may_be_missing: bool
) -> tuple[SampleTable, BoxTable, Problems]:
    """The samples of all parts and their boxes, in pixels of the upright pictures.

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
        boxes = _checked(one, images, problems, may_be_missing=may_be_missing)[order]
        labels = np.array([numbers[name] for name in one.names], dtype=np.int32)[order]
        crowds, areas = np.array(one.crowds, dtype=bool)[order], np.array(one.areas, dtype=np.float64)[order]
        areas = np.where(np.isnan(areas) | one.is_relative, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), areas)
        columns.append((np.bincount(image, minlength=len(one.paths)), boxes, labels, crowds, areas))
        rows = np.arange(start, start + len(one.paths), dtype=np.int64)
        samples.append(SampleTable.of_part(part, one.paths, rows, root=roots.get(part, "")))
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


def _checked(one: Annotations, images: ImageSource, problems: Problems, *, may_be_missing: bool) -> Column:
    """The boxes (M, 4) of a part in pixels; what is wrong with them is added to the problems."""

    def look(row: int) -> tuple[tuple[int, int], int] | str:
        try:
            given = images.input(one.paths[row])
            size = given.size()
            stated = one.stated[row]
            return size, given.orientation() if stated is not None and stated != size else 1
        except FlashtaskError as error:
            return error.why or error.what

    boxes = np.array(one.boxes, dtype=np.float64).reshape(-1, 4)
    image = np.array(one.images, dtype=np.int64)
    sizes = np.zeros((len(one.paths), 2))
    for row, seen in enumerate(in_threads(look, range(len(one.paths)))):
        name = os.path.basename(one.paths[row])
        if isinstance(seen, str):
            if not may_be_missing and not os.path.exists(one.paths[row]):
                problems.add("missing image", f"{one.paths[row]!r}: the file does not exist")
            continue  # one that cannot be read is refused or left out with the others of its part
        (width, height), orientation = seen
        sizes[row] = width, height
        stated = one.stated[row]
        if stated is None or stated == (width, height):
            continue
        if stated == (height, width) and orientation in _SIDEWAYS:
            own = image == row
            boxes[own] = _turned(boxes[own], orientation, stated)
            for place in own.nonzero()[0].tolist():
                if place in one.shapes:
                    one.shapes[place] = turned_shape(one.shapes[place], orientation, stated)
        else:
            what = f"{stated[0]} x {stated[1]} in the annotations, {width} x {height} in the file"
            problems.add("picture of another size", f"{name!r}: {what}")
            sizes[row] = 0
    whole = sizes[image]
    if one.is_relative:
        boxes = boxes * np.tile(np.where(whole > 0, whole, 1), 2)
    is_known: Column = np.logical_and.reduce(whole > 0, axis=1)
    for row, kind, what in _faults(boxes, whole, is_known, image, one.names):
        problems.add(kind, f"{one.places[row]}: {what}", fix=_FIXES.get(kind, ""))
    edge = np.where(is_known[:, None], np.tile(whole, 2), np.inf)
    clipped: Column = np.clip(boxes, 0, edge)
    return clipped


_FIXES = {
    "box outside of its picture": "correct the boxes; those that are less than 1 pixel beyond the edge are clipped",
    "box that is there twice": "remove the copies",
}


def _faults(
    boxes: Column, whole: Column, is_known: Column, image: Column, names: list[str]
) -> Iterator[tuple[int, str, str]]:
    """The row, the kind and the description of each box that cannot be used."""
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
            key = (image[row], names[row], *boxes[row].tolist())
            if key in seen:
                yield row, "box that is there twice", f"{names[row]} {shown}"
            seen.setdefault(key, row)


def _turned(boxes: Column, orientation: int, stored: tuple[int, int]) -> Column:
    """Boxes in the pixels of a file that lies on its side, in those of the upright picture.

    Args:
        boxes: (n, 4).
        orientation: EXIF's, 5 to 8.
        stored: (width, height) of the file as it is stored.
    """
    width, height = stored
    left, top, right, bottom = boxes.T
    if orientation in (6, 7):  # the upper edge becomes the right one
        across = (height - bottom, height - top)
    else:
        across = (top, bottom)
    down = (left, right) if orientation in (5, 6) else (width - right, width - left)
    return np.stack([across[0], down[0], across[1], down[1]], axis=1)
