"""Whether a value is the kind of number that an argument needs; True and False are no numbers."""

from __future__ import annotations

import math
from typing import TypeGuard

__all__ = ["is_number", "is_whole"]


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
