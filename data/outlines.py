"""Outlines of regions: the polygons along the edges of their pixels, and the holes in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Outlines", "area_of", "outlines_of"]

_Points = np.ndarray[Any, Any]


class Outlines(NamedTuple):
    """The polygons of a region.

    Args:
        parts: (n, 2) corners of each part, the largest first. Pixels that touch at a corner only are two parts.
        holes: (n, 2) corners of each hole.
    """

    parts: list[_Points]
    holes: list[_Points]


def outlines_of(region: _Points) -> Outlines:
    """The outlines of a region (H, W) of booleans, x and y in pixels, 0 at its left and upper edge.

    A pixel is in the region exactly where its middle is in a part and in no hole.
    """
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return Outlines([], [])
    top, left = int(rows[0]), int(columns[0])
    inner = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1).astype(np.int8)
    # Edges between pixels, each so that the region is at its right hand: along upper edges to the right, and so on.
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    down, across = np.diff(inner, axis=0), np.diff(inner, axis=1)
    for change, (dx, dy), shift in (
        (down == 1, (1, 0), (0, 0)),
        (down == -1, (-1, 0), (1, 0)),
        (across == -1, (0, 1), (0, 0)),
        (across == 1, (0, -1), (0, 1)),
    ):
        is_level = dy == 0
        for row, column in np.argwhere(change).tolist():
            x, y = (column, row + 1) if is_level else (column + 1, row)
            leaving.setdefault((x + shift[0], y + shift[1]), []).append((dx, dy))
    found = Outlines([], [])
    for start in sorted(leaving, key=lambda point: point[::-1]):
        if start in leaving:
            loop = np.array(_loop(leaving, start), dtype=np.float64)
            loop += np.array([left - 1, top - 1])
            (found.parts if area_of(loop) > 0 else found.holes).append(loop)
    found.parts.sort(key=area_of, reverse=True)
    return found


def _loop(leaving: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Take the edges of one outline, whose upper left corner is `start`; its corners."""
    corners: list[tuple[int, int]] = []
    point, heading = start, (0, 0)
    while point != start or not corners:
        ways = leaving[point]
        # Where two pixels touch at a corner, a turn to the right stays at the same pixel.
        right = (-heading[1], heading[0])
        way = ways.pop(ways.index(right) if right in ways else 0)
        if not ways:
            del leaving[point]
        if way != heading:
            corners.append(point)
        point, heading = (point[0] + way[0], point[1] + way[1]), way
    return corners


def area_of(points: _Points) -> float:
    """The area in a polygon (n, 2), below 0 if it goes anticlockwise in a picture, whose y points down."""
    x, y = points.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
