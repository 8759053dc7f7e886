"""Annotations of boxes as they are written: COCO's JSON, Pascal VOC's XML, YOLO's text files, tables.

Each reader gives `Annotations`: what is written, with where it is written, and beside boxes their polygons, run lengths
and keypoints. Nothing is checked here but the form.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from flashtask.core.errors import BadDataError
from flashtask.core.yaml_reader import read_yaml
from flashtask.data.folders import list_images
from flashtask.data.layout import is_image_name, part_in_name
from flashtask.data.problems import Problems
from flashtask.data.tables import Table
from flashtask.data.targets import number_or_nan

__all__ = ["Annotations", "KeypointNames", "Points", "read_boxes_table", "read_coco", "read_voc", "read_yolo"]
__all__ += ["read_yolo_file", "read_yolo_keypoints"]

#: Keypoints of an object: x, y and visibility of each, 0 not labelled, 1 hidden, 2 visible.
Points = list[tuple[float, float, int]]

#: Usual names of the columns of a table with a row a box, after the image.
_COLUMNS = (
    ("x1", "xmin", "x_min", "left"),
    ("y1", "ymin", "y_min", "top"),
    ("x2", "xmax", "x_max", "right"),
    ("y2", "ymax", "y_max", "bottom"),
    ("label", "class", "class_name", "category", "name"),
)
#: A number for the classes of formats that have none: COCO's first.
_FIRST_ID = 1


@dataclass(frozen=True)
class KeypointNames:
    """What the keypoints of a class are called.

    Args:
        names: in their order.
        skeleton: pairs of positions in `names` that are joined by a line.
        flips: for each keypoint the one that it becomes in a mirrored picture; empty if that is not known.
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...] = ()
    flips: tuple[int, ...] = ()


