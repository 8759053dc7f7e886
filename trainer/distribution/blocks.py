"""The blocks of a module: parts that are called as a whole, and large enough for an exchange of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning.lora import factor_names
from flashtask.trainer.wrapping import parameters_by_name

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["blocks_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: they use the weights of their parts without calling these
_ATOMS = (nn.MultiheadAttention, nn.RNNBase)
#: a block has one of so many parts of all numbers at the least; what is smaller stays with the rest
_SHARE = 64


def blocks_of(module: Module, kinds: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """The blocks, none inside another, in the order in which they were registered.

    Without kinds they come from the module's layer groups, as its backbone tells them; a module without a backbone
    gives its children, and of those that hold most of it their children.

    Args:
        module: a `flashtask.Module`.
        kinds: classes whose instances are the blocks; an empty collection means none.

    Raises:
        UsageError: the module has no part of these kinds.
    """
    total = sum(parameter.numel() for parameter in module.parameters())
    if kinds is None:
        found = list(_in_one_group(module, _groups(module), total / _SHARE))
    else:
        found = list(_of_kinds(module, tuple(kinds)))
        if kinds and not found:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UsageError(
                f"auto_wrap_policy: {type(module).__name__} has no part of the class {names}",
                fix="the class of its blocks, such as torch.nn.TransformerEncoderLayer, or None to have them found",
            )
    return [part for part in found if not _is_tied(part, module)]


def _of_kinds(part: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in part.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _of_kinds(child, kinds)


def _groups(module: Module) -> dict[int, int]:
    """The number of the group that each parameter is in; those of the head are in none."""
    try:
        names = module.layer_groups()
    except UsageError:  # it has no backbone
        parts = _children(module, sum(parameter.numel() for parameter in module.parameters()))
        return {id(p): number for number, part in enumerate(parts) for p in part.parameters()}
    parameters, factors = parameters_by_name(module), factor_names(module)
    found = {id(parameters[name]): number for number, group in enumerate(names) for name in group}
    # LoRA's factors are where the weight is that they stand beside.
    for name in factors:
        beside = [p for other, p in parameters.items() if other.rpartition(".")[0] == name.rpartition(".")[0]]
        found.update({id(parameters[name]): found[id(p)] for p in beside if id(p) in found})
    return found


def _children(part: nn.Module, total: int) -> Iterator[nn.Module]:
    for child in part.children():
        size = sum(parameter.numel() for parameter in child.parameters())
        holds_much = size > total / (4 if isinstance(child, _CONTAINERS) else 2)
        if holds_much and list(child.children()) and not isinstance(child, _ATOMS):
            yield from _children(child, total)
        else:
            yield child


def _in_one_group(part: nn.Module, groups: dict[int, int], least: float) -> Iterator[nn.Module]:
    """The largest parts of which every parameter is in the same group."""
    for child in part.children():
        own = {groups.get(id(parameter)) for parameter in child.parameters()}
        is_block = len(own) == 1 and None not in own and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if is_block:
            if sum(parameter.numel() for parameter in child.parameters()) >= least:
                yield child
        elif not isinstance(child, _ATOMS):
            yield from _in_one_group(child, groups, least)


def _is_tied(part: nn.Module, module: nn.Module) -> bool:
    """Whether something outside of a part uses a weight of it too."""
    inside = {id(one) for one in part.modules()}
    own = {id(parameter) for parameter in part.parameters()}
    outside = (one for one in module.modules() if id(one) not in inside)
    return any(id(p) in own for one in outside for p in one.parameters(recurse=False))
