"""Where the boxes of a folder are written: COCO, Pascal VOC or YOLO, recognised by the files that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from flashtask.core.errors import BadDataError
from flashtask.data.box_files import Annotations, read_coco, read_voc, read_yolo, read_yolo_file, read_yolo_keypoints
from flashtask.data.coco_files import COCO_NAMES, coco_file
from flashtask.data.folders import list_images

__all__ = [
    "Found",
    "coco_file",
    "layout_of",
    "of_coco",
    "of_images",
    "of_yolo",
    "own_part",
    "read_folder",
    "voc_folders",
]

_YOLO_NAMES = ("data.yaml", "data.yml")


class Found(NamedTuple):
    """What one part is read from.

    Args:
        layout: in words.
        annotations: what is written there.
        root: what names of images are relative to.
    """

    layout: str
    annotations: Annotations
    root: str


def read_folder(folder: Path, part: str) -> Found:
    """The annotations of one part, whatever they are written in.

    Raises:
        BadDataError: none is recognised.
    """
    if (file := coco_file(folder, part)) is not None:
        return of_coco(file, folder)
    if (yolo := _yolo_file(folder, part)) is not None:
        return of_yolo(yolo, part)
    if voc_folders(folder) is not None:
        return _of_voc(folder, part)
    raise BadDataError(
        f"{part}_folder: there are no boxes in {str(folder)!r}",
        why=f"looked for {', '.join(COCO_NAMES)}, annotations/instances_{part}.json, data.yaml and XML files",
        fix="from_coco(train_folder=..., train_ann_file=...), or a table: from_csv",
    )


def layout_of(folder: Path, part: str) -> str:
    """What the boxes of a folder are written in, without reading them; empty if it is not recognised."""
    if (file := coco_file(folder, part) or _yolo_file(folder, part)) is not None:
        return os.path.relpath(file, folder)
    return "Pascal VOC" if voc_folders(folder) is not None else ""


def own_part(folder: Path, part: str) -> Found | None:
    """A part that a whole data set, given for training, names itself; None if it does not."""
    yolo = next((str(folder / name) for name in _YOLO_NAMES if (folder / name).is_file()), None)
    if yolo is not None and coco_file(folder, "train") is None:
        return of_yolo(yolo, part) if part in read_yolo_file(yolo)[1] else None
    listed = (folder / "ImageSets" / "Main" / f"{part}.txt").is_file() and voc_folders(folder) is not None
    return _of_voc(folder, part) if listed else None


def of_coco(file: str, folder: Path) -> Found:
    """The boxes in COCO's file for a folder of images."""
    return Found(f"COCO, {os.path.basename(file)}", read_coco(file, str(folder)), str(folder))


def _yolo_file(folder: Path, part: str) -> str | None:
    """The `data.yaml` of a whole data set, or of the one that a part's folder belongs to."""
    for place in (folder, folder.parent, folder.parent.parent):
        for name in _YOLO_NAMES:
            if (place / name).is_file():
                named = read_yolo_file(str(place / name))[1].get(part, [])
                inside = any(Path(one) == folder or folder in Path(one).parents for one in named)
                return str(place / name) if place == folder or inside else None
    return None


def of_yolo(file: str, part: str) -> Found:
    """A part of the data set that a `data.yaml` describes.

    Raises:
        BadDataError: it has no such part.
    """
    names, parts = read_yolo_file(file)
    if part not in parts:
        raise BadDataError(f"{file!r} names no images for {part}", why=f"it has {', '.join(parts) or 'no part'}")
    annotations = read_yolo(names, parts[part], read_yolo_keypoints(file))
    return Found(f"YOLO, {os.path.basename(file)}", annotations, os.path.dirname(file))


def voc_folders(folder: Path) -> tuple[Path, Path] | None:
    """Where the XML files and the images of VOC are; None if there are no XML files."""
    for name, images in (("Annotations", "JPEGImages"), ("annotations", "images"), (".", ".")):
        place = folder / name
        if place.is_dir() and (folder / images).is_dir() and any(place.glob("*.xml")):
            return place, folder / images
    return None


def _of_voc(folder: Path, part: str) -> Found:
    places = voc_folders(folder)
    assert places is not None
    sets = folder / "ImageSets" / "Main"
    chosen = None
    for name in (part, "trainval") if part == "train" else (part,):
        if (sets / f"{name}.txt").is_file():
            chosen = (sets / f"{name}.txt").read_text(encoding="utf-8").split()
            break
    said = "Pascal VOC" if chosen is None else f"Pascal VOC, ImageSets/Main/{name}.txt"
    return Found(said, read_voc(str(places[0]), str(places[1]), chosen), str(folder))


def of_images(folder: Path) -> Found:
    """The images of a folder, at any depth, without boxes."""
    made = Annotations()
    for path in list_images(folder, "predict_folder").paths:
        made.add_image(path)
    return Found("images", made, str(folder))
