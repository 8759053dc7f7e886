"""`config.json` of a model from others: read within bounds, and refused if it asks for code to be run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from flashtask.core.errors import IntegrityError
from flashtask.core.plain_json import read_json

__all__ = ["CODE_KEYS", "read_foreign_config"]

#: Keys by which the files of other libraries (transformers, diffusers, Hydra, jsonargparse, Lightning) name code that
#: their readers import or run.
CODE_KEYS = frozenset(
    (
        *("auto_map", "trust_remote_code", "custom_pipelines"),
        *("_target_", "_instantiator", "_instantiator_", "class_path", "init_args"),
    )
)

_MOST_BYTES = 8 << 20  # 21,000 labels with descriptions take some 2 MiB
_MAX_DEPTH = 32


def read_foreign_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `config.json`.

    Args:
        path: of at most 8 MiB.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is larger, no plain JSON object, nested more than 32 deep, or has one of `CODE_KEYS`, except
            as the name of a class (below a key that begins with `label`).
        StorageError: it cannot be read.
    """
    content = read_json(path, most=_MOST_BYTES)
    if not isinstance(content, dict):
        raise IntegrityError(f"{os.fspath(path)} was refused: it holds no JSON object")
    for place, key in _keys(content, "", os.fspath(path)):
        if key in CODE_KEYS and not place.startswith("label"):
            raise IntegrityError(
                f"{os.fspath(path)} asks for code to be run (`{place}`) and was refused",
                why="flashtask runs no code that comes with a model",
                fix="use a model whose config.json is timm's or flashtask's",
            )
    return content


def _keys(value: Any, place: str, path: str, depth: int = 1) -> Iterator[tuple[str, str]]:
    """Every key of every table, with its place; lists count as a level."""
    if depth > _MAX_DEPTH and isinstance(value, dict | list):
        raise IntegrityError(f"{path} was refused: it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, part in value.items():
            here = f"{place}.{key}" if place else key
            yield here, key
            yield from _keys(part, here, path, depth + 1)
    elif isinstance(value, list):
        for part in value:
            yield from _keys(part, place, path, depth + 1)
