"""A training step whose gradients are added up over processes, by torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["SharedStep"]


class _Step(nn.Module):
    """A training step as the forward pass of a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


class SharedStep:
    """Wraps the step again when other parameters train; without any, there is nothing to exchange."""

    def __init__(self, module: Module, step: Callable[..., Any], find_unused_parameters: bool) -> None:
        self.module, self.step, self.find_unused_parameters = module, step, find_unused_parameters
        self._wrapped: dict[tuple[int, ...], DistributedDataParallel] = {}

    def close(self) -> None:
        """Let go of what holds the group: it is to end before Python does, also where a traceback holds the wrapper."""
        for wrapped in self._wrapped.values():
            for name in ("reducer", "logger", "process_group"):
                wrapped.__dict__.pop(name, None)
        self._wrapped.clear()

    def __call__(self, *arguments: Any) -> Any:
        """Take the step; in the last batch of an accumulation group gradients are exchanged."""
        run = self.module.trainer.current_fit
        trained = tuple(id(one) for one in self.module.parameters() if one.requires_grad)
        if not trained or not run.automatic:
            return self.step(*arguments)
        if trained not in self._wrapped:
            made = self._wrapped[trained] = DistributedDataParallel(
                _Step(self.module, self.step), find_unused_parameters=self.find_unused_parameters
            )
            # As an attribute: the argument has another name in each version of torch.
            made.broadcast_buffers = _changes_buffers(self.module)
        wrapped = self._wrapped[trained]
        # Gradients of a group are added up where they are, and exchanged once.
        with nullcontext() if run.group_is_complete else wrapped.no_sync():
            return wrapped(*arguments)


def _changes_buffers(module: nn.Module) -> bool:
    """Whether a part with buffers is in training mode: BatchNorm's statistics. What is frozen leaves its own alone."""
    return any(part.training and any(True for _ in part.buffers(recurse=False)) for part in module.modules())
