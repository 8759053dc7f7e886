"""What a module may write in place of the engine's own parts of a step: `backward`, `optimizer_step` and so on.

A module that writes one is a run extension that wraps the part, so a module that writes none costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from flashtask.trainer.hooks import is_written
from flashtask.trainer.run_extension import RunExtension

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run

__all__ = ["StepOptimizer", "StepOverrides"]

#: part of a run -> the method of a module that takes its place
_METHODS = {
    "backward": "backward",
    "clip_gradients": "configure_gradient_clipping",
    "optimizer_step": "optimizer_step",
    "zero_grad": "optimizer_zero_grad",
    "scheduler_step": "lr_scheduler_step",
}


class StepOptimizer:
    """The optimizer that `optimizer_step` is given: it steps through the run's precision; the rest is its own.

    Args:
        optimizer: that steps.
        step: of the run's precision.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[..., Any]) -> None:
        self.optimizer, self._step = optimizer, step

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "optimizer"), name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step; the gradients exist already, so the closure only gives the loss."""
        if closure is not None:
            closure()
        return self._step(self.optimizer)


class StepOverrides(RunExtension):
    """Lets the methods of a module take the places of the parts of a step.

    Args:
        module: that writes some of them; one that steps its optimizers itself only has `backward` called.
        module_base: `Module`, whose own do what the engine does.
    """

    def __init__(self, module: Module, module_base: type) -> None:
        parts = _METHODS if module.automatic_optimization else {"backward": "backward"}
        self.written = {part: name for part, name in parts.items() if is_written(module, name, module_base)}
        self._loss: torch.Tensor | None = None

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The method of the module in the place of the part, if it is written."""
        if name == "backward" and "optimizer_step" in self.written:
            call = self._keeping_loss(call)
        if name not in self.written:
            return call
        method = _as_written(getattr(run.module, self.written[name]))
        return getattr(self, f"_{name}")(run, method, call)  # type: ignore[no-any-return]

    def _keeping_loss(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: torch.Tensor, **options: Any) -> Any:
            self._loss = loss.detach()
            return call(loss, **options)

        return backward

    def _backward(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: torch.Tensor, **options: Any) -> Any:
            self._loss = loss.detach()
            optimizer = run.optimizers[run.turn] if run.optimizers else None
            return method([run.precision.scaled(loss)], {"optimizer": optimizer, "optimizer_idx": run.turn}, **options)

        return backward

    def _clip_gradients(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def clip_gradients(optimizer: Optimizer) -> Any:
            trainer = run.trainer
            limits = [trainer.gradient_clip_val, trainer.gradient_clip_algorithm]
            method([optimizer, *limits], {"optimizer_idx": run.turn})
            run.guard.hold_back(optimizer)

        return clip_gradients

    def _optimizer_step(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def optimizer_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            stepped = StepOptimizer(optimizer, call)
            given = [run.epoch, run.batch_idx - 1, stepped, closure or (lambda: self._loss)]
            return method(given, {"optimizer_idx": run.turn, **_OLDER})

        return optimizer_step

    def _zero_grad(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(optimizer: Optimizer) -> Any:
            return method([run.epoch, run.batch_idx - 1, optimizer], {"optimizer_idx": run.turn})

        return zero_grad

    def _scheduler_step(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def scheduler_step(scheduler: Any, metric: float | None) -> Any:
            return method([scheduler, metric], {"optimizer_idx": run.turn})

        return scheduler_step


#: arguments of `optimizer_step` that Lightning 1.x gave
_OLDER = {"on_tpu": False, "using_native_amp": False, "using_lbfgs": False}


def _as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is called with today's arguments in their order, and with older ones where it names them."""
    parameters = inspect.signature(method).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)

    def call(today: Sequence[Any], older: dict[str, Any], **options: Any) -> Any:
        rest = iter(today)
        arguments = [older[name] if name in older else next(rest, _MISSING) for name in names]
        arguments = [one for one in arguments if one is not _MISSING]
        return method(*arguments, *(rest if takes_any else ()), **options)

    return call


_MISSING = object()
