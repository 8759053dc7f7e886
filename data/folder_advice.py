"""What to say about folders that are not class folders: what is really there, and what to do with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from flashtask.core.errors import BadDataError
from flashtask.data.layout import (
    ARCHIVE_ENDINGS,
    SPLIT_NAMES,
    entries_of,
    holds_images,
    is_folder,
    is_hidden,
    is_image_name,
    part_in_name,
    split_folders,
    subfolders,
)

__all__ = [
    "describe_files",
    "refuse_flat",
    "refuse_masks_as_classes",
    "refuse_parts_as_classes",
    "refuse_parts_inside_classes",
    "require_classes",
]

_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")


def refuse_masks_as_classes(folder: Path, argument: str) -> None:
    """Refuse a folder of images beside masks, which are no two classes.

    Raises:
        BadDataError: it holds `images` and `masks` with files of the same names.
    """
    if {"images", "masks"} != {name.lower() for name in subfolders(folder)}:
        return
    stems = [{Path(entry.name).stem for entry in entries_of(folder / name)} for name in subfolders(folder)]
    if stems[0] & stems[1]:
        raise BadDataError(
            f"{argument} {str(folder)!r} holds images beside masks, not folders of classes",
            fix="--task semantic_segmentation, or SemanticSegmentationData in Python",
        )


def refuse_flat(folder: Path, argument: str, stray: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse images that lie directly in a folder that should hold class folders.

    Args:
        folder: that was given.
        argument: the name of the argument that gave it.
        stray: the names of these images.
        classes: the class folders beside them.

    Raises:
        BadDataError: always.
    """
    shown = ", ".join(stray[:3]) + (", ..." if len(stray) > 3 else "")
    if classes:
        raise BadDataError(
            f"{argument} {str(folder)!r} has {len(stray)} image(s) outside class folders: {shown}",
            why=f"the folder that an image lies in is its class; the class folders here are {_named(classes)}",
            fix="move the images into class folders, or out of this folder",
        )
    sort = f"move the images into a folder for each class: mkdir {_quoted(folder / 'cat')} {_quoted(folder / 'dog')}"
    siblings = _flat_siblings(folder)
    if siblings:
        sort = f'if the classes are {_named(siblings)}: {argument}="{folder.parent}"; otherwise {sort}'
    why = "the folder that an image lies in is its class"
    if table := _table_near(folder):
        why += f"; labels in a table ({table}) are not read"
    raise BadDataError(f"{argument} {str(folder)!r} has no class folders, only images: {shown}", why=why, fix=sort)


def refuse_parts_as_classes(folder: Path, argument: str) -> None:
    """Refuse the folder above train/ and val/ where a folder of classes is needed.

    Raises:
        BadDataError: it is that; the fix is the folder of the part that the argument is for.
    """
    parts = split_folders(folder)
    nested = {part: path for part, path in parts.items() if subfolders(path)}
    if "train" not in nested and len(parts) < 2:
        return
    found = nested or parts
    fitting = found.get(argument.removesuffix("_folder")) or next(iter(found.values()))
    names = ", ".join(path.name + "/" for path in parts.values())
    raise BadDataError(
        f"{argument} {str(folder)!r} holds {names}, not class folders",
        why="these would become the classes",
        fix=f'{argument}="{fitting}"',
    )


def refuse_parts_inside_classes(folder: Path, argument: str, inside: Sequence[str]) -> None:
    """Refuse classes that are each divided into train/ and test/: all of it would be trained on.

    Args:
        folder: of the classes.
        argument: the name of the argument that gave it.
        inside: the names of the folders that every class holds.

    Raises:
        BadDataError: these are named for parts; the fix copies the images into a folder for each part.
    """
    parts = [name for name in inside if name.lower() in SPLIT_NAMES.get(part_in_name(name) or "", ())]
    if len(parts) < 2:
        return
    target = Path(f"{folder}_parts")
    copy = f'mkdir -p {_quoted(target)}/$p; for c in */; do cp -r "$c$p" {_quoted(target)}/$p/"${{c%/}}"; done'
    raise BadDataError(
        f"{argument} {str(folder)!r} has classes that hold parts of the data: {_named(parts)}",
        why="all images of a class would be used alike; parts belong above classes: train/cat/1.jpg, test/cat/2.jpg",
        fix=f"copy them in that order, and give {str(target)!r}:\n"
        f"    cd {_quoted(folder)} && for p in {' '.join(map(shlex.quote, parts))}; do {copy}; done",
    )


