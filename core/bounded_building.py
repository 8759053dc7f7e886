"""Building a module from settings that a file holds, with no more memory and time than the file's weights explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flashtask.core.errors import IntegrityError

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
    with _Bounds(4 * size + _SPARE_BYTES, 100 * len(weights) + _SPARE_OPERATIONS):
        yield


class _Bounds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, most_bytes: int, most_operations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes, self._operations = most_bytes, most_operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        self._operations -= 1
        if not _changes_or_views(func):
            self._bytes -= _new_bytes(func, args, options)
        if self._bytes < 0 or self._operations < 0:
            raise IntegrityError(
                "its settings describe a model that is out of all proportion to its weights",
                why="building it would take more memory or time than they explain",
            )
        return func(*args, **options)


def _changes_or_views(func: Any) -> bool:
    """Whether an operation makes no new memory: one on its arguments' own, or one with another view of it."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def _new_bytes(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """The size of what an operation gives, found on the meta device; 0 where it depends on values."""
    args, options = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, options))
    if "device" in options or not any(isinstance(one, Tensor) for one in args):
        options = {**options, "device": torch.device("meta")}
    options.pop("generator", None)
    try:
        found = func(*args, **options)
    except (RuntimeError, TypeError):
        return 0
    found = found if isinstance(found, (list, tuple)) else (found,)
    return sum(one.nbytes for one in found if isinstance(one, Tensor))
