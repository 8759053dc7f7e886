"""Tensors of which each process has a share: put together for a file, and shared out again when it is read."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["as_held", "is_shared", "of_this_process", "optimizer_state_as_held", "state_as_held", "whole"]


def is_shared(value: Any) -> bool:
    """Whether this process has a share of a tensor only; the module of such tensors is not loaded to find out."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def of_this_process(value: Tensor) -> Tensor:
    """What this process has of a tensor, in the memory that the tensor is in."""
    return value.to_local() if is_shared(value) else value  # type: ignore[attr-defined]


def whole(value: Any, keeps: bool = True) -> Any:
    """The value, or a copy of it in which every tensor that is shared out is whole; all processes ask together.

    Args:
        value: a tensor, or dictionaries and lists with some in them.
        keeps: whether this process wants them; else they come without memory, on the device `meta`. In a dictionary or
            list they come to the CPU.
    """
    if is_shared(value):
        return value.full_tensor()
    return _whole(value, keeps) if _holds_shares(value) else value


def _holds_shares(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_shares, value.values()))
    return any(map(_holds_shares, value)) if isinstance(value, (list, tuple)) else is_shared(value)


def _whole(value: Any, keeps: bool) -> Any:
    if is_shared(value):
        found = value.detach().full_tensor()
        return found.cpu() if keeps else torch.empty_like(found, device="meta")
    if isinstance(value, dict):
        made = copy.copy(value)  # with what torch hangs on a state dict
        made.update({key: _whole(one, keeps) for key, one in value.items()})
        return made
    if type(value) in (list, tuple):
        return type(value)(_whole(one, keeps) for one in value)
    return value


def as_held(value: Any, like: Any) -> Any:
    """A whole tensor, which every process has, as this one holds another of its shape: whole, or its share of it."""
    if not is_shared(like) or is_shared(value) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)


def state_as_held(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state of a module from a file, with every tensor as the module holds its own of that name."""
    if not any(map(is_shared, own.values())):
        return state
    return {name: as_held(value, own.get(name)) for name, value in state.items()}


def optimizer_state_as_held(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state from a file, with what belongs to a parameter shared out as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(parameters) != len(numbers) or not any(map(is_shared, parameters)):
        return state  # the optimizer reports what does not fit
    like = dict(zip(numbers, parameters, strict=True))
    by_number = {
        number: {name: as_held(value, like[number]) for name, value in values.items()} if number in like else values
        for number, values in state["state"].items()
    }
    return {**state, "state": by_number}
