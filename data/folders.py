"""Class folders to image sets: one folder a class, its name the label, every image below it a sample.

Classes are ordered by name as plain text ("10" comes before "2"), files by their path below the root, so that
the order never depends on the file system. Hidden entries are no data. Links to folders are followed; a loop
is an error. Nothing here imports torch or decodes an image.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashtask.core.errors import BadDataError, did_you_mean
from flashtask.data.layout import entries_of, is_hidden, is_image_name, split_folders, subfolders

__all__ = ["ImageSet", "list_class_folders", "list_images", "match_classes"]


@dataclass(frozen=True)
class ImageSet:
    """The images of one part of the data, in a stable order.

    Args:
        root: the folder, absolute.
        paths: the image files, absolute.
        names: the class name of each file; empty where there are no classes (prediction).
        classes: the class folders there are, sorted.
        ignored: files below the class folders that are not images by their extension.
    """

    root: Path
    paths: tuple[str, ...]
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def relative_paths(self) -> tuple[str, ...]:
        """The paths below the root, with forward slashes."""
        return tuple(os.path.relpath(path, self.root).replace(os.sep, "/") for path in self.paths)

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The samples at these indices; the classes stay all there are."""
        kept = list(indices)
        names = tuple(self.names[i] for i in kept) if self.names else ()
        return replace(self, paths=tuple(self.paths[i] for i in kept), names=names)


def list_class_folders(folder: Path, argument: str, *, min_classes: int = 1) -> ImageSet:
    """List the images of a folder of class folders.

    Args:
        folder: absolute, and there.
        argument: the name of the argument that gave it, such as `train_folder`, for messages.
        min_classes: fewer classes are an error; training needs 2.

    Raises:
        BadDataError: images beside the class folders, no or too few classes, a class without images, class
            names that differ only by case, a link loop, or a root that holds train/ and val/ instead of
            classes.
    """
    _refuse_parent_of_parts(folder, argument)
    folders = _class_folders(folder, argument)
    paths: list[str] = []
    names: list[str] = []
    ignored: list[str] = []
    empty: list[str] = []
    for name in sorted(folders):
        files = list(_files_below(folders[name]))
        images = sorted(file for file in files if is_image_name(file))
        ignored += sorted(file for file in files if not is_image_name(file))
        paths += images
        names += [name] * len(images)
        if not images:
            empty.append(name)
    _require_classes(folder, argument, sorted(folders), empty, ignored, min_classes)
    return ImageSet(folder, tuple(paths), tuple(names), tuple(sorted(folders)), tuple(ignored))


def list_images(folder: Path, argument: str) -> ImageSet:
    """List every image below a folder, at any depth, without classes.

    Raises:
        BadDataError: there is none.
    """
    files = sorted(_files_below(str(folder)))
    paths = tuple(file for file in files if is_image_name(file))
    if not paths:
        raise BadDataError(f"{argument}: no images below {str(folder)!r}", why=_found_instead(files))
    return ImageSet(folder, paths, ignored=tuple(file for file in files if not is_image_name(file)))


def match_classes(
    images: ImageSet, labels: Sequence[str], argument: str, against: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Find the index of each sample's class in `labels`, by name.

    Args:
        images: the samples.
        labels: the classes that the model knows; a position is an index.
        argument: the argument that `images` came from, for the message.
        against: where `labels` come from, for the message.

    Returns:
        One index a sample, and the labels that `images` has no folder for.

    Raises:
        BadDataError: a folder is named after no label; the message is a diff of the names.
    """
    index = {name: i for i, name in enumerate(labels)}
    unknown = [name for name in images.classes if name not in index]
    missing = tuple(name for name in labels if name not in images.classes)
    if unknown:
        diff = [f"+ only in {argument}: {name}" for name in unknown[:20]]
        diff += [f"- only in {against}: {name}" for name in missing[:20]]
        guess = did_you_mean(unknown[0], missing or labels)
        raise BadDataError(
            f"{argument} {str(images.root)!r} has {len(unknown)} class folder(s) unknown to {against}",
            why="classes are matched by name\n    " + "\n    ".join(diff),
            fix=f"rename or remove the folder {unknown[0]!r}" + (f" ({guess})" if guess else ""),
        )
    return tuple(index[name] for name in images.names), missing


def _class_folders(folder: Path, argument: str) -> dict[str, str]:
    found: dict[str, str] = {}
    spelled: dict[str, str] = {}
    stray: list[str] = []
    for entry in entries_of(folder):
        if is_hidden(entry.name):
            continue
        if not entry.is_dir():
            stray += [entry.name] if is_image_name(entry.name) else []
            continue
        # One spelling for accented names, whichever system packed them.
        name = unicodedata.normalize("NFC", entry.name)
        _require_utf8(name, argument)
        twin = spelled.setdefault(name.casefold(), entry.name)
        if twin != entry.name:
            raise BadDataError(
                f"{argument} {str(folder)!r} has two classes with the same name: {twin!r} and {entry.name!r}",
                why="they differ only in upper and lower case or in how an accent is encoded",
                fix="merge the two folders, or rename one",
            )
        found[name] = entry.path
    if stray:
        raise BadDataError(
            f"{argument} {str(folder)!r} has images outside class folders: {', '.join(stray[:3])}",
            why="the folder that holds an image is its class",
            fix="move them into class folders" if found else f'{argument}="{folder.parent}"',
        )
    return found


def _require_utf8(name: str, argument: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadDataError(f"{argument}: the class name {name!r} is not valid UTF-8", fix="rename it") from None


def _files_below(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise BadDataError(f"the link {folder!r} points to a folder that contains it", fix=f'remove it: rm "{folder}"')
    for entry in entries_of(folder):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _files_below(entry.path, (*above, identity))
        else:
            yield entry.path


def _refuse_parent_of_parts(folder: Path, argument: str) -> None:
    parts = split_folders(folder)
    nested = {part: path for part, path in parts.items() if subfolders(path)}
    if "train" not in nested and len(nested) < 2:
        return
    wanted = argument.removesuffix("_folder")
    fitting = nested.get(wanted) or next(iter(nested.values()))
    names = ", ".join(path.name + "/" for path in parts.values())
    raise BadDataError(
        f"{argument} {str(folder)!r} holds {names}, not class folders",
        why="these would become the classes",
        fix=f'{argument}="{fitting}"',
    )


def _require_classes(
    folder: Path, argument: str, names: list[str], empty: list[str], ignored: list[str], min_classes: int
) -> None:
    if not names:
        raise BadDataError(
            f"{argument} {str(folder)!r} has no class folders",
            why="each class is a folder, and the images of the class lie in it",
            fix=f"{argument}/cat/1.jpg, {argument}/dog/2.jpg, ...",
        )
    if empty:
        shown = ", ".join(repr(name) for name in empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise BadDataError(
            f"{argument} {str(folder)!r} has {len(empty)} class folder(s) without images: {shown}",
            why=_found_instead(ignored),
            fix="put images into them, or remove them",
        )
    if len(names) < min_classes:
        raise BadDataError(
            f"{argument} {str(folder)!r} has only one class: {names[0]!r}",
            why="a classifier needs at least two",
            fix="add a folder for the second class",
        )


def _found_instead(files: list[str]) -> str:
    if not files:
        return ""
    return f"{len(files)} file(s) there are no images by their extension, such as {os.path.basename(files[0])!r}"
