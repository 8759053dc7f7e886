"""Moving batches to a device, into a memory or number format, whatever structure their tensors are in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import is_view

__all__ = ["channels_last", "detached", "in_dtype", "move_to_device", "stacked", "without_views"]


def move_to_device(batch: Any, device: torch.device) -> Any:
    """The same structure with every tensor on `device`.

    Args:
        batch: tensors in lists, tuples, named tuples, mappings and dataclasses of any depth. An object of another kind
            that has a method `to` (a PackedSequence, say) moves itself, also where it is a tuple or mapping; what has
            none is kept as it is.
        device: where to.

    Raises:
        UsageError: a mapping that neither moves itself nor can be made from a dictionary.
    """
    return _mapped(batch, lambda leaf: _moved(leaf, device))


def channels_last(batch: Any) -> Any:
    """The same structure with every floating tensor of four dimensions laid out channels-last; the rest is kept."""
    return _mapped(batch, _laid_out)


def in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The same structure with every floating tensor in a number format; whole numbers, labels and masks are kept."""
    return _mapped(batch, lambda leaf: leaf.to(dtype) if _is_floating(leaf) else leaf)


def _is_floating(leaf: Any) -> bool:
    values = leaf.data if isinstance(leaf, PackedSequence) else leaf
    return isinstance(values, torch.Tensor) and values.is_floating_point()


def detached(outputs: Any) -> Any:
    """The same structure with every tensor cut off from its graph, so that an epoch of outputs fits into memory."""
    return _mapped(outputs, lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)


def stacked(values: Sequence[Any]) -> Any:
    """Structures of one kind as one, whose tensors and numbers are those of all, stacked: (number of structures, ...).

    Other values are those of the first structure.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {key: stacked([one[key] for one in values]) for key in first}
    if isinstance(first, (list, tuple)):
        parts = [stacked(part) for part in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, (int, float)):
        return torch.tensor(values)
    return torch.stack(list(values)) if isinstance(first, torch.Tensor) else first


def without_views(outputs: Any) -> Any:
    """The same structure in which a tensor that wants a gradient and is a view of another is a copy."""

    def own(leaf: Any) -> Any:
        is_copied = isinstance(leaf, torch.Tensor) and leaf.requires_grad and is_view(leaf)
        return leaf.clone() if is_copied else leaf

    return _mapped(outputs, own)


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to(device, non_blocking=device.type == "cuda" and leaf.is_pinned())
    return leaf.to(device) if _moves_itself(leaf) else leaf


def _laid_out(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf.is_floating_point() and leaf.layout is torch.strided:
        return leaf.contiguous(memory_format=torch.channels_last)
    return leaf


def _moves_itself(value: Any) -> bool:
    return callable(getattr(value, "to", None)) and not isinstance(value, type)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of every leaf, in containers of the same kinds."""
    kind = type(value)
    if kind in (list, tuple):
        return kind(_mapped(part, change) for part in value)
    if kind is dict:
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, torch.Tensor) or _moves_itself(value):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_mapped(part, change) for part in value))
    if isinstance(value, (list, tuple)):
        return kind(_mapped(part, change) for part in value)
    if isinstance(value, Mapping):
        return _mapping(value, {key: _mapped(part, change) for key, part in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, change)
    return change(value)


def _mapping(value: Any, changed: dict[Any, Any]) -> Any:
    """A kind of dict keeps what else it has (a default factory, attributes); another mapping is made from its items."""
    if isinstance(value, dict) or hasattr(value, "__copy__"):
        made = copy.copy(value)
        for key, part in changed.items():
            made[key] = part
        return made
    try:
        return type(value)(changed)
    except TypeError as error:
        name = type(value).__name__
        raise UsageError(
            f"a batch holds a {name}, which cannot be made from a dictionary",
            why=str(error),
            fix=f"give {name} a method to(self, device), or collate batches into dictionaries",
        ) from None


def _dataclass(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy, made without `__init__`: a field may be frozen, or no argument of it."""
    made = copy.copy(value)
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            object.__setattr__(made, field.name, _mapped(getattr(value, field.name), change))
    return made
