"""Predictions as files of their own kind, such as masks, and as pictures. Importing this loads no torch.

Tables, CSV and JSON are written from `as_row` and `to_dict` of any prediction. A class of predictions that other
programs know as files names their formats in `formats`, and writes them in `write`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import OutputError, UsageError
from flashtask.core.files import atomic_write
from flashtask.data.cached_inputs import is_address

if TYPE_CHECKING:
    from PIL.Image import Image

    from flashtask.data.inputs import Input

__all__ = ["FILE_FORMATS", "drawn", "output_names", "write_image", "write_results"]

#: Formats of files for some kinds of predictions, and what is written.
FILE_FORMATS: Mapping[str, str] = {
    "coco": "COCO's list of results, as one JSON file",
    "png": "a mask of numbers of classes or objects for each image, in a folder",
}


def output_names(paths: Sequence[str]) -> dict[str, str]:
    """For each image the name of what is written of it: its path below the folder of all, without the ending.

    Raises:
        UsageError: two images would have one name.
    """
    files = [os.path.basename(path) if is_address(path) else os.path.abspath(path) for path in paths]
    here = [os.path.dirname(file) for file in files if os.path.isabs(file)]
    common = os.path.commonpath(here) if here else ""
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path, file in zip(paths, files, strict=True):
        name = os.path.splitext(os.path.relpath(file, common) if os.path.isabs(file) else file)[0]
        if taken.setdefault(name, path) != path:
            raise UsageError(
                f"{taken[name]!r} and {path!r} would be written to one file",
                why="files of predictions are named after images, without the ending",
                fix="predict them one after the other, into two folders",
            )
        names[path] = name
    return names


def drawn(
    predictions: Iterable[Any], inputs: Iterable[Input], names: Mapping[str, str], folder: str | os.PathLike[str]
) -> Iterator[Any]:
    """Pass predictions on, and write each one's picture to `folder/NAME.png` before.

    Args:
        predictions: with a `path` each; images that could not be read have no picture.
        inputs: the images, in the same order.
        names: of `output_names`.
        folder: made if it is not there.
    """
    import PIL.Image

    from flashtask.data.checks import BadImage
    from flashtask.data.decoding import Decoding

    for prediction, given in zip(predictions, inputs, strict=True):
        if not isinstance(prediction, BadImage):
            bounds = given.bounds()
            value_range = "format" if bounds is None or bounds[0] == bounds[1] else bounds
            image = PIL.Image.fromarray(given.read(Decoding(3, value_range=value_range))).convert("RGB")
            write_image(prediction.draw(image), Path(folder, f"{names[prediction.path]}.png"))
        yield prediction


def write_results(results: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a JSON list in one step, an element a line.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    empty = True
    with atomic_write(Path(path)) as file:
        for number, result in enumerate(results):
            file.write((",\n" if number else "[\n").encode() + json.dumps(result).encode())
            empty = False
        file.write(b"[]\n" if empty else b"\n]\n")


def write_image(image: Image, path: Path) -> None:
    """Write a PNG file in one step; its folder is made.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {str(path.parent)!r}", why=error.strerror or str(error)) from error
    with atomic_write(path) as file:
        image.save(file, "PNG")
