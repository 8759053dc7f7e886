"""Hyper-parameters as logs can show them: plain values, whatever a module was made with."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

__all__ = ["flat_values", "plain_value"]


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
