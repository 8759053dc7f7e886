"""`InstanceSegmentationData`: images with the mask of each object, from COCO, YOLO, label images and arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.box_files import Annotations, read_yolo_file
from flashtask.data.box_layouts import Found, coco_file, layout_of, of_yolo, own_part, read_folder
from flashtask.data.boxes import BoxReader, BoxTable
from flashtask.data.folders import list_images
from flashtask.data.instances import InstanceReader, InstanceTable
from flashtask.data.layout import subfolders
from flashtask.data.masks import read_mask
from flashtask.data.object_detection import ObjectDetectionData
from flashtask.data.problems import Problems
from flashtask.data.samples import as_text
from flashtask.data.semantic_segmentation import mask_folders, mask_pairs
from flashtask.data.shapes import Numbered, numbered_objects, shape_fault, shape_text
from flashtask.data.threads import in_threads

__all__ = ["InstanceSegmentationData"]

#: The class of objects where nothing names one.
_OBJECT = "object"
_TARGETS_FIX = 'label images (H, W), or [{"masks": (n, H, W), "labels": ["cat", ...]}, ...]'
#: Text of a COCO file that has polygons or run lengths.
_SEGMENTED = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[|\{)')


class InstanceSegmentationData(ObjectDetectionData):
    """Images with any number of objects, each with a label, a box and a mask; those without objects are trained on too.

    Polygons and run lengths stay as they are written; the mask of an object is made when its image is loaded.
    `from_folders` also takes `images/` beside `masks/` with label images: pictures in which each object has a number of
    its own as value, and 0 is beside all. Where `masks/` has a folder for each class, its name is that of the class.
    """

    readers: ClassVar[tuple[type[BoxReader], ...]] = (InstanceReader,)
    constructors: ClassVar[tuple[str, ...]] = ("from_folders", "from_coco", "from_yolo")
    _noun = "objects"

    @staticmethod
    def _read_folder(folder: Path, part: str) -> Found:
        """COCO or YOLO, or `images` beside `masks`.

        Raises:
            BadDataError: none is recognised.
        """
        if not layout_of(folder, part) and (pair := mask_folders(folder).get(part)) is not None:
            return _of_label_images(*pair, part)
        return read_folder(folder, part)

    @staticmethod
    def _own_part(folder: Path, part: str) -> Found | None:
        """The part of a whole data set; of label images if `images` and `masks` have a folder for each part."""
        pairs = {} if layout_of(folder, "train") else mask_folders(folder)
        if part in pairs and pairs[part] != pairs["train"]:
            return _of_label_images(*pairs[part], part)
        return None if pairs else own_part(folder, part)

    @classmethod
    def from_voc(cls, *arguments: Any, **options: Any) -> NoReturn:
        """Raise a UsageError: the XML files of Pascal VOC hold boxes."""
        _refuse("from_voc")

    @classmethod
    def _of_box_tables(cls, *arguments: Any, **options: Any) -> NoReturn:
        _refuse("a table of boxes")

    @classmethod
    def _of_objects(cls, names: Sequence[str], targets: Any, argument: str, part: str) -> Annotations:
        """Targets in Python: for each image a label image (H, W) or its path, or a mapping of `masks` and `labels`.

        Raises:
            UsageError: their number is another one than that of the images, or they are something else.
            BadDataError: a label image that cannot be read.
        """
        made = Annotations()
        if targets is None and part != "predict":
            raise UsageError(f"{argument} needs targets", fix=f"{part}_targets={_TARGETS_FIX}")
        if targets is not None and len(targets) != len(names):
            raise UsageError(f"{part}_targets must have one for each of the {len(names):,} images")
        for row, name in enumerate(names):
            if targets is None:
                made.add_image(name)
            else:
                _add_given(made, name, targets[row], f"{part}_targets[{row}]")
        made.number_classes()
        return made

    @classmethod
    def _reader_of(
        cls, fields_of_table: tuple[str, ...], boxes: BoxTable, found: Mapping[str, Found], problems: Problems
    ) -> BoxReader:
        """With the shapes of all objects; those that are missing or broken are added to the problems."""
        texts: list[str] = []
        areas = []
        for one in found.values():
            noted = one.annotations
            order = np.argsort(np.array(noted.images, dtype=np.int64), kind="stable").tolist()
            if noted.boxes and not noted.shapes:
                raise BadDataError(
                    f"there are boxes, but no masks of objects ({one.layout})",
                    fix="--task object_detection, or ObjectDetectionData",
                )
            for row in order:
                shape = noted.shapes.get(row)
                fault = "it has a box alone" if shape is None else shape_fault(shape, noted.stated[noted.images[row]])
                if fault:
                    problems.add("object without a usable mask", f"{noted.places[row]}: {fault}")
                texts.append("" if fault else shape_text(shape, is_relative=noted.is_relative))
            stated = np.array(noted.areas, dtype=np.float64)[order]
            areas.append(np.zeros_like(stated) if noted.is_relative else np.nan_to_num(stated))
        known = {one.name: getattr(boxes, one.name) for one in fields(BoxTable)}
        known["areas"] = np.concatenate(areas).astype(np.float32)
        return InstanceReader(fields_of_table, table=InstanceTable(**known, shapes=as_text(texts)))

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Certain where annotations have polygons or run lengths, and for masks in a folder for each class."""
        if constructor == "from_coco":
            return "certain", "masks of objects: regions of COCO"
        if constructor == "from_yolo":
            return _yolo_suits(arguments["data_file"])
        if constructor != "from_folders" or not arguments.get("train_folder"):
            return "no", ""
        folder = Path(arguments["train_folder"])
        if (file := coco_file(folder, "train")) is not None:
            has_masks = _SEGMENTED.search(Path(file).read_bytes()) is not None
            return ("certain", f"masks of objects: {os.path.basename(file)}") if has_masks else ("no", "")
        if (layout := layout_of(folder, "train")).endswith((".yaml", ".yml")):
            return _yolo_suits(os.path.join(folder, layout))
        if not layout and (pair := mask_folders(folder).get("train")) is not None:
            classes = _class_folders(*pair)
            return ("certain", f"label images of {', '.join(classes)}") if classes else ("no", "")
        return "no", ""


