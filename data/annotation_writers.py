"""Annotated pictures as COCO's JSON, VOC's XML, YOLO's text files, tables and masks; and what each cannot hold."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from flashtask.core.errors import BadDataError
from flashtask.data.annotated import Annotated, Object, Part, Picture
from flashtask.data.box_files import KeypointNames
from flashtask.data.masks import default_colours, read_mask, regions_text
from flashtask.data.mirrored import mirrored_keypoints

__all__ = ["FORMATS", "LOSSES", "Output", "losses"]

#: Pixels by which a box may differ from the one around its outline.
_NEAR = 1.0

#: What a format may be unable to hold, and what becomes of it.
LOSSES: Mapping[str, tuple[str, str]] = {
    "crowd": ("crowd regions", "are left out"),
    "region": ("segmentations", "become their boxes"),
    "rotated": ("rotated boxes", "become the upright boxes around them"),
    "holes": ("regions with holes", "are filled"),
    "parts": ("objects of several parts", "keep their largest part"),
    "box": ("boxes that are not those around their outlines", "become those"),
    "area": ("areas that are not those of the boxes", "become those"),
    "points": ("objects with keypoints", "lose them"),
    "names": ("objects with other keypoints than the first class", "lose them"),
    "flips": ("lists of what keypoints become in a mirror", "are left out"),
    "alone": ("objects without a region", "are left out"),
    "instances": ("objects beside others of their class", "become one region of pixels"),
    "covered": ("objects that others lie over", "lose these pixels"),
    "ignored": ("masks with pixels that belong to no class", "have background there"),
}


@dataclass(frozen=True)
class Output:
    """Where files are written.

    Args:
        folder: that is filled.
        target: what it will be called.
        copies: whether images are copied; else files refer to them, and folders hold links to them.
    """

    folder: Path
    target: Path
    copies: bool

    def file(self, *names: str) -> Path:
        """A file in the folder, whose own folder is made."""
        made = self.folder.joinpath(*names)
        made.parent.mkdir(parents=True, exist_ok=True)
        return made

    def put(self, source: str, *names: str) -> None:
        """An image in the folder, as a copy or a relative link."""
        place = self.file(*names)
        if self.copies:
            shutil.copyfile(source, place)
        else:
            place.symlink_to(os.path.relpath(os.path.realpath(source), self.target.joinpath(*names).parent))

    def refer(self, source: str, name: str, *folder: str) -> str:
        """What a file in `folder` calls an image: where it is, or, if images are copied, `name` below the file."""
        if self.copies:
            self.put(source, *folder, *name.split("/"))
            return name
        return os.path.relpath(source, self.target.joinpath(*folder)).replace(os.sep, "/")


# ---- what is lost


def losses(data: Annotated, form: str) -> dict[str, int]:
    """How many of each of `LOSSES` a format cannot hold."""
    found: Counter[str] = Counter()
    is_pose = form == "yolo" and bool(data.keypoints)
    common = next(iter(data.keypoints.values()), None)
    if form == "coco":
        known = set(data.keypoints.values())
        found["flips"] = sum(bool(one.flips) and one.flips != mirrored_keypoints(one.names) for one in known)
    for _, one in data.objects:
        own = _of_object(one)
        held = {kind for kind in own if form in _UNABLE[kind]}
        if is_pose:
            held = held - {"holes", "parts", "box"} | {"region", "rotated"} & own
            if one.points is not None and data.keypoints[one.label] != common:
                held |= {"names"}
        found.update({"crowd"} if "crowd" in held else held)
    if form == "png":
        found.update(_in_masks(data))
    found["ignored"] = data.ignored
    return {kind: found[kind] for kind in LOSSES if found[kind]}


#: For each loss of a single object the formats that have it.
_UNABLE: Mapping[str, tuple[str, ...]] = {
    "crowd": ("voc", "yolo", "csv", "png"),
    "region": ("voc", "csv"),
    "rotated": ("voc", "csv"),
    "holes": ("yolo",),
    "parts": ("yolo",),
    "box": ("yolo",),
    "area": ("voc", "yolo", "csv"),
    "points": ("voc", "csv", "png"),
    "alone": ("png",),
}


def _of_object(one: Object) -> set[str]:
    """What the object has that not every format holds."""
    found = {"crowd"} if one.is_crowd else set()
    if one.points is not None:
        found.add("points")
    left, top, right, bottom = one.box
    if one.region is None:
        area = (right - left) * (bottom - top)
        return found | {"alone"} | ({"area"} if abs(one.area - area) > max(1.0, 0.001 * area) else set())
    parts, holes = one.region.outlines
    differs = max(abs(a - b) for a, b in zip(one.box, one.region.box, strict=True)) >= _NEAR
    if holes:
        found.add("holes")
    if len(parts) > 1:
        found.add("parts")
    elif differs:
        found.add("box")
    if len(parts) == 1 and not holes and len(parts[0]) == 4:
        sides = np.roll(parts[0], -1, axis=0) - parts[0]
        if (np.abs(sides).min(axis=1) < 1e-3).all() and not differs:
            return found  # its box says it all
        is_right = np.abs((sides * np.roll(sides, -1, axis=0)).sum(axis=1)) <= 0.02 * (sides**2).sum(axis=1)
        return found | ({"rotated"} if is_right.all() else {"region"})
    return found | {"region"}


def _number_of(numbers: Mapping[int, int], one: Object) -> int:
    """The number of an object, by its identity."""
    return numbers[id(one)]


def _in_masks(data: Annotated) -> Counter[str]:
    """Objects that one mask of classes does not tell apart or does not show as a whole."""
    found: Counter[str] = Counter()
    for part in data.parts:
        for picture in part.pictures:
            shown = [one for one in picture.objects if one.region is not None and not one.is_crowd]
            counts = Counter(one.label for one in shown)
            found["instances"] += sum(count for count in counts.values() if count > 1)
            numbers = {id(one): number for number, one in enumerate(shown, 1)}
            labels = {number: one.label for number, one in enumerate(shown, 1)}
            drawn = _drawn(picture, shown, partial(_number_of, numbers))
            for one in shown:
                whole = _drawn(picture, [one], lambda _: 1) > 0
                found["covered"] += any(labels[n] != one.label for n in np.unique(drawn[whole]).tolist())
    return found


def _drawn(picture: Picture, objects: Sequence[Object], number: Callable[[Object], int]) -> np.ndarray[Any, Any]:
    """A mask (H, W) of objects; smaller ones lie over larger ones."""
    ordered = sorted(objects, key=lambda one: -one.area)
    regions = [(number(one), one.region.to_coco()) for one in ordered if one.region is not None]
    return read_mask(regions_text(picture.size, regions))[0]


# ---- names


def _names(part: Part, *, are_flat: bool) -> list[str]:
    """What the images of a part are called below the folder of all.

    Args:
        part: with the pictures.
        are_flat: all lie in one folder, and files beside them are named after them, without the ending.

    Raises:
        BadDataError: two have one name.
    """
    common = os.path.commonpath([os.path.dirname(one.path) for one in part.pictures])
    names = [os.path.relpath(one.path, common).replace(os.sep, "/") for one in part.pictures]
    if not are_flat:
        return names
    names = [name.replace("/", "_") for name in names]
    known: dict[str, str] = {}
    for name, one in zip(names, part.pictures, strict=True):
        first = known.setdefault(os.path.splitext(name)[0], one.path)
        if first != one.path:
            raise BadDataError(
                f"{first!r} and {one.path!r} would have one file of annotations",
                why="it is named after the image, without the ending",
                fix="--format coco, or rename one",
            )
    return names


def _kept(picture: Picture) -> Iterable[Object]:
    return (one for one in picture.objects if not one.is_crowd)


# ---- COCO


def _coco(data: Annotated, output: Output) -> None:
    """`PART/annotations.json`, in which images are named relative to it."""
    for part in data.parts:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for name, picture in zip(_names(part, are_flat=False), part.pictures, strict=True):
            width, height = picture.size
            shown = output.refer(picture.path, name, part.name)
            images.append({"id": len(images) + 1, "file_name": shown, "width": width, "height": height})
            for one in picture.objects:
                annotations.append(_coco_object(one, len(annotations) + 1, len(images), data))
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [_coco_class(name, number, data) for name, number in data.classes.items()],
        }
        output.file(part.name, "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def _coco_class(name: str, number: int, data: Annotated) -> dict[str, Any]:
    made: dict[str, Any] = {"id": number, "name": name}
    if (keypoints := data.keypoints.get(name)) is not None:
        made["keypoints"] = list(keypoints.names)
        made["skeleton"] = [[one + 1, two + 1] for one, two in keypoints.skeleton]
    return made


def _coco_object(one: Object, number: int, image: int, data: Annotated) -> dict[str, Any]:
    left, top, right, bottom = one.box
    made: dict[str, Any] = {
        "id": number,
        "image_id": image,
        "category_id": data.classes[one.label],
        "bbox": [left, top, right - left, bottom - top],
        "area": one.area,
        "iscrowd": int(one.is_crowd),
    }
    if one.region is not None:
        made["segmentation"] = one.region.to_coco()
    if one.points is not None:
        made["keypoints"] = [number for point in one.points for number in point]
        made["num_keypoints"] = sum(point[2] > 0 for point in one.points)
    return made


# ---- Pascal VOC


def _voc(data: Annotated, output: Output) -> None:
    """`PART/Annotations/NAME.xml` and `PART/JPEGImages/`."""
    for part in data.parts:
        for name, picture in zip(_names(part, are_flat=True), part.pictures, strict=True):
            output.put(picture.path, part.name, "JPEGImages", name)
            root = ElementTree.Element("annotation")
            _texts(root, folder="JPEGImages", filename=name)
            width, height = picture.size
            _texts(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
            for one in _kept(picture):
                made = ElementTree.SubElement(root, "object")
                _texts(made, name=one.label)
                corners = zip(("xmin", "ymin", "xmax", "ymax"), map(_short, one.box), strict=True)
                _texts(ElementTree.SubElement(made, "bndbox"), **dict(corners))
            ElementTree.indent(root)
            file = output.file(part.name, "Annotations", f"{os.path.splitext(name)[0]}.xml")
            file.write_bytes(ElementTree.tostring(root, encoding="utf-8"))


def _texts(element: ElementTree.Element, **texts: object) -> None:
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)


def _short(number: float) -> str:
    """All digits that are needed to read the same number again, without those of a whole one."""
    return str(int(number)) if number == int(number) else repr(number)


# ---- YOLO


def _yolo(data: Annotated, output: Output) -> None:
    """`data.yaml`, `PART/images/` and `PART/labels/NAME.txt`: boxes, polygons where there are some, or keypoints."""
    keypoints = next(iter(data.keypoints.values()), None)
    numbers = {name: number for number, name in enumerate(data.classes)}
    content: dict[str, Any] = {}
    for part in data.parts:
        folder = part.name or "train"
        content[folder] = f"{folder}/images"
        for name, picture in zip(_names(part, are_flat=True), part.pictures, strict=True):
            output.put(picture.path, folder, "images", name)
            lines = [
                " ".join([str(numbers[one.label]), *_shares(one, picture.size, keypoints, data)]) + "\n"
                for one in _kept(picture)
            ]
            output.file(folder, "labels", f"{os.path.splitext(name)[0]}.txt").write_text("".join(lines))
    content["names"] = {number: name for name, number in numbers.items()}
    if keypoints is not None:
        content["kpt_shape"] = [len(keypoints.names), 3]
        if flips := keypoints.flips or mirrored_keypoints(keypoints.names):
            content["flip_idx"] = list(flips)
        content["kpt_names"] = {number: list(keypoints.names) for number in numbers.values()}
        if keypoints.skeleton:
            content["skeleton"] = [list(line) for line in keypoints.skeleton]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    output.file("data.yaml").write_text(text, encoding="utf-8")


def _shares(one: Object, size: tuple[int, int], keypoints: KeypointNames | None, data: Annotated) -> list[str]:
    width, height = size
    if keypoints is None and one.region is not None and one.region.outlines.parts:
        return [repr(share) for share in (one.region.outlines.parts[0] / size).ravel().tolist()]
    left, top, right, bottom = one.box
    numbers = [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
    shares = [repr(number) for number in numbers]
    if keypoints is None:
        return shares
    is_known = one.points is not None and data.keypoints.get(one.label) == keypoints
    points = one.points if is_known and one.points is not None else [(0.0, 0.0, 0)] * len(keypoints.names)
    return [*shares, *(text for x, y, seen in points for text in (repr(x / width), repr(y / height), str(seen)))]


# ---- tables


def _csv(data: Annotated, output: Output) -> None:
    """`PART.csv` with a row a box; an image without objects has a row with its path alone."""
    for part in data.parts:
        with output.file(f"{part.name or 'boxes'}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "x1", "y1", "x2", "y2", "label"])
            for name, picture in zip(_names(part, are_flat=False), part.pictures, strict=True):
                place = "/".join(filter(None, ("images", part.name, name)))
                path = output.refer(picture.path, place)
                rows = [[path, *map(_short, one.box), one.label] for one in _kept(picture)]
                writer.writerows(rows or [[path, *[""] * 5]])


# ---- masks


def _png(data: Annotated, output: Output) -> None:
    """`images/PART/`, `masks/PART/NAME.png` with the numbers of classes, 0 for the background, and `classes.txt`."""
    numbers = {name: number for number, name in enumerate(data.classes, 1)}
    palette = np.zeros((256, 3), dtype=np.uint8)
    for number, colour in enumerate(default_colours(len(numbers) + 1)):
        palette[number] = tuple(bytes.fromhex(colour[1:]))
    for part in data.parts:
        for name, picture in zip(_names(part, are_flat=True), part.pictures, strict=True):
            output.put(picture.path, "images", part.name, name)
            classes = _drawn(picture, list(_kept(picture)), lambda one: numbers[one.label])
            made = Image.fromarray(classes.astype(np.uint8), "L").convert("P")
            made.putpalette(palette.ravel().tobytes())
            made.save(output.file("masks", part.name, f"{os.path.splitext(name)[0]}.png"))
    output.file("classes.txt").write_text("\n".join(["background", *numbers]) + "\n", encoding="utf-8")


#: What writes a data set in each format.
FORMATS: Mapping[str, Callable[[Annotated, Output], None]] = {
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "csv": _csv,
    "png": _png,
}
