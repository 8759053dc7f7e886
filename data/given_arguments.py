"""What constructors are given, read and checked: tables, paths and the targets in them, pictures in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.arguments import PathLike, check_files, check_split
from flashtask.data.cached_inputs import is_address
from flashtask.data.folders import list_images
from flashtask.data.inputs import read_inputs
from flashtask.data.layout import existing_folder
from flashtask.data.problems import Problems
from flashtask.data.tables import Table, open_table

__all__ = ["absolute_path", "in_recipe", "not_none", "opened_tables", "paths_of", "require_pictures"]
__all__ += ["targets_of_names", "where_in_list"]

#: Paths and targets in Python that a recipe holds; longer lists are not saved.
_MOST_IN_RECIPE = 1000


def opened_tables(
    constructor: str, kind: str, given: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Table]:
    """The tables that a constructor was given, by part; `kind` is what the names of its arguments end with.

    Raises:
        UsageError: there is none, or they contradict `val_split` or `fold`.
        MissingInputError, BadDataError: as `open_table`.
    """
    check_split(options, given, kind)
    example = '"cells.csv"' if kind == "file" else "frame"
    found = check_files(given, constructor, kind, example)
    return {part: open_table(one, f"{part}_{kind}") for part, one in found.items()}


def paths_of(given: PathLike | Sequence[PathLike], argument: str, is_image: Callable[[str], bool]) -> list[str]:
    """The absolute paths of files; a folder stands for the images in it, which `is_image` knows by their names."""
    if isinstance(given, (str, os.PathLike)):
        if os.path.isfile(os.path.expanduser(given)):
            path = os.fspath(given)
            raise UsageError(f"{argument} must be a list of files, or a folder", fix=f'{argument}=["{path}"]')
        return list(list_images(existing_folder(given, argument), argument, is_image).paths)
    paths = list(given)
    if not_paths := [path for path in paths if not isinstance(path, (str, os.PathLike))]:
        raise UsageError(f"{argument} must be a list of paths, not of {type(not_paths[0]).__name__}")
    if not paths:
        raise BadDataError(f"{argument} is empty")
    return [absolute_path(path) or "" for path in paths]


def targets_of_names(
    paths: Sequence[str],
    target: str | Callable[[str], Any],
    where: Callable[[int, str], str],
    problems: Problems,
) -> Iterator[Any]:
    """The targets in the names of files.

    Raises:
        UsageError: `target` is neither a regular expression with a group nor a function.
        BadDataError: the function fails.
    """
    if callable(target):
        for row, path in enumerate(paths):
            try:
                yield target(path)
            except Exception as error:  # the function is the user's
                why = f"{type(error).__name__}: {error}"
                raise BadDataError(f"target fails for {where(row, '')}, {path!r}", why=why) from error
        return
    try:
        pattern = re.compile(target)
    except TypeError:
        raise UsageError(f"target must be a regular expression or a function, not {target!r}") from None
    except re.error as error:
        raise UsageError(f"target={target!r} is not a regular expression", why=str(error)) from None
    if not pattern.groups:
        raise UsageError(f"target={target!r} has no group", fix="put the part that is the target in parentheses")
    for row, path in enumerate(paths):
        found = pattern.search(path.replace(os.sep, "/"))
        if found is None:
            problems.add("name without a target", f"{where(row, '')}: {path!r} does not match {target!r}")
        yield "?" if found is None else found[1]


def where_in_list(argument: str) -> Callable[[int, str], str]:
    """What messages call the rows of an argument: `train_files[3]`."""

    def where(row: int, field: str) -> str:
        return f"{argument}[{row}]"

    return where


def require_pictures(images: Any, argument: str) -> None:
    """Refuse what is not an array or a list of pictures; all in an array have one shape, which is looked at.

    Raises:
        UsageError: something else, or a shape or type that no pictures have.
        BadDataError: there are none.
    """
    if (
        isinstance(images, (str, bytes, Mapping))
        or not hasattr(images, "__len__")
        or not hasattr(images, "__getitem__")
    ):
        raise UsageError(f"{argument} must be an array or a list of images, not {type(images).__name__}")
    if not len(images):
        raise BadDataError(f"{argument} is empty")
    shape = getattr(images, "shape", None)
    if shape is None:
        return
    if len(shape) not in (3, 4):
        raise UsageError(f"{argument} must have three or four axes, the first for the images, not {tuple(shape)}")
    try:
        read_inputs(images[:1] if len(shape) == 4 else images[0])  # all others have the same shape and type
    except UsageError as error:
        what = f"{argument} {tuple(shape)} of {str(images.dtype).removeprefix('torch.')} cannot be read as images"
        raise UsageError(what, why=error.why, fix=error.fix) from None


def in_recipe(given: Any, values: Any) -> Any:
    """An argument as a recipe holds it: a folder, or a short list of plain values.

    Args:
        given: by the user.
        values: the list that it stands for.
    """
    if isinstance(given, (str, os.PathLike)):
        return absolute_path(given)
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(values) <= _MOST_IN_RECIPE and all(isinstance(value, (str, int, float, list)) for value in values):
        return values
    return {"not_saved": f"{len(values):,} values"}


def absolute_path(path: PathLike | None) -> str | None:
    """A path that counts from nowhere else; an address as it is."""
    if path is None or is_address(os.fspath(path)):
        return None if path is None else os.fspath(path)
    return os.path.abspath(os.path.expanduser(path))


def not_none(**arguments: Any) -> dict[str, Any]:
    """The arguments that were given."""
    return {name: value for name, value in arguments.items() if value is not None}
