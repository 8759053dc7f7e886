"""The files that a command is given: checkpoints and images, looked at before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.hub.address import is_hub_address
from flashtask.core.model_path import model_path
from flashtask.core.zoo import load_zoo

if TYPE_CHECKING:
    from flashtask.data.inputs import Input

__all__ = ["checkpoint_source", "image_inputs"]


def checkpoint_source(path: str) -> Path | str:
    """The checkpoint or the folder in timm's layout that MODEL means, or its address; a name of the zoo's is one.

    Raises:
        UsageError: no path at all.
        MissingInputError: there is no such file, with the nearest that is; or no model in a folder.
    """
    if not path.strip():
        raise UsageError("MODEL is empty", fix="flashtask predict runs/000 IMAGE")
    if "://" in path or is_hub_address(path):
        return path
    if not Path(path).expanduser().exists() and (named := load_zoo().checkpoints.get(path)) is not None:
        return f"hf://{named.repository}@{named.revision}"
    return model_path(path)


def image_inputs(
    given: Iterable[str | Input], read: Callable[[Any], tuple[list[Input], bool]] | None = None
) -> list[Input]:
    """The images that files, folders and addresses stand for, in the order they were given; folders sorted by path.

    A file counts whatever its name is, as the user named it. Paths are as typed, not made absolute.

    Args:
        given: as typed.
        read: what reads them, `Task.read_inputs`; image files are read without it.

    Raises:
        MissingInputError: an input that is not there; with the nearest that is.
        UsageError: an address that cannot be fetched.
        BadDataError: a folder without images.
    """
    from flashtask.data.inputs import read_inputs

    try:
        return (read or read_inputs)(list(given))[0]
    except MissingInputError as error:
        if "glob.glob" in error.fix:
            error.fix = "type it without quotation marks, so that the shell expands it"
        raise
