"""`convert_annotations`: a data set with the same images in another format of annotations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from flashtask.core.atomic_folders import atomic_folder
from flashtask.core.errors import BadDataError, UnknownNameError
from flashtask.data.annotated import Annotated, read_annotated
from flashtask.data.annotation_writers import FORMATS, LOSSES, Output, losses
from flashtask.data.shard_writer import require_new_folder

__all__ = ["Conversion", "convert_annotations"]


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Args:
        folder: the new one.
        layout: what was read, in words.
        images: how many, by part; the name is empty if there are no parts.
        objects: how many were read.
        lost: how many of what the format cannot hold, by what it is.
        remarks: what is worth saying of the annotations.
    """

    folder: str
    layout: str
    images: Mapping[str, int]
    objects: int
    lost: Mapping[str, int]
    remarks: tuple[str, ...] = ()


def convert_annotations(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: str = "coco",
    *,
    lossy: bool = False,
    copy_images: bool = False,
) -> Conversion:
    """Write the annotations of a data set in another format.

    The folder appears when it is whole. Images stay where they are: `coco` and `csv` name them by relative paths, and
    the other formats, which need images in folders of their own, get relative links.

    Args:
        data: a folder in one of the layouts of `ObjectDetectionData.from_folders`, images beside masks, COCO's JSON
            file, a `data.yaml`, or a table with a row a box.
        folder: a new one, or an empty one.
        format: `coco`, which holds everything, `voc`, `yolo`, `csv` or `png` (a mask of class numbers for each image).
        lossy: convert although something is lost, such as holes, several parts, crowds, rotations or keypoints.
        copy_images: copy the images into the folder.

    Raises:
        UnknownNameError: there is no such format.
        MissingInputError: the data is not there.
        BadDataError: nothing is recognised, annotations that cannot be used, or something that the format cannot hold.
        OutputError: the folder holds files, or cannot be made.
        StorageError: a write failed.
    """
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    target = require_new_folder(folder)
    read = read_annotated(data)
    lost = losses(read, format)
    if lost and not lossy:
        raise BadDataError(
            f"{os.fspath(data)!r} has what {format} cannot hold: {', '.join(_counted(lost))}",
            why="\n    ".join(f"{LOSSES[kind][0]} {LOSSES[kind][1]}" for kind in lost),
            fix="lossy=True",
        )
    with atomic_folder(target, ()) as partial:
        FORMATS[format](read, Output(partial, target, copy_images))
    return _told(read, str(target), lost)


def _counted(lost: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {LOSSES[kind][0]}" for kind, count in lost.items()]


def _told(read: Annotated, folder: str, lost: Mapping[str, int]) -> Conversion:
    return Conversion(
        folder,
        "; ".join(dict.fromkeys(part.layout for part in read.parts)),
        {part.name: len(part.pictures) for part in read.parts},
        sum(1 for _ in read.objects),
        {LOSSES[kind][0]: count for kind, count in lost.items()},
        tuple(dict.fromkeys(read.remarks)),
    )
