"""Annotated pictures, whatever they were written in: what `convert_annotations` reads and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flashtask.core.errors import BadDataError
from flashtask.core.files import missing_file
from flashtask.data.box_checks import Pictures, checked_boxes, look_at_pictures
from flashtask.data.box_files import (
    Annotations,
    KeypointNames,
    Points,
    columns_of_boxes,
    read_boxes_table,
    read_coco,
    read_yolo_file,
)
from flashtask.data.box_layouts import Found, layout_of, of_yolo, own_part, read_folder
from flashtask.data.image_source import FILES
from flashtask.data.layout import existing_folder, is_table_name, split_folders
from flashtask.data.masks import rle_counts, rle_mask
from flashtask.data.outlines import Outlines, area_of, outlines_of
from flashtask.data.problems import Problems
from flashtask.data.semantic_segmentation import IGNORED, SemanticSegmentationData, mask_folders
from flashtask.data.shapes import turned_shape
from flashtask.data.tables import open_table

__all__ = ["Annotated", "Object", "Part", "Picture", "Region", "read_annotated"]

#: Parts of a data set that have annotations.
_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Region:
    """The pixels of an object.

    Args:
        size: (width, height) of the picture.
        polygons: (n, 2) corners of each polygon; a pixel is in the region if its middle is in one of them.
        counts: in place of polygons COCO's run lengths, as numbers or compressed text.
    """

    size: tuple[int, int]
    polygons: tuple[np.ndarray[Any, Any], ...] = ()
    counts: str | Sequence[int] | None = None

    @cached_property
    def outlines(self) -> Outlines:
        """Its parts and holes."""
        if self.counts is not None:
            return outlines_of(rle_mask(self.counts, self.size))
        return Outlines(sorted(self.polygons, key=lambda one: -abs(area_of(one))), [])

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of all parts."""
        corners = np.concatenate(self.outlines.parts)
        (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        return left, top, right, bottom

    @property
    def area(self) -> float:
        """In square pixels; where polygons lie over each other, both count."""
        parts, holes = self.outlines
        return sum(abs(area_of(one)) for one in parts) - sum(abs(area_of(one)) for one in holes)

    def to_coco(self) -> Any:
        """What COCO calls `segmentation`."""
        if self.counts is None:
            return [polygon.ravel().tolist() for polygon in self.polygons]
        return {"size": [self.size[1], self.size[0]], "counts": self.counts}


@dataclass
class Object:
    """An object in a picture; numbers are pixels of the upright picture."""

    label: str
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool = False
    region: Region | None = None
    points: Points | None = None


@dataclass
class Picture:
    """A picture with its objects; `size` is (width, height)."""

    path: str
    size: tuple[int, int]
    objects: list[Object]


@dataclass
class Part:
    """A part of the data, `train`, `val` or `test`; an empty name is a data set without parts."""

    name: str
    layout: str
    pictures: list[Picture]


@dataclass
class Annotated:
    """A data set.

    Args:
        parts: in the order train, val, test.
        classes: their numbers, all different and above 0, in the order of the classes.
        keypoints: their names, by class.
        remarks: what is worth saying.
        ignored: pictures with pixels that belong to no class, which only masks have.
    """

    parts: list[Part]
    classes: dict[str, int]
    keypoints: dict[str, KeypointNames] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    ignored: int = 0

    @property
    def objects(self) -> Iterator[tuple[Picture, Object]]:
        """All of them, with the picture of each."""
        return ((picture, one) for part in self.parts for picture in part.pictures for one in picture.objects)


def read_annotated(data: str | os.PathLike[str]) -> Annotated:
    """The pictures and annotations of a data set, whose layout is recognised.

    Args:
        data: a folder as `ObjectDetectionData.from_folders` or `SemanticSegmentationData.from_folders` takes it, or one
            with `train/`, `val/` and `test/` that are such; COCO's JSON file; a `data.yaml`; a table with a row a box.

    Raises:
        MissingInputError: there is no such file or folder.
        BadDataError: nothing is recognised, or annotations cannot be used; all are named.
    """
    path = Path(os.path.abspath(os.path.expanduser(os.fspath(data))))
    if path.is_file():
        return _of_found(_of_file(path))
    if not path.suffix or path.is_dir():
        path = existing_folder(path, "DATA")
    else:
        raise missing_file(str(path))
    inside = {part: folder for part, folder in split_folders(path).items() if part in _PARTS}
    if (layout_of(path, "train") and not _are_annotated(inside)) or (path / "data.yaml").is_file():
        whole = {part: found for part in _PARTS if (found := own_part(path, part)) is not None}
        return _of_found(whole or {"": read_folder(path, "train")})
    if _are_annotated(inside):
        return _of_found({part: read_folder(folder, part) for part, folder in inside.items()})
    if mask_folders(path):
        return _of_masks(path)
    raise BadDataError(
        f"there are no annotations in {str(path)!r}",
        why="looked for COCO's JSON, XML files of Pascal VOC, YOLO's data.yaml, and images/ beside masks/",
        fix="name the file: a .json file of COCO, data.yaml, or a table with a row a box",
    )


def _are_annotated(folders: Mapping[str, Path]) -> bool:
    return any(layout_of(folder, part) for part, folder in folders.items())


def _of_file(path: Path) -> dict[str, Found]:
    """What a file that the user names describes, by part.

    Raises:
        BadDataError: it is none that describes boxes.
    """
    if path.suffix in (".yaml", ".yml"):
        return {part: of_yolo(str(path), part) for part in read_yolo_file(str(path))[1]}
    if path.suffix == ".json":
        made = read_coco(str(path), str(path.parent))
        stem = path.stem.removeprefix("instances_").removeprefix("person_keypoints_")
        for folder in (path.parent.parent / stem, path.parent.parent):  # COCO's own layout: annotations/ beside images
            if made.paths and not os.path.exists(made.paths[0]):
                made = read_coco(str(path), str(folder))
        return {"": Found(f"COCO, {path.name}", made, str(path.parent))}
    if is_table_name(path):
        table = open_table(str(path), "DATA")
        inputs = table.input_field(None)
        fields = columns_of_boxes([name for name in table.fields if name != inputs])
        if fields is not None:
            made = read_boxes_table(table, inputs, fields, str(path.parent), "train")["train"]
            return {"": Found(f"{path.name}, a row a box", made, str(path.parent))}
    raise BadDataError(
        f"{str(path)!r} is not a file of annotations",
        fix="a .json file of COCO, data.yaml, or a table with the columns x1, y1, x2, y2 and label",
    )


def _of_found(found: Mapping[str, Found]) -> Annotated:
    problems, parts, remarks = Problems(), [], []
    for name, one in found.items():
        problems.take(one.annotations.problems)
        parts.append(Part(name, one.layout, _pictures(one.annotations, problems)))
        remarks += one.annotations.remarks
    problems.refuse("; ".join(dict.fromkeys(one.layout for one in found.values())))
    if not any(part.pictures for part in parts):
        raise BadDataError(f"there are no images ({parts[0].layout})")
    annotations = [one.annotations for one in found.values()]
    keypoints = {name: names for one in reversed(annotations) for name, names in one.keypoints.items()}
    return Annotated(parts, _numbers(annotations), keypoints, remarks)


def _numbers(found: Sequence[Annotations]) -> dict[str, int]:
    """The numbers of all classes: those of the annotations, or 1, 2, ... where these contradict each other."""
    numbers: dict[str, int] = {}
    for one in found:
        names = {**one.ids, **{name: -1 for name in one.names if name not in one.ids}}
        for name, number in names.items():
            numbers.setdefault(name, number)
    if min(numbers.values(), default=1) < 1 or len(set(numbers.values())) < len(numbers):
        return {name: number for number, name in enumerate(numbers, 1)}
    return dict(sorted(numbers.items(), key=lambda one: one[1]))


def _pictures(one: Annotations, problems: Problems) -> list[Picture]:
    seen = look_at_pictures(one, FILES, problems)
    boxes, points = checked_boxes(one, seen, problems), seen.keypoints(one)
    sizes = [(int(width), int(height)) for width, height in seen.sizes.tolist()]
    made = [Picture(path, size, []) for path, size in zip(one.paths, sizes, strict=True)]
    for path, size in zip(one.paths, sizes, strict=True):
        if not all(size) and os.path.exists(path):
            problems.add("image that cannot be read", repr(path))
    problems.take(one.keypoint_problems)
    for number, (row, label) in enumerate(zip(one.images, one.names, strict=True)):
        left, top, right, bottom = boxes[number].tolist()
        found = Object(label, (left, top, right, bottom), one.areas[number], one.crowds[number])
        if number in one.shapes and all(sizes[row]):
            found.region = _region(one.shapes[number], row, seen, one.places[number], problems)
        found.points = points.get(number)
        if not found.area > 0 or one.is_relative:
            found.area = (right - left) * (bottom - top) if found.region is None else found.region.area
        made[row].objects.append(found)
    return made


def _region(shape: Any, row: int, seen: Pictures, place: str, problems: Problems) -> Region | None:
    """What is written of an object's pixels; None if that is nothing, or wrong."""
    width, height = (int(side) for side in seen.sizes[row])
    try:
        if isinstance(shape, Mapping):
            upright = turned_shape(shape, *seen.turned[row]) if row in seen.turned else shape
            is_empty = not rle_mask(upright["counts"], (width, height)).any()
            return None if is_empty else Region((width, height), counts=upright["counts"])
        polygons = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in shape]
        if not all(np.isfinite(polygon).all() for polygon in polygons):
            raise ValueError("a corner is not finite")
    except (BadDataError, ValueError, TypeError, KeyError) as error:
        problems.add("region that is neither polygons nor run lengths", f"{place}: {error}")
        return None
    kept = tuple(seen.points(row, polygon) for polygon in polygons if len(polygon) > 2)
    return Region((width, height), kept) if kept else None


