"""The pixels of single objects: polygons and run lengths of COCO, shares of YOLO, pictures of numbered objects.

In a table a shape is JSON: `{"size": [height, width], "counts": "..."}`, a list of polygons, or `{"shares": [...]}`
with polygons in shares of the sides. It becomes an array when a sample is loaded, and only around the object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashtask.core.errors import BadDataError
from flashtask.data.masks import compressed, draw_polygon, rle_counts, rle_mask, run_lengths

__all__ = ["Block", "Numbered", "block_counts", "numbered_objects", "polygons_of", "shape_block", "shape_fault"]
__all__ += ["shape_text", "turned_shape"]

_Array = np.ndarray[Any, Any]


class Block(NamedTuple):
    """The part of a picture that holds an object.

    Args:
        left: its first column in the picture.
        top: its first row.
        inside: (h, w) bool, whether a pixel belongs to the object.
    """

    left: int
    top: int
    inside: _Array

    @property
    def place(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        height, width = self.inside.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


class Numbered(NamedTuple):
    """An object of a picture whose values are numbers of objects.

    Args:
        number: its value.
        box: left, top, right, bottom in pixels.
        area: pixels.
        shape: COCO's run lengths.
    """

    number: int
    box: tuple[int, int, int, int]
    area: int
    shape: dict[str, Any]


def shape_text(shape: Any, *, is_relative: bool = False) -> str:
    """A shape in which `shape_fault` finds nothing, as a table has it."""
    if isinstance(shape, Mapping):
        counts = shape["counts"]
        text = counts if isinstance(counts, str) else compressed(list(counts))
        return json.dumps({"size": list(shape["size"]), "counts": text})
    polygons = [polygon for polygon in shape if len(polygon) >= 6]
    return json.dumps({"shares": polygons} if is_relative else polygons)


def shape_fault(shape: Any, size: tuple[int, int] | None) -> str:
    """What is wrong with COCO's `segmentation`, in words; empty if it can be used. Polygons of two points are left out.

    Args:
        shape: polygons, or run lengths.
        size: (width, height) of the picture if it is known, as it is stored or upright.
    """
    try:
        if isinstance(shape, Mapping):
            height, width = shape["size"]
            if size is not None and sorted((width, height)) != sorted(size):
                return f"run lengths of {width} x {height} pixels, and the picture has {size[0]} x {size[1]}"
            return "" if any(run_lengths(shape["counts"], (width, height))[1::2]) else "run lengths without a pixel"
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if not polygons or any(len(polygon) % 2 for polygon in polygons):
            return f"polygons of three points or more have 6, 8, ... numbers, not {[len(one) for one in shape][:8]}"
        is_finite = all(math.isfinite(number) for polygon in polygons for number in polygon)
        return "" if is_finite else "a polygon with a number that is not finite"
    except BadDataError as error:
        return error.what
    except (TypeError, ValueError, KeyError):
        return f"neither polygons nor run lengths: {str(shape)[:60]}"


def polygons_of(content: Any, size: tuple[int, int]) -> list[list[float]]:
    """The polygons of a shape's parsed JSON, in pixels of a picture of this (width, height)."""
    if not isinstance(content, Mapping):
        return list(content)
    return [[number * size[place % 2] for place, number in enumerate(polygon)] for polygon in content["shares"]]


def shape_block(text: str, size: tuple[int, int]) -> Block:
    """Where the object of a table's shape is in a picture of this (width, height).

    Raises:
        BadDataError: the run lengths are of another size.
    """
    content = json.loads(text)
    if isinstance(content, Mapping) and "counts" in content:
        if tuple(content["size"]) != size[::-1]:
            height, width = content["size"]
            raise BadDataError(f"run lengths of {width} x {height} pixels in a picture of {size[0]} x {size[1]}")
        return _block_of_runs(run_lengths(content["counts"], size), size[1])
    polygons = [np.array(one, dtype=np.float64).reshape(-1, 2) for one in polygons_of(content, size)]
    points = np.concatenate(polygons)
    first = np.clip(np.floor(points.min(axis=0)), 0, size).astype(int)
    last = np.clip(np.ceil(points.max(axis=0)), first, size).astype(int)
    width, height = (last - first).tolist()
    drawn = np.zeros((height, width), dtype=np.uint8)
    for polygon in polygons:
        draw_polygon(drawn, polygon - first, 1)
    return Block(int(first[0]), int(first[1]), drawn > 0)


def _block_of_runs(numbers: Sequence[int], height: int) -> Block:
    """The columns that run lengths cover."""
    edges = np.cumsum(numbers)
    ends = edges[1::2]
    starts = edges[::2][: len(ends)]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return Block(0, 0, np.zeros((0, 0), dtype=bool))
    left, right = int(starts[0]) // height, -(-int(ends[-1]) // height)
    steps = np.zeros((right - left) * height + 1, dtype=np.int32)
    np.add.at(steps, starts - left * height, 1)
    np.add.at(steps, ends - left * height, -1)
    return Block(left, 0, (np.cumsum(steps[:-1]) > 0).reshape(-1, height).T)


def turned_shape(shape: Any, orientation: int, stored: tuple[int, int]) -> Any:
    """A shape in the pixels of a file that lies on its side, in those of the upright picture.

    Args:
        shape: polygons or run lengths; one that is neither is kept.
        orientation: EXIF's, 5 to 8.
        stored: (width, height) of the file as it is stored.
    """
    width, height = stored
    try:
        if isinstance(shape, Mapping):
            region = rle_mask(shape["counts"], stored)
            turned = {5: region.T, 6: np.rot90(region, -1), 7: region.T[::-1, ::-1], 8: np.rot90(region)}[orientation]
            return {"size": [width, height], "counts": rle_counts(turned)}
        found = []
        for polygon in shape:
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
            across = height - points[:, 1] if orientation in (6, 7) else points[:, 1]
            down = points[:, 0] if orientation in (5, 6) else width - points[:, 0]
            found.append(np.stack([across, down], axis=1).ravel().tolist())
        return found
    except (BadDataError, TypeError, ValueError, KeyError):
        return shape


def block_counts(block: Block, size: tuple[int, int]) -> str:
    """COCO's run lengths of an object in a picture of this (width, height)."""
    rows, columns = block.place
    strip = np.zeros((size[1], columns.stop - columns.start), dtype=bool)
    strip[rows] = block.inside
    return rle_counts(strip, columns.start * size[1], (size[0] - columns.stop) * size[1])


def numbered_objects(values: _Array) -> Iterator[Numbered]:
    """The objects of a picture (H, W) in which each has a number of its own, 1 or more; 0 is none."""
    height = values.shape[0]
    flat = values.T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    numbers, first = np.unique(flat[starts][order], return_index=True)
    for number, runs in zip(numbers.tolist(), np.split(order, first[1:]), strict=True):
        if not number:
            continue
        begin, end = starts[runs], ends[runs]
        lengths = np.stack([begin - np.concatenate([[0], end[:-1]]), end - begin], axis=1).ravel().tolist()
        is_broken = (begin // height != (end - 1) // height).any()  # a run that goes on in the next column
        rows = (0, height) if is_broken else (int((begin % height).min()), int(((end - 1) % height).max()) + 1)
        box = (int(begin[0]) // height, rows[0], int(end[-1] - 1) // height + 1, rows[1])
        counts = compressed([*lengths, flat.size - int(end[-1])])
        shape = {"size": list(values.shape), "counts": counts}
        yield Numbered(number, box, int((end - begin).sum()), shape)
