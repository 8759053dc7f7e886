"""Class folders to image sets: one folder a class, its name the label, every image below it a sample.

Classes are ordered by name as plain text ("10" comes before "2"), files by their path below the root, so that
the order never depends on the file system. Hidden entries are no data. Links to folders are followed; a loop
is an error. Nothing here imports torch or decodes an image.
"""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashtask.core.errors import BadDataError
from flashtask.data.folder_advice import (
    describe_files,
    refuse_flat,
    refuse_masks_as_classes,
    refuse_parts_as_classes,
    refuse_parts_inside_classes,
    require_classes,
)
from flashtask.data.layout import entries_of, is_folder, is_hidden, is_image_name

__all__ = ["ImageSet", "list_class_folders", "list_images"]


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

    def same_subfolders(self) -> tuple[str, ...]:
        """The names of the folders that the images of every class lie in, if these are the same and at least two.

        Then the classes may be the parts of the data, or the folders in them may be.
        """
        found: dict[str, set[str]] = {name: set() for name in self.classes}
        for name, path in zip(self.names, self.relative_paths(), strict=True):
            found[name].add(path.split("/")[1] if path.count("/") > 1 else "")
        first = next(iter(found.values()), set())
        same = len(found) > 1 and len(first) > 1 and "" not in first and all(one == first for one in found.values())
        return tuple(sorted(first)) if same else ()


def list_class_folders(
    folder: Path, argument: str, *, min_classes: int = 1, is_image: Callable[[str], bool] = is_image_name
) -> ImageSet:
    """List the images of a folder of class folders.

    Args:
        folder: absolute, and there.
        argument: the name of the argument that gave it, such as `train_folder`, for messages.
        min_classes: fewer classes are an error; training needs 2.
        is_image: whether a file is one, by its name.

    Raises:
        BadDataError: images beside the class folders, no or too few classes, a class without images, class
            names that differ only by case, a link loop, a link that leads nowhere, a root that holds train/
            and val/ instead of classes, or classes that hold train/ and val/.
    """
    refuse_parts_as_classes(folder, argument)
    refuse_masks_as_classes(folder, argument)
    folders = _class_folders(folder, argument, is_image)
    paths: list[str] = []
    names: list[str] = []
    ignored: list[str] = []
    empty: list[str] = []
    for name in sorted(folders):
        files = list(_files_below(folders[name]))
        images = sorted(filter(is_image, files))
        ignored += sorted(file for file in files if not is_image(file))
        paths += images
        names += [name] * len(images)
        if not images:
            empty.append(name)
    require_classes(folder, argument, sorted(folders), empty, ignored, min_classes)
    found = ImageSet(folder, tuple(paths), tuple(names), tuple(sorted(folders)), tuple(ignored))
    refuse_parts_inside_classes(folder, argument, found.same_subfolders())
    return found


def list_images(folder: Path, argument: str, is_image: Callable[[str], bool] = is_image_name) -> ImageSet:
    """List every image below a folder, at any depth, without classes.

    Args:
        folder: absolute, and there.
        argument: the name of the argument that gave it, for messages.
        is_image: whether a file is one, by its name.

    Raises:
        BadDataError: there is none.
    """
    files = sorted(_files_below(str(folder)))
    paths = tuple(filter(is_image, files))
    if not paths:
        raise BadDataError(f"{argument}: no images below {str(folder)!r}", why=describe_files(files))
    return ImageSet(folder, paths, ignored=tuple(file for file in files if not is_image(file)))


def _class_folders(folder: Path, argument: str, is_image: Callable[[str], bool]) -> dict[str, str]:
    found: dict[str, str] = {}
    spelled: dict[str, str] = {}
    stray: list[str] = []
    for entry in entries_of(folder):
        if is_hidden(entry.name):
            continue
        if not is_folder(entry):
            if is_image(entry.name):
                stray.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise _leads_nowhere(entry.path, argument)
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
        refuse_flat(folder, argument, stray, sorted(found))
    return found


def _require_utf8(name: str, argument: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadDataError(f"{argument}: the class name {name!r} is not valid UTF-8", fix="rename it") from None


def _leads_nowhere(link: str, argument: str) -> BadDataError:
    target = os.readlink(link)
    return BadDataError(
        f"{argument}: the link {link!r} leads nowhere",
        why=f"{target!r} is missing, or leads back to the link; the link may stand for a class",
        fix=f"put back what it points to, or remove the link: unlink {shlex.quote(link)}",
    )


def _files_below(folder: str, above: tuple[tuple[int, int], ...] = (), link: str = "") -> Iterator[str]:
    """The files at any depth, hidden ones left out.

    Args:
        folder: where to look.
        above: device and inode of the folders on the way.
        link: the last link on the way, if any: it is what makes a loop.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        if link:  # by its shortest name: it may have been reached through itself
            link = os.path.join(os.path.realpath(os.path.dirname(link)), os.path.basename(link))
        fix = f"remove the link alone, nothing it points to: unlink {shlex.quote(link)}" if link else ""
        raise BadDataError(f"the link {link or folder!r} points to a folder that contains it", fix=fix)
    for entry in entries_of(folder):
        if is_hidden(entry.name):
            continue
        if is_folder(entry):
            yield from _files_below(entry.path, (*above, identity), entry.path if entry.is_symlink() else link)
        else:
            yield entry.path