@dataclass
class Annotations:
    """Boxes as a file has them.

    Args:
        paths: of the images.
        stated: (width, height) of each image by the annotations; None where they do not say it.
        images: for each box the position of its image in `paths`.
        boxes: left, top, right, bottom in pixels, or in shares of the sides if `is_relative`.
        names: the label of each box.
        crowds: for each box whether it is a region with many objects.
        areas: of each box, in square pixels; NaN for that of the rectangle.
        places: for each box where it is written.
        image_places: where images are first named, by their position; only of tables.
        groups: of each image, such as a patient; empty if there are none.
        ids: what the annotations call each class; in the order of the classes.
        shapes: of boxes that have one, by their position: polygons [x1, y1, x2, y2, ...], or COCO's run lengths.
        points: of boxes that have some, by their position: keypoints.
        keypoints: their names, by class.
        is_relative: coordinates are shares from 0 to 1.
        remarks: what is worth saying.
        problems: what was found.
        keypoint_problems: what was found of keypoints, which boxes alone do not need.
    """

    paths: list[str] = field(default_factory=list)
    stated: list[tuple[int, int] | None] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    image_places: dict[int, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    shapes: dict[int, Any] = field(default_factory=dict)
    points: dict[int, Points] = field(default_factory=dict)
    keypoints: dict[str, KeypointNames] = field(default_factory=dict)
    is_relative: bool = False
    remarks: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    keypoint_problems: Problems = field(default_factory=Problems)

    def add_image(self, path: str, stated: tuple[int, int] | None = None) -> int:
        """Take an image; gives its position."""
        self.paths.append(path)
        self.stated.append(stated)
        return len(self.paths) - 1

    def add_box(
        self,
        image: int,
        box: Sequence[Any],
        name: str,
        place: str,
        *,
        is_crowd: bool = False,
        area: Any = None,
        shape: Any = None,
        points: Sequence[Any] | None = None,
    ) -> None:
        """Take a box, or note why its numbers cannot be read; `points` are x, y, visibility of each keypoint."""
        try:
            left, top, right, bottom = (float(number) for number in box)
        except (TypeError, ValueError):
            self.problems.add("box that is not four numbers", f"{place}: {box!r}")
            return
        if points and name in self.keypoints:
            self.add_points(len(self.boxes), points, name, place)
        if shape:
            self.shapes[len(self.boxes)] = shape
        self.images.append(image)
        self.boxes.append((left, top, right, bottom))
        self.names.append(name)
        self.crowds.append(is_crowd)
        self.areas.append(float(area) if isinstance(area, (int, float)) else math.nan)
        self.places.append(place)

    def add_points(self, number: int, points: Sequence[Any], name: str, place: str) -> None:
        """Take the keypoints of the box at a position, x, y, visibility of each, or note why they cannot be read."""
        wanted = len(self.keypoints[name].names)
        try:
            across, down, seen = ([float(number) for number in points[start::3]] for start in range(3))
            if len(points) != 3 * wanted or not set(seen) <= {0, 1, 2}:
                raise ValueError
        except (TypeError, ValueError):
            what = f"{place}: {len(points)} numbers for {wanted} keypoints of {name!r}"
            self.keypoint_problems.add("keypoints that are not x, y and a visibility of 0, 1 or 2", what)
            return
        # What is not labelled has no place.
        found = [(x, y, int(v)) if v else (0.0, 0.0, 0) for x, y, v in zip(across, down, seen, strict=True)]
        self.points[number] = found

    def number_classes(self, names: Iterable[str] | None = None) -> None:
        """Give the classes numbers from 1, in the order of `names`, else sorted as text."""
        ordered = sorted(set(self.names)) if names is None else list(names)
        self.ids = {name: number for number, name in enumerate(ordered, _FIRST_ID)}


# ---- COCO


def read_coco(file: str, folder: str) -> Annotations:
    """COCO's JSON: `images`, `categories` and `annotations` with `bbox` (left, top, width, height).

    Args:
        file: the JSON file.
        folder: that the names of images count from, or a folder `images` in it.

    Raises:
        BadDataError: it is not such a file.
    """
    try:
        content = json.loads(Path(file).read_bytes())
        images, categories = content["images"], content["categories"]
        found = content.get("annotations", [])
        names = {one["id"]: str(one["name"]) for one in categories}
        keypoints = {str(one["name"]): _coco_keypoints(one) for one in categories if one.get("keypoints")}
        described = [(one["id"], os.fspath(one["file_name"]), _size_of(one)) for one in images]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadDataError(
            f"{file!r} is not an annotation file of COCO",
            why=f"{type(error).__name__}: {error}",
            fix="a JSON object with images (id, file_name), annotations (image_id, category_id, bbox) and categories",
        ) from None
    if len(set(names.values())) < len(names):
        double = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise BadDataError(f"{file!r} has two categories with the name {double!r}")
    made = Annotations(ids={name: number for number, name in names.items()}, keypoints=keypoints)
    root = _folder_of_images(folder, [name for _, name, _ in described])
    places = {
        number: made.add_image(os.path.normpath(os.path.join(root, name)), size) for number, name, size in described
    }
    short = os.path.basename(file)
    for number, one in enumerate(found):
        place = f"{short}, annotation {one.get('id', number) if isinstance(one, dict) else number}"
        try:
            image, name, (left, top, width, height) = places[one["image_id"]], names[one["category_id"]], one["bbox"]
            box = (left, top, left + width, top + height)
        except KeyError as error:
            made.problems.add("annotation without its image, category or bbox", f"{place}: {error}")
            continue
        except (TypeError, ValueError):
            made.problems.add("box that is not four numbers", f"{place}: {str(one)[:80]}")
            continue
        where = f"{place} ({os.path.basename(made.paths[image])})"
        made.add_box(
            image,
            box,
            name,
            where,
            is_crowd=bool(one.get("iscrowd")),
            area=one.get("area"),
            shape=one.get("segmentation"),
            points=one.get("keypoints"),
        )
    return made


def _coco_keypoints(category: Mapping[str, Any]) -> KeypointNames:
    """COCO counts the ends of a skeleton's lines from 1."""
    names = tuple(map(str, category["keypoints"]))
    skeleton = tuple((int(one) - 1, int(two) - 1) for one, two in category.get("skeleton") or ())
    if not all(0 <= end < len(names) for line in skeleton for end in line):
        raise ValueError(f"the skeleton of {category['name']!r} names a keypoint above {len(names)}, or below 1")
    return KeypointNames(names, skeleton)


def _size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (int(width), int(height)) if width and height else None


def _folder_of_images(folder: str, names: Sequence[str]) -> str:
    """The folder itself, or `images` in it where the first image is only there."""
    inner = os.path.join(folder, "images")
    is_inside = names and not os.path.exists(os.path.join(folder, names[0]))
    return inner if is_inside and os.path.exists(os.path.join(inner, names[0])) else folder


# ---- Pascal VOC


def read_voc(annotations: str, images: str, chosen: Sequence[str] | None = None) -> Annotations:
    """Pascal VOC: an XML file an image, with `object` elements that have a `name` and a `bndbox`.

    Coordinates are taken as they are, 0 at the left edge. `difficult` objects count like others.

    Args:
        annotations: the folder of the XML files.
        images: the folder of the images.
        chosen: the names of the files without ending that belong to the part; None means all.

    Raises:
        BadDataError: there are none, or one is not XML; all such are named.
    """
    files = sorted(str(path) for path in Path(annotations).rglob("*.xml"))
    if chosen is not None:
        by_stem = {Path(file).stem: file for file in files}
        files = [by_stem.get(name, os.path.join(annotations, f"{name}.xml")) for name in chosen]
    made = Annotations()
    known = {name: os.path.join(where, name) for where, _, names in os.walk(images) for name in names}
    by_stem = {Path(name).stem: path for name, path in known.items() if is_image_name(name)}
    for file in files:
        _read_voc_file(made, file, known, by_stem)
    made.number_classes()
    used = set(made.paths)
    without = sorted(path for path in by_stem.values() if path not in used)
    if without and chosen is None:
        made.remarks.append(
            f"{len(without)} image(s) without an XML file are not used: {os.path.basename(without[0])!r}"
            + (", ..." if len(without) > 1 else "")
        )
    return made


def _read_voc_file(made: Annotations, file: str, known: Mapping[str, str], by_stem: Mapping[str, str]) -> None:
    short = os.path.basename(file)
    try:
        text = Path(file).read_bytes()
        if b"<!ENTITY" in text:
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(text)
    except OSError as error:
        made.problems.add("missing annotation", f"{short}: {error.strerror}")
        return
    except (ElementTree.ParseError, ValueError) as error:
        made.problems.add("file that is not XML", f"{short}: {error}")
        return
    named = os.path.basename(root.findtext("filename") or "")
    path = known.get(named) or by_stem.get(Path(file).stem)
    if path is None:
        made.problems.add("missing image", f"{short}: there is no image {named or Path(file).stem!r}")
        return
    sides = [root.findtext(f"size/{side}") or "" for side in ("width", "height")]
    stated = (int(sides[0]), int(sides[1])) if all(side.isdigit() and int(side) for side in sides) else None
    image = made.add_image(path, stated)
    for number, one in enumerate(root.iter("object"), 1):
        place = f"{short}, object {number}"
        box = [one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        made.add_box(image, box, (one.findtext("name") or "").strip(), place)


# ---- YOLO


def read_yolo_file(file: str) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """YOLO's `data.yaml`: the names of the classes, and by part the folders (or lists) of images.

    Raises:
        BadDataError: it has no names, or names a folder that is not there.
    """
    content = read_yaml(Path(file)).content
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names)] if sorted(names) == list(range(len(names))) else None
    if not isinstance(names, list) or not names:
        raise BadDataError(f"{file!r} has no names of classes", fix="names: [cat, dog], or {0: cat, 1: dog}")
    root = os.path.join(os.path.dirname(os.path.abspath(file)), str(content.get("path") or ""))
    if not os.path.isdir(root):
        root = os.path.dirname(os.path.abspath(file))  # `path` is often that of another machine
    parts: dict[str, list[str]] = {}
    for part in ("train", "val", "test"):
        given = content.get(part) or (content.get("valid") if part == "val" else None)
        if given:
            parts[part] = [_yolo_place(root, str(one), file) for one in (given if isinstance(given, list) else [given])]
    return tuple(map(str, names)), parts


