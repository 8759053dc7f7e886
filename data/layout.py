"""Where the folders of a data set are: mistyped paths, the split folders below a root, and what counts as an
image.

Nothing here imports torch or Pillow, so that the command line can check paths before it loads them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flashtask.core.errors import BadDataError, MissingInputError, UsageError, nearest

__all__ = [
    "DEFAULT_VAL_SPLIT",
    "IMAGE_EXTENSIONS",
    "SPLIT_NAMES",
    "Layout",
    "entries_of",
    "existing_folder",
    "is_hidden",
    "is_image_name",
    "nearest_existing",
    "resolve_layout",
    "split_folders",
    "stage_folder",
    "subfolders",
]

# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))
# fmt: on

#: The folder names that mean a part of the data rather than a class.
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
    "predict": ("predict",),
}


#: The share of the training images that validates where a root has no validation images of its own.
DEFAULT_VAL_SPLIT = 0.2


@dataclass(frozen=True)
class Layout:
    """The folders that `resolve_layout` found below a root; None where there is none."""

    train: Path
    val: Path | None = None
    test: Path | None = None
    predict: Path | None = None


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken as an image (by its extension, in any case)."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether an entry is no data: dot files, `.ipynb_checkpoints`, what archive programs of macOS leave."""
    return name.startswith(".") or name == "__MACOSX"


def entries_of(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies directly in a folder, sorted by name.

    Raises:
        BadDataError: the folder cannot be read.
    """
    try:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BadDataError(f"cannot list the folder {os.fspath(folder)!r}", why=error.strerror or "") from error


def subfolders(folder: Path) -> list[str]:
    """The names of the folders directly in a folder, sorted."""
    return [entry.name for entry in entries_of(folder) if entry.is_dir()]


def existing_folder(path: str | os.PathLike[str], argument: str) -> Path:
    """The absolute path of a folder that is there.

    Args:
        path: as the user wrote it; `~` is expanded.
        argument: the name of the argument, for the message.

    Raises:
        MissingInputError: it does not exist; the message has the nearest folder that does.
        UsageError: it is empty, an address, or a file.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{argument} must be the path of a folder, not {path!r}")
    if "://" in text:
        raise UsageError(
            f"{argument} is an address, not a folder: {text!r}",
            fix=f'flashtask.download_data("{text}", "data"), then {argument}="data/..."',
        )
    folder = Path(os.path.abspath(os.path.expanduser(text)))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{argument} must be a folder, and {text!r} is a file")
    close = nearest_existing(folder, only_folders=True)
    raise MissingInputError(
        f"{argument}: no such folder: {text!r}",
        why=f"{str(_deepest_existing(folder))!r} exists, but nothing of that name below it",
        fix=f'did you mean {argument}="{close}"?' if close else "",
    )


def nearest_existing(path: Path, *, only_folders: bool = False) -> Path | None:
    """The path that exists and differs from `path` by the fewest mistyped parts, or None.

    Args:
        path: a path that does not exist.
        only_folders: whether a file is no answer.
    """
    parts = path.absolute().parts
    return _repair(Path(parts[0]), parts[1:], only_folders)


def _repair(start: Path, parts: tuple[str, ...], only_folders: bool) -> Path | None:
    if not parts:
        return start
    if os.path.lexists(start / parts[0]):
        found = _repair(start / parts[0], parts[1:], only_folders)
        if found is not None:
            return found
    if not os.access(start, os.R_OK | os.X_OK) or not start.is_dir():
        return None
    files_count = len(parts) == 1 and not only_folders
    here = [entry.name for entry in entries_of(start) if entry.is_dir() or files_count]
    for name in nearest(parts[0], here):
        if name != parts[0] and (found := _repair(start / name, parts[1:], only_folders)) is not None:
            return found
    return None


def _deepest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def split_folders(root: Path) -> dict[str, Path]:
    """The folders directly below `root` that are named after a part (train, val, test, predict).

    Raises:
        BadDataError: two folders claim the same part, such as `val` and `validation`.
    """
    found: dict[str, Path] = {}
    for name in subfolders(root):
        part = next((part for part, names in SPLIT_NAMES.items() if name.lower() in names), None)
        if part in found:
            raise BadDataError(
                f"{str(root)!r} has two folders for {part} data: {found[part].name!r} and {name!r}",
                fix=f'name the one you mean: from_folders({part}_folder="{root / name}", ...)',
            )
        if part is not None:
            found[part] = root / name
    return found


def resolve_layout(path: str | os.PathLike[str]) -> Layout:
    """Find the parts of a data set below one root.

    A root that holds `train/` (and `val/`, `valid/` or `validation/`, `test/`, `predict/`) means those
    folders; a root without any of them is itself the folder of class folders.

    Raises:
        MissingInputError: there is no such folder.
        BadDataError: the layout can be read in two ways, or has no training part.
    """
    root = existing_folder(path, "the data folder")
    found = split_folders(root)
    if not found:
        return Layout(root)
    others = [name for name in subfolders(root) if root / name not in found.values()]
    strangers = [name for name in others if not is_hidden(name) and _holds_images(root / name)]
    names = ", ".join(folder.name + "/" for folder in found.values())
    if strangers:
        raise BadDataError(
            f"{str(root)!r} holds both {names} and other folders with images: {', '.join(strangers[:5])}",
            why="it could be a data set in parts, or a folder of classes",
            fix=f'say which: from_folders(train_folder="{found.get("train", root)}", ...)',
        )
    if "train" not in found:
        raise BadDataError(
            f"{str(root)!r} holds {names} but no train/",
            fix=f'name the training folder: from_folders(train_folder="{root}/...", ...)',
        )
    return Layout(found["train"], found.get("val"), found.get("test"), found.get("predict"))


def stage_folder(path: str | os.PathLike[str], part: str) -> Path:
    """The folder that evaluation on `path` means: its own `val/` (or `test/`) if there is one, else `path`.

    Args:
        path: the data folder that the user named.
        part: `val`, `test` or `predict`.
    """
    root = existing_folder(path, "the data folder")
    return split_folders(root).get(part, root)


def _holds_images(folder: Path) -> bool:
    return any(is_image_name(name) for _, _, files in os.walk(folder) for name in files)