def _refuse(what: str) -> NoReturn:
    fix = "from_coco, from_yolo, from_folders, from_files, from_numpy; for boxes ObjectDetectionData"
    raise UsageError(f"{what} gives no masks of objects", fix=fix)


def _yolo_suits(file: str) -> tuple[str, str]:
    """Certain if a line of labels is that of a polygon."""
    has_masks = "train" in read_yolo_file(file)[1] and of_yolo(file, "train").annotations.shapes
    return ("certain", f"masks of objects: {os.path.basename(file)}") if has_masks else ("no", "")


# ---- label images


def _class_folders(images: Path, masks: Path) -> tuple[str, ...]:
    """The classes that have a folder of label images each; none if the folders are those of the images too."""
    inside = subfolders(masks)
    return tuple(sorted(inside)) if inside and not set(inside) & set(subfolders(images)) else ()


def _of_label_images(images: Path, masks: Path, part: str) -> Found:
    """Label images beside images: one for each image, or one in the folder of each class."""
    made, paths = Annotations(), list_images(images, f"{part}_folder").paths
    classes = _class_folders(images, masks)
    for name in classes or (_OBJECT,):
        folder = masks / name if classes else masks
        pairs, unused = mask_pairs(images, paths, folder, part, made.problems)
        if unused:
            made.remarks.append(f"{unused} label image(s) in {folder.name}/ without an image are not used")
        looked = in_threads(_look, pairs)
        for row, (path, file, seen) in enumerate(zip(paths, pairs, looked, strict=True)):
            if row == len(made.paths):
                made.add_image(path)
            if isinstance(seen, BadDataError):
                made.problems.add("bad mask", seen.what + (f" ({seen.why})" if seen.why else ""), fix=seen.fix)
            elif seen is not None:
                size, objects = seen
                _add_numbered(made, row, size, objects, name, os.path.relpath(file, masks))
    made.number_classes()
    return Found(f"label images, {images.name}/ and {masks.name}/", made, str(images))


def _look(file: str) -> tuple[tuple[int, int], list[Numbered]] | BadDataError | None:
    """The (width, height) and the objects of a label image; None where there is none, which is noted elsewhere."""
    if not file:
        return None
    try:
        values, is_colour, _ = read_mask(file)
    except BadDataError as error:
        return error
    if is_colour:
        return BadDataError(
            f"{file!r} has colours, not numbers of objects", fix="one grey channel, of 8, 16 or 32 bits"
        )
    return (values.shape[1], values.shape[0]), list(numbered_objects(values))


def _add_numbered(
    made: Annotations, row: int, size: tuple[int, int], objects: Sequence[Numbered], name: str, place: str
) -> None:
    """Take the objects of a label image, whose size must be that of the picture."""
    if made.stated[row] not in (None, size):
        made.problems.add("masks of two sizes", f"{place}: {size[0]} x {size[1]}")
    made.stated[row] = size
    for one in objects:
        made.add_box(row, one.box, name, f"{place}, object {one.number}", area=one.area, shape=one.shape)


def _add_given(made: Annotations, name: str, given: Any, place: str) -> None:
    """Take the objects of an image that is given in Python."""
    if isinstance(given, (str, os.PathLike)):
        seen = _look(os.path.abspath(os.fspath(given)))
        if isinstance(seen, BadDataError):
            raise seen
        assert seen is not None
        _add_numbered(made, made.add_image(name), seen[0], seen[1], _OBJECT, place)
        return
    labels = given.get("labels") if isinstance(given, Mapping) else None
    masks = np.asarray(given["masks"] if labels is not None and "masks" in given else given)
    if labels is None and masks.ndim == 2 and masks.dtype.kind in "biu":
        size = (masks.shape[1], masks.shape[0])
        _add_numbered(made, made.add_image(name), size, list(numbered_objects(masks)), _OBJECT, place)
        return
    if labels is None or masks.ndim != 3 or len(masks) != len(labels):
        raise UsageError(
            f"{place} is neither a label image nor a mapping of masks and as many labels", fix=_TARGETS_FIX
        )
    image = made.add_image(name, (masks.shape[2], masks.shape[1]))
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        where = f"{place}, mask {number}"
        found = list(numbered_objects(mask.astype(bool).astype(np.uint8)))
        if not found:
            made.problems.add("object without a usable mask", f"{where}: no pixel is set")
        for one in found:
            made.add_box(image, one.box, str(label), where, area=one.area, shape=one.shape)