def read_yolo_keypoints(file: str) -> tuple[KeypointNames, int] | None:
    """The keypoints of YOLO's `data.yaml`, and the numbers of each in a line, 2 or 3; None if it has none.

    `kpt_shape` says how many there are, `flip_idx` what each becomes in a mirrored picture, `kpt_names` what they are
    called (else `0`, `1`, ...). `skeleton`, pairs of positions from 0, is flashtask's own.

    Raises:
        BadDataError: these do not fit each other.
    """
    content = read_yaml(Path(file)).content
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    try:
        count, numbers = int(shape[0]), int(shape[1])
        given = content.get("kpt_names") or range(count)
        names = tuple(map(str, next(iter(given.values())) if isinstance(given, Mapping) else given))
        flips = tuple(int(one) for one in content.get("flip_idx") or ())
        skeleton = tuple((int(one), int(two)) for one, two in content.get("skeleton") or ())
        if len(names) != count or numbers not in (2, 3) or sorted(flips) not in ([], list(range(count))):
            raise ValueError("there are other numbers of names, flips and keypoints")
        if not all(0 <= end < count for line in skeleton for end in line):
            raise ValueError("its skeleton names a keypoint that is not there")
    except (TypeError, ValueError, IndexError, StopIteration) as error:
        raise BadDataError(
            f"{file!r}: the keypoints do not fit each other", why=str(error), fix="kpt_shape: [17, 3]"
        ) from None
    return KeypointNames(names, skeleton, flips), numbers


