"""JSON as files of flashtask hold it: written in one canonical way, read without forgiveness."""

from __future__ import annotations

import json
import math
from typing import Any

from flashtask.core.errors import IntegrityError

__all__ = ["canonical_json", "number_or_null", "parse_json"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def number_or_null(value: float) -> float | None:
    """A number as JSON can hold it: NaN and infinity, which it has no words for, become null."""
    return value if math.isfinite(value) else None


def parse_json(text: str | bytes) -> Any:
    """JSON without what Python's reader lets pass: duplicate keys, NaN and infinite numbers.

    Raises:
        IntegrityError: the text is not such JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not plain JSON: {str(error)[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value
