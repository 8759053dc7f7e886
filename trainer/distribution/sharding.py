"""One module that is shared out over processes: how it is done, how it trains, and how it becomes whole again."""

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

from flashtask.core.library_internals import forget_composable, tensor_tables
from flashtask.trainer.batch_transfer import without_views
from flashtask.trainer.distribution.group import agree_on
from flashtask.trainer.distribution.shards import whole

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["Recomputing", "ShardedModule"]


class _Root(nn.Module):
    """Around a module: its step as a forward pass, for FSDP's hooks to stand around.

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
            # FSDP's hook on what a block gives is lost where somebody changes a view in place.
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
        # Torch keeps meshes for good, in what it remembers of operations.
        vars(self._mesh).get("_pg_registry", {}).clear()
        self._root, self.blocks, self._marks = None, [], []

    def _places(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Where each share is held: (part, name there, parameter)."""
        for unit in (self._root, *self.blocks):
            unit.reshard()
        tables = [(part, tensor_tables(part)[0]) for part in self.module.modules()]
        return [(part, name, held) for part, table in tables for name, held in table.items() if held is not None]

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
        held = vars(self.part).items()
        return {name: set(hooks) for name, hooks in held if "hooks" in name and isinstance(hooks, dict)}

    def settle(self) -> None:
        """FSDP has done its work: what came until now is its own, and what comes later is not."""
        self._names = set(vars(self.part)) - self._names
        self._hooks = {name: numbers - self._hooks.get(name, set()) for name, numbers in self._numbers().items()}

    def take_forward_hooks(self) -> Iterator[Callable[[], None]]:
        """Take the hooks around the forward pass away; gives what puts each back to its place."""
        for name, is_first in (("_forward_pre_hooks", True), ("_forward_hooks", False)):
            hooks: OrderedDict[int, Any] = vars(self.part)[name]
            for number in self._hooks[name]:
                yield partial(_put, hooks, number, hooks.pop(number), is_first)

    def remove(self) -> None:
        """Take everything away."""
        if type(self.part) is not self.kind:
            self.part.__class__ = self.kind
        for name, numbers in self._hooks.items():
            for number in numbers:
                vars(self.part)[name].pop(number, None)
        for name in self._names:
            vars(self.part).pop(name, None)
        forget_composable(self.part)


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
        """Let the blocks compute as before."""
        for block in self._blocks:
            forward: Any = block.forward
            del block.forward
            if block.forward != forward.args[0]:
                block.forward = forward.args[0]  # it was an attribute of the block's own


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)