def _yolo_place(root: str, given: str, file: str) -> str:
    for text in (given, re.sub(r"^(\.\./)+", "", given)):  # Roboflow writes ../train/images for train/images
        path = os.path.normpath(os.path.join(root, text))
        if os.path.exists(path):
            return path
    raise BadDataError(f"{file!r} names {given!r}, which is not there", why=f"it counts from {root!r}")


def read_yolo(
    names: Sequence[str], places: Sequence[str], keypoints: tuple[KeypointNames, int] | None = None
) -> Annotations:
    """YOLO's text files: beside `images/` a folder `labels/` with a line a box, `class x y width height` in shares.

    A line with the corners of a polygon is a shape in the box around it. An image without a file of labels has no
    objects.

    Args:
        names: of the classes.
        places: folders of images, or text files with a path in each line.
        keypoints: those of every object, and how many numbers each has; the numbers follow those of the box.
    """
    made = Annotations(is_relative=True)
    if keypoints is not None:
        made.keypoints = dict.fromkeys(names, keypoints[0])
    made.number_classes(names)
    missing = 0
    for place in places:
        for path in _yolo_images(place):
            image = made.add_image(path)
            head, middle, tail = path.replace(os.sep, "/").rpartition("/images/")
            file = f"{os.path.splitext(f'{head}/labels/{tail}' if middle else path)[0]}.txt"
            if not os.path.exists(file):
                missing += 1
                continue
            for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    place = f"{os.path.basename(file)}, line {number}"
                    _add_yolo_line(made, image, line.split(), names, place, keypoints)
    if missing:
        made.remarks.append(f"{missing} image(s) without a file of labels count as images without objects")
    return made


def _yolo_images(place: str) -> Sequence[str]:
    if os.path.isdir(place):
        return list_images(Path(place), "data_file").paths
    lines = Path(place).read_text(encoding="utf-8").split("\n")
    return [os.path.normpath(os.path.join(os.path.dirname(place), line.strip())) for line in lines if line.strip()]


