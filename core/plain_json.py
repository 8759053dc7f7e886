"""JSON as files of flashtask hold it: written in one canonical way, read without forgiveness."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from flashtask.core.errors import FlashtaskError, IntegrityError, StorageError
from flashtask.core.files import open_regular

__all__ = ["canonical_json", "number_or_null", "parse_json", "read_json"]

_MAX_PARTS = 2_000_000


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def number_or_null(value: float) -> float | None:
    """A number as JSON can hold it: NaN and infinity, which it has no words for, become null."""
    return value if math.isfinite(value) else None


def parse_json(text: str | bytes) -> Any:
    """JSON without what Python's reader lets pass: duplicate keys, NaN and infinite numbers.

    Raises:
        IntegrityError: the text is not such JSON, is nested too deeply, or has more than 2 million lists and tables,
            which take some thirty times the memory of their text.
    """
    parts = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if parts > _MAX_PARTS:
        raise IntegrityError(f"not plain JSON: more than {_MAX_PARTS:,} lists and tables")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not plain JSON: {str(error)[:200]}") from error


def read_json(path: str | os.PathLike[str], *, most: int = 2**20) -> Any:
    """The content of a small JSON file, as `parse_json` reads it.

    Args:
        path: an ordinary file.
        most: bytes that it may have.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is larger, or not such JSON.
        StorageError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        with open_regular(path) as file:
            raw = file.read(most + 1)
    except OSError as error:
        if isinstance(error, FlashtaskError):
            raise
        raise StorageError(f"cannot read {name}: {error.strerror}", fix=f"ls -l {name}") from error
    if len(raw) > most:
        raise IntegrityError(f"{name} was not read: it is larger than {most:,} bytes")
    try:
        return parse_json(raw)
    except IntegrityError as error:
        raise IntegrityError(f"{name} was not read: {error.what}") from error


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