def _of_masks(path: Path) -> Annotated:
    """Pictures beside masks: the pixels of a class are one object, and those of the background are none."""
    made = SemanticSegmentationData.from_folders(path)
    labels = list(made.classes)
    is_object = [value or label not in ("0", "background") for label, value in made.classes.items()]
    values = [value for value, is_one in zip(made.classes.values(), is_object, strict=True) if is_one]
    names = [label for label, is_one in zip(labels, is_object, strict=True) if is_one]
    are_numbers = all(0 < value < IGNORED for value in values)
    found = Annotated([], dict(zip(names, values if are_numbers else range(1, len(names) + 1), strict=True)))
    for part in _PARTS:
        pictures = []
        for image, classes in made.true_masks(part):
            objects = [
                _of_pixels(labels[number], classes == number)
                for number in np.unique(classes).tolist()
                if number != IGNORED and is_object[number]
            ]
            found.ignored += bool((classes == IGNORED).any())
            pictures.append(Picture(image, (classes.shape[1], classes.shape[0]), objects))
        if pictures:
            found.parts.append(Part(part, "images beside masks", pictures))
    if len(found.parts) == 1 and not split_folders(path / "images"):
        found.parts[0].name = ""
    return found


def _of_pixels(label: str, mask: np.ndarray[Any, Any]) -> Object:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Object(label, box, float(mask.sum()), region=Region(mask.shape[::-1], counts=rle_counts(mask)))