def _add_yolo_line(
    made: Annotations,
    image: int,
    cells: list[str],
    names: Sequence[str],
    place: str,
    keypoints: tuple[KeypointNames, int] | None,
) -> None:
    more = 0 if keypoints is None else keypoints[1] * len(keypoints[0].names)
    try:
        number, *shares = int(cells[0]), *map(float, cells[1:])
    except ValueError:
        made.problems.add("box that is not four numbers", f"{place}: {' '.join(cells)[:60]!r}")
        return
    if not 0 <= number < len(names):
        made.problems.add("unknown class", f"{place}: class {number}, and there are {len(names)} names")
    elif len(shares) in (4, 4 + more):
        x, y, width, height = shares[:4]
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        points = shares[4:]
        if keypoints is not None and keypoints[1] == 2:  # (0, 0) is not labelled
            pairs = zip(points[::2], points[1::2], strict=True)
            points = [number for x, y in pairs for number in (x, y, 2.0 if x or y else 0.0)]
        made.add_box(image, box, names[number], place, points=points)
    elif len(shares) >= 6 and len(shares) % 2 == 0:
        across, down = shares[::2], shares[1::2]
        around = (min(across), min(down), max(across), max(down))
        made.add_box(image, around, names[number], place, shape=[shares])
    else:
        made.problems.add("box that is not four numbers", f"{place}: {len(shares)} numbers after the class")


# ---- tables


def columns_of_boxes(fields: Sequence[str]) -> tuple[str, ...] | None:
    """The columns x1, y1, x2, y2 and label of a table by their usual names; None if one is not there."""
    by_name = {name.strip().lower(): name for name in fields}
    found = [next((by_name[name] for name in known if name in by_name), None) for known in _COLUMNS]
    return tuple(name for name in found if name) if all(found) else None


def read_boxes_table(
    table: Table,
    inputs: str,
    fields: Sequence[str],
    folder: str,
    part: str,
    *,
    split_field: str | None = None,
    group_field: str | None = None,
) -> dict[str, Annotations]:
    """A table with a row a box, by part; a row without coordinates is an image without objects.

    Args:
        table: with the columns.
        inputs: the column with the paths of images.
        fields: x1, y1, x2, y2 in pixels, and label.
        folder: that relative paths count from.
        part: of all rows, unless a column says otherwise.
        split_field: a column with the part of each row.
        group_field: a column with the group of each image; its first row counts.
    """
    extra = [name for name in (split_field, group_field) if name is not None]
    cells = [column.tolist() for column in table.columns([inputs, *fields, *extra])]
    problems, found = table.problems, {part: Annotations(problems=table.problems)}
    known: dict[tuple[str, str], int] = {}
    for row, (name, *values) in enumerate(zip(*cells, strict=True)):
        (*box, label), more = values[: len(fields)], values[len(fields) :]
        meant = part if split_field is None else part_in_name(more[0])
        if not name:
            problems.add("empty cell", f"{table.where(row, inputs)} is empty")
            continue
        if meant is None:
            what = f"{table.where(row, split_field or '')}: {more[0]!r} is not a part of the data"
            problems.add("unknown part", what, fix="train, val or test")
            continue
        made = found.setdefault(meant, Annotations())
        path = os.path.normpath(os.path.join(folder, name))
        if (image := known.get((meant, path))) is None:
            image = known[meant, path] = made.add_image(path)
            made.image_places[image] = table.where(row, inputs)
            made.groups += more[-1:] if group_field is not None else []
        if not any((*box, label)):
            continue
        wrong = [(one, cell) for one, cell in zip(fields, box, strict=False) if not math.isfinite(number_or_nan(cell))]
        for one, cell in wrong:
            problems.add("coordinate that is not a number", f"{table.where(row, one)}: {cell!r}")
        if not label:
            problems.add("box without a label", f"{table.where(row, fields[-1])} is empty")
        if not wrong and label:
            made.add_box(image, box, label, table.where(row, ""))
    for made in found.values():
        made.number_classes()
    return {name: made for name, made in found.items() if made.paths or len(made.problems)}