def require_classes(
    folder: Path, argument: str, names: Sequence[str], empty: Sequence[str], ignored: Sequence[str], min_classes: int
) -> None:
    """Refuse a folder with too few class folders, or with class folders without images where classes are learned.

    Args:
        folder: that was given.
        argument: the name of the argument that gave it.
        names: of the class folders.
        empty: those without images.
        ignored: files in them that are not images by their extension.
        min_classes: how many classes are needed.

    Raises:
        BadDataError: it is that.
    """
    if not names:
        raise _no_classes(folder, argument)
    if empty and (min_classes > 1 or len(empty) == len(names)):
        shown = ", ".join(repr(name) for name in empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise BadDataError(
            f"{argument} {str(folder)!r} has {len(empty)} class folder(s) without images: {shown}",
            why=describe_files(ignored),
            fix="put images into them, or remove them" + (_OWN_FORMAT if ignored else ""),
        )
    if len(names) < min_classes:
        raise _one_class(folder, argument, names[0])


#: What else may be meant by folders that hold other files alone.
_OWN_FORMAT = "; files of a format of your own are read with load_image=NAME"


def describe_files(files: Sequence[str]) -> str:
    """How many files are there instead of images; empty if there are none."""
    if not files:
        return ""
    return f"{len(files)} file(s) in it do not have the extension of an image, such as {os.path.basename(files[0])!r}"


def _no_classes(folder: Path, argument: str) -> BadDataError:
    files = [entry.name for entry in entries_of(folder) if not is_hidden(entry.name)]
    archive = next((name for name in files if name.lower().endswith(ARCHIVE_ENDINGS)), None)
    fix = f"each class is a folder of images: {folder / 'cat' / '1.jpg'}, {folder / 'dog' / '2.jpg'}, ..."
    if archive is not None:
        unpack = f'flashtask.download_data({str(folder / archive)!r}, "data")'
        fix = f'in Python: {unpack} unpacks {archive!r}; then give the folder "data", or the one in it'
    why = describe_files(files) or "the folder is empty"
    return BadDataError(f"{argument} {str(folder)!r} has no class folders", why=why, fix=fix)


def _one_class(folder: Path, argument: str, only: str) -> BadDataError:
    """A single folder is a class, or, as archives unpack, the folder that holds the data."""
    inner = folder / only
    while len(below := _with_images(inner)) == 1 and not _images_in(inner):
        inner = inner / below[0]
    if len(below) > 1:
        parts = split_folders(inner)
        fitting = parts.get(argument.removesuffix("_folder"), inner)
        holds = "/, ".join(path.name for path in parts.values()) + "/" if parts else f"class folders: {_named(below)}"
        return BadDataError(
            f"{argument} {str(folder)!r} has only one folder, {only!r}",
            why=f"{str(inner)!r} holds {holds}",
            fix=f'{argument}="{fitting}"; on the command line: "{inner}"',
        )
    return BadDataError(
        f"{argument} {str(folder)!r} has only one class: {only!r}",
        why="a classifier needs at least two",
        fix="add a folder for the second class",
    )


def _with_images(folder: Path) -> list[str]:
    return [name for name in subfolders(folder) if holds_images(folder / name)]


def _images_in(folder: Path) -> list[str]:
    """The names of the images directly in a folder."""
    names = [entry.name for entry in entries_of(folder) if not is_folder(entry)]
    return [name for name in names if is_image_name(name) and not is_hidden(name)]


def _flat_siblings(folder: Path) -> list[str]:
    """The folders beside one of images, itself among them, if all there is beside it are such folders too.

    Then it may be one class of several. Empty if it is alone, or is named for a part of the data.
    """
    parent = folder.parent
    try:
        names = subfolders(parent)
        are_alike = all(_images_in(parent / name) and not _with_images(parent / name) for name in names)
        has_parts = any(part_in_name(name) for name in names)
        return names if len(names) > 1 and are_alike and not has_parts and not _images_in(parent) else []
    except BadDataError:  # a folder beside it that cannot be listed
        return []


def _table_near(folder: Path) -> str:
    """The name of a table in a folder of images or beside it, which may hold their labels."""
    for where in (folder, folder.parent):
        try:
            names = [entry.name for entry in entries_of(where)]
        except BadDataError:
            continue
        if found := [name for name in names if name.lower().endswith(_TABLES) and not is_hidden(name)]:
            return found[0]
    return ""


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
