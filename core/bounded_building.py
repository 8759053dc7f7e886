"""Building a module from settings that a file holds, with no more memory and time than the file's weights explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashtask.core.errors import IntegrityError
from flashtask.core.library_internals import are_on_meta, before_each_operation, makes_no_memory, on_meta

__all__ = ["no_larger_than"]

_SPARE_BYTES = 256 * 2**20
_SPARE_OPERATIONS = 20_000


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, new tensors may take four times the memory of `weights` and 256 MiB, and as few operations as that needs.

    A few bytes of settings can name the largest of all backbones, or a head of a billion outputs. Each operation is
    tried on the meta device first, so what is too large is refused before there is memory for it.

    Raises:
        IntegrityError: more is asked for.
    """
    size = sum(tensor.nbytes for tensor in weights.values() if isinstance(tensor, Tensor))
    bounds = _Bounds(4 * size + _SPARE_BYTES, 100 * len(weights) + _SPARE_OPERATIONS)
    with before_each_operation(bounds.count):
        yield


class _Bounds:
    def __init__(self, most_bytes: int, most_operations: int) -> None:
        self._bytes, self._operations = most_bytes, most_operations

    def count(self, operation: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._operations -= 1
        is_on_meta = "device" not in options and are_on_meta((args, options))
        if not makes_no_memory(operation) and not is_on_meta:
            self._bytes -= _new_bytes(operation, args, options)
        if self._bytes < 0 or self._operations < 0:
            raise IntegrityError(
                "its settings describe a model that is far larger than its weights",
                why="building it would take more memory or time than they explain",
            )


def _new_bytes(operation: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """The size of what an operation gives, found on the meta device; 0 where it depends on values."""
    args, options = on_meta((args, options))
    if "device" in options or not any(isinstance(one, Tensor) for one in args):
        options = {**options, "device": torch.device("meta")}
    options.pop("generator", None)
    try:
        found = operation(*args, **options)
    except (RuntimeError, TypeError):
        return 0
    found = found if isinstance(found, (list, tuple)) else (found,)
    return sum(one.nbytes for one in found if isinstance(one, Tensor))
