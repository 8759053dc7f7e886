"""One module that is shared out over processes: its blocks, how it trains, and how it becomes whole again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import forget_fsdp, forget_groups, hook_tables, tensor_tables
from flashtask.trainer.batch_transfer import without_views
from flashtask.trainer.distribution.group import agree_on
from flashtask.trainer.distribution.sharded_tensors import whole
from flashtask.trainer.finetuning.lora import factor_names
from flashtask.trainer.wrapping import parameters_by_name

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["Recomputing", "ShardedModule", "blocks_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: they use the weights of their parts without calling these
_ATOMS = (nn.MultiheadAttention, nn.RNNBase)
#: a block has one of so many parts of all numbers at the least; what is smaller stays with the rest
_SHARE = 64


class _Root(nn.Module):
    """Around a module: its step as a forward pass, for the hooks of FSDP.

    The module itself is not FSDP's root: a step may call `self(batch)`, which would run the root's hooks twice.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Callable[..., Any], *arguments: Any) -> Any:
        return without_views(step(*arguments))


class ShardedModule:
    """A module that is shared out: each block, then what is left.

    Args:
        module: a `flashtask.Module` on its device; afterwards its parameters are other objects.
        blocks: parts of it, none inside another.
        mesh: of the processes, for this module alone.
        reshard_after_forward: whether a block lets go of its weights after its forward pass.
        options: of `fully_shard`: the policies.
    """

    def __init__(
        self,
        module: Module,
        blocks: Collection[nn.Module],
        *,
        mesh: DeviceMesh,
        reshard_after_forward: bool,
        **options: Any,
    ) -> None:
        self.module, self._mesh = module, mesh
        self.blocks: list[Any] = list(blocks)
        self._run = module.trainer.current_fit
        self._is_whole, self._is_syncing = False, True
        agree_on([*module.parameters(), *module.buffers()])
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # shares are rows, whatever the memory format
        self._marks = [_Marks(part) for part in module.modules()]
        self._root = cast(Any, _Root(module))
        for block in self.blocks:
            # FSDP's hook on what a block gives is lost where a view is changed in place.
            block.register_forward_hook(lambda part, inputs, outputs: without_views(outputs))
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(self._root, mesh=mesh, **options)
        with torch.no_grad():
            self._root(lambda: None)  # FSDP finds out here which module is the root
        self._root.reshard()
        for marks in self._marks:
            marks.settle()

    def step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """A training step; gradients of a group are added up where they are, and exchanged once."""
        is_syncing = self._run.group_is_complete
        if is_syncing is not self._is_syncing:
            self._root.set_requires_gradient_sync(is_syncing)
            self._is_syncing = is_syncing
        return self._root(step, *arguments)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights in every process, in the format that a checkpoint has, and buffers of the first, as there.

        FSDP's hooks are off meanwhile. Each would note that a block was computed, and where processes compute different
        numbers of batches, the next backward pass would ask for other blocks in each of them.
        """
        if self._is_whole:
            yield
            return
        self._is_whole = True
        places = self._places()
        hooks = [one for marks in self._marks for one in marks.take_forward_hooks()]
        try:
            replaced = self._put_together()
            for part, name, held in places:
                tensor_tables(part)[0][name] = replaced[held]
            yield
        finally:
            self._is_whole = False
            for part, name, held in places:
                tensor_tables(part)[0][name] = held
            for put_back in hooks:
                put_back()

    def make_whole(self, keeps_states: bool) -> None:
        """Give the module its parameters back, whole, and the optimizers what they know of them, on the CPU.

        Args:
            keeps_states: whether this process wants the optimizers' states.
        """
        places, replaced = self._places(), self._put_together()
        for part, name, held in places:
            tensor_tables(part)[0][name] = replaced[held]
        for optimizer in self._run.optimizers:
            _hold_others(optimizer, replaced, keeps_states)
        self.let_go()
        self.module.to(memory_format=self._run.memory_format)

    def let_go(self) -> None:
        """Let go of what holds the group, which is to end before Python does, or before a process is forked."""
        for marks in self._marks:
            marks.remove()
        forget_groups(self._mesh)
        self._root, self.blocks, self._marks = None, [], []

    def _places(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Where each share is held: (part, name there, parameter)."""
        for unit in (self._root, *self.blocks):
            unit.reshard()
        found = ((part, name, held) for part in self.module.modules() for name, held in tensor_tables(part)[0].items())
        return [(part, name, held) for part, name, held in found if held is not None]

    def _put_together(self) -> dict[nn.Parameter, nn.Parameter]:
        """For each share of a parameter the whole one."""
        agree_on(self.module.buffers())
        return {
            held: nn.Parameter(whole(held.detach()).to(self._run.device), requires_grad=held.requires_grad)
            for held in self.module.parameters()
        }


