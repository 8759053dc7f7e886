"""Where the COCO file of a folder of images is: given, in the folder, or beside it. Its content is not read here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flashtask.core.errors import MissingInputError
from flashtask.core.files import missing_file

__all__ = ["COCO_NAMES", "coco_file", "coco_files"]

#: Names of COCO's file beside the images of a part.
COCO_NAMES = ("annotations.json", "_annotations.coco.json")


def coco_file(folder: Path, part: str) -> str | None:
    """COCO's file for a folder of images: in it, or in `annotations/` beside it."""
    for name in COCO_NAMES:
        if (folder / name).is_file():
            return str(folder / name)
    beside = folder.parent / "annotations"
    words = [folder.name, part]
    names = [f"{start}{word}.json" for word in words for start in ("instances_", "person_keypoints_", "")]
    return next((str(beside / name) for name in names if (beside / name).is_file()), None)


def coco_files(folders: Mapping[str, Path], given: Mapping[str, str | os.PathLike[str] | None]) -> dict[str, str]:
    """The absolute path of the annotations of each part but `predict`.

    Args:
        folders: of images, by part.
        given: the files that the user named, by part; None where they have to be found.

    Raises:
        MissingInputError: a file is not there, or none is found.
    """
    found = {}
    for part, folder in folders.items():
        if part == "predict":
            continue
        own = given[part]
        file = coco_file(folder, part) if own is None else os.path.abspath(os.path.expanduser(own))
        if file is None:
            raise MissingInputError(
                f"{part}_folder: there is no annotation file in or beside {str(folder)!r}",
                fix=f'{part}_ann_file="instances_{part}.json"',
            )
        if not os.path.isfile(file):
            raise missing_file(file)
        found[part] = file
    return found
