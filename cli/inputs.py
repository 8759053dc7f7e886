"""The files that a command is given: checkpoints and images, looked at before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.files import missing_file
from flashtask.core.hub.address import is_hub_address
from flashtask.core.zoo import load_zoo
from flashtask.data.folders import list_images
from flashtask.data.layout import nearest_existing

__all__ = ["checkpoint_source", "image_paths"]


def checkpoint_source(path: str) -> Path | str:
    """A checkpoint file or a pretrained folder that is there, or an address; a name of the zoo's checkpoints is one.

    Raises:
        UsageError: no path at all.
        MissingInputError: there is no such file; with the nearest that is.
    """
    if not path.strip():
        raise UsageError("CKPT is empty", fix="flashtask predict runs/000/best.ckpt IMAGE")
    if "://" in path or is_hub_address(path):
        return path
    file = Path(path).expanduser()
    if (file / "config.json").is_file():
        return file
    if not file.exists() and (named := load_zoo().checkpoints.get(path)) is not None:
        return f"hf://{named.repository}@{named.revision}"
    if not file.is_file():
        raise missing_file(file)
    return file


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
