"""The files that a command is given: checkpoints and images, looked at before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.hub.address import is_hub_address
from flashtask.core.model_path import model_path
from flashtask.core.zoo import load_zoo
from flashtask.data.folders import list_images
from flashtask.data.layout import nearest_existing

__all__ = ["checkpoint_source", "image_paths"]


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


def image_paths(inputs: Iterable[str]) -> list[str]:
    """The image files that files and folders stand for, in the order of the inputs; folders sorted by path.

    A file counts whatever its name is, as the user named it. Paths are as typed, not made absolute.

    Raises:
        MissingInputError: an input that is not there; with the nearest that is.
        BadDataError: a folder without images.
    """
    paths: list[str] = []
    for given in inputs:
        path = os.path.expanduser(given)
        if os.path.isdir(path):
            paths += list_images(Path(path), "IMAGE_OR_FOLDER").paths
        elif os.path.lexists(path):
            paths.append(path)
        else:
            close = nearest_existing(Path(path)) if path.strip() else None
            fix = f"did you mean {str(close)!r}?" if close else ""
            raise MissingInputError(f"no such image or folder: {given!r}", fix=fix)
    return paths