def _hold_others(optimizer: Optimizer, replaced: dict[nn.Parameter, nn.Parameter], keeps_states: bool) -> None:
    """Let an optimizer hold other parameters, with the states that it had for those before."""
    for group in optimizer.param_groups:
        for place, held in enumerate(group["params"]):
            new = replaced.get(held, held)
            if held in optimizer.state:
                optimizer.state[new] = whole(optimizer.state.pop(held), keeps_states)
            group["params"][place] = new


class _Marks:
    """What FSDP leaves on a part of a module, so that it can be taken away: torch has no way back.

    Args:
        part: as it is now, before FSDP has seen it.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part, self.kind = part, type(part)
        self._names, self._hooks = set(vars(part)), self._numbers()

    def _numbers(self) -> dict[str, set[int]]:
        return {name: set(hooks) for name, hooks in hook_tables(self.part).items()}

    def settle(self) -> None:
        """FSDP has done its work: what came until now is its own, and what comes later is not."""
        self._names = set(vars(self.part)) - self._names
        self._hooks = {name: numbers - self._hooks.get(name, set()) for name, numbers in self._numbers().items()}

    def take_forward_hooks(self) -> Iterator[Callable[[], None]]:
        """Take the hooks around the forward pass away; gives what puts each back to its place."""
        for name, is_first in (("_forward_pre_hooks", True), ("_forward_hooks", False)):
            hooks = hook_tables(self.part)[name]
            for number in self._hooks[name]:
                yield partial(_put, hooks, number, hooks.pop(number), is_first)

    def remove(self) -> None:
        """Restore the class of the part, and remove the hooks that sharding has added."""
        if type(self.part) is not self.kind:
            self.part.__class__ = self.kind
        for name, numbers in self._hooks.items():
            for number in numbers:
                hook_tables(self.part)[name].pop(number, None)
        for name in self._names:
            vars(self.part).pop(name, None)
        forget_fsdp(self.part)


def _put(hooks: OrderedDict[int, Any], number: int, hook: Any, is_first: bool) -> None:
    hooks[number] = hook
    hooks.move_to_end(number, last=not is_first)


class Recomputing:
    """Blocks that keep only what goes into them, and compute the rest again in the backward pass.

    Args:
        blocks: parts of a module that trains.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)
        for block in self._blocks:
            block.forward = partial(_recomputed, block.forward)

    def end(self) -> None:
        """Restore the `forward` of each block."""
        for block in self._blocks:
            forward: Any = block.forward
            del block.forward
            if block.forward != forward.args[0]:
                block.forward = forward.args[0]  # it was an attribute of the block's own


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


# ---- the blocks: parts that are called as a whole, and large enough for an exchange of their own


def blocks_of(module: Module, kinds: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """The blocks, none inside another, in the order in which they were registered.

    Without kinds they come from the module's layer groups, as its backbone gives them; a module without a backbone
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
    # LoRA's factors are in the group of the weight that they belong to.
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
