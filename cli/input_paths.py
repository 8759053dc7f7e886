"""The files that a command is given: checkpoints and images, looked at before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.hub.address import is_hub_address
from flashtask.core.model_path import model_path
from flashtask.core.zoo import load_zoo
from flashtask.data.layout import is_image_name

if TYPE_CHECKING:
    from flashtask.data.pictures import Pictures

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
    given: Sequence[str],
    column: str | None = None,
    root: str | None = None,
    is_image: Callable[[str], bool] = is_image_name,
) -> Pictures:
    """The images that INPUT... stands for: files, folders, addresses, a table or shards; see `open_pictures`.

    A file counts whatever its name is, unless it is that of a table. Paths are as typed, not made absolute.

    Raises:
        MissingInputError: an input that is not there; with the nearest that is.
        UsageError: an address that cannot be fetched, or inputs that do not go together.
        BadDataError: a folder without images, or a table that cannot be read.
    """
    from flashtask.data.pictures import open_pictures

    try:
        return open_pictures(given, column, root, is_image)
    except MissingInputError as error:
        if "glob.glob" in error.fix:
            error.fix = "type it without quotation marks, so that the shell expands it"
        raise
