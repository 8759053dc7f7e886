"""What loggers to other libraries share: importing what not everybody has, and hyper-parameters as plain values."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping, Sequence, Set
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from flashtask.core.errors import UsageError

__all__ = ["first_line", "flat_values", "library", "plain_value", "require_library"]


def require_library(name: str, wanted_by: str, command: str) -> None:
    """Look whether a library is there, without importing it.

    Args:
        name: what is imported.
        wanted_by: which logger needs it.
        command: what installs it.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec(name) is None:
        raise UsageError(f"{wanted_by} needs {name}, which is not installed", fix=command)


def library(name: str, wanted_by: str, command: str) -> Any:
    """Import a library, or a module of one, that not everybody has; arguments as for `require_library`.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    require_library(name.partition(".")[0], wanted_by, command)
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{wanted_by} needs {name}, which cannot be imported", why=str(error), fix=f"{command} --upgrade"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of a library's message, which may be a page long."""
    return str(error).strip().partition("\n")[0]


def plain_value(value: object) -> Any:
    """A value made of numbers, texts, lists and dictionaries with names; the same for equal hyper-parameters.

    Paths become texts, a tensor of one element a number, classes and functions their names, other objects and larger
    tensors the name of their type; NaN and infinity become texts, because JSON has no such numbers.
    """
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Mapping):
        return {str(plain_value(key)): plain_value(part) for key, part in value.items()}
    if isinstance(value, Set):
        return sorted((plain_value(part) for part in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain_value(part) for part in value]
    if hasattr(value, "shape") and hasattr(value, "item"):  # a tensor or an array
        shape = tuple(value.shape)
        return plain_value(value.item()) if math.prod(shape) == 1 else f"{type(value).__name__} of shape {shape}"
    return str(getattr(value, "__qualname__", type(value).__name__))


def flat_values(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Plain values without nesting: `{"head": {"width": 8}}` becomes `{"head.width": 8}`, lists become texts."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        plain = plain_value(value)
        if isinstance(plain, dict) and plain:
            flat |= {f"{name}.{inner}": part for inner, part in flat_values(plain).items()}
        else:
            flat[str(name)] = plain if isinstance(plain, (bool, int, float, str)) else str(plain)
    return flat
