"""What `from_folders` refuses before it lists a folder: values that cannot be meant, and contradictions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.layout import existing_folder
from flashtask.data.splits import check_share
from flashtask.data.transforms import AugmentLike, check_augment

__all__ = [
    "PathLike",
    "check_files",
    "check_folders",
    "check_numbers",
    "check_split",
    "one_augment",
    "read_preprocessing",
]

PathLike = str | os.PathLike[str]


def check_numbers(*, batch_size: object, num_workers: object, split_seed: object) -> None:
    """Refuse numbers that are not whole or too small; `num_workers` may be None.

    Raises:
        UsageError: naming the first that is wrong.
    """
    rules = [("batch_size", batch_size, 1, 32), ("split_seed", split_seed, 0, 0)]
    if num_workers is not None:
        rules.append(("num_workers", num_workers, 0, 0))
    for name, value, least, example in rules:
        if not is_whole(value, least):
            raise UsageError(
                f"{name} must be a whole number of at least {least}, not {value!r}", fix=f"{name}={example}"
            )


def one_augment(
    augment: AugmentLike,
    transform: Callable[[Any], Any] | None,
    flip: str | None = None,
    random_erasing: float | None = None,
) -> AugmentLike:
    """The one of `augment` and `transform` that says what training does to images.

    Raises:
        UsageError: both say it, or the one that does is neither a known name nor a callable.
    """
    check_augment(augment)
    if transform is not None:
        if augment != "auto":
            raise UsageError(
                "augment and transform both set the transform of training images", fix="leave one of them out"
            )
        if not callable(transform):
            raise UsageError(f"transform must be a callable that takes a PIL image, not {transform!r}")
        augment = transform
    check_augment(augment, flip, random_erasing)
    return augment


def read_preprocessing(given: Preprocessing | Mapping[str, Any] | None) -> Preprocessing | None:
    """A preprocessing as an object or, as a recipe holds it, by the names of its parts.

    Raises:
        UsageError: something else, or a part that there is not or that cannot have this value.
    """
    if given is None or isinstance(given, Preprocessing):
        return given
    example = "preprocessing: {input_size: [3, 160, 160]}"
    if not isinstance(given, Mapping):
        raise UsageError(f"preprocessing must be a mapping of its fields, not {given!r}", fix=example)
    try:
        return Preprocessing.from_dict({"decode": "scaled", **given})
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"preprocessing cannot be {dict(given)!r}", why=str(error), fix=example) from None


def check_split(val_split: float | int | None, given: Mapping[str, PathLike | None], what: str = "folder") -> None:
    """Refuse a `val_split` that is not a share, or that has nothing to split.

    Args:
        val_split: as in `from_folders`.
        given: the folders or files by part (`train`, `val`, ...), as the user gave them.
        what: `folder` or `file`.

    Raises:
        UsageError: it contradicts the folders.
    """
    if val_split is None:
        return
    check_share(val_split)
    if given["val"] is not None:
        raise UsageError(f"val_split and val_{what} both define the validation data", fix="leave one of them out")
    if given["train"] is None:
        raise UsageError(f"val_split takes a part of train_{what}, but there is none", fix=f"train_{what}=...")


def check_folders(given: Mapping[str, PathLike | None]) -> dict[str, Path]:
    """The absolute paths of the folders that were given.

    Raises:
        MissingInputError: one does not exist.
        UsageError: there is none, or training and evaluation have the same.
    """
    folders = {p: existing_folder(path, f"{p}_folder") for p, path in given.items() if path is not None}
    if not folders:
        raise UsageError("from_folders needs a folder", fix='from_folders(train_folder="data/train")')
    for part in ("val", "test"):
        if "train" in folders and part in folders and folders["train"].samefile(folders[part]):
            raise UsageError(
                f"train_folder and {part}_folder are the same folder: {str(folders[part])!r}",
                why="a model would be judged on what it was trained on",
                fix="val_split=0.2 instead of val_folder" if part == "val" else "leave out test_folder",
            )
    return folders


def check_files(given: Mapping[str, PathLike | None]) -> dict[str, PathLike]:
    """The files that were given.

    Raises:
        UsageError: there is none, or training and evaluation have the same.
    """
    files = {part: path for part, path in given.items() if path is not None}
    if not files:
        raise UsageError("from_csv needs a file", fix='from_csv(train_file="cells.csv")')
    for part in ("val", "test"):
        if "train" in files and part in files and os.path.realpath(files["train"]) == os.path.realpath(files[part]):
            raise UsageError(
                f"train_file and {part}_file are the same file: {os.fspath(files[part])!r}",
                why="a model would be judged on what it was trained on",
                fix="val_split=0.2 instead of val_file" if part == "val" else "leave out test_file",
            )
    return files
