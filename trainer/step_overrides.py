"""What a module may write in place of the engine's own parts of a step: `backward`, `optimizer_step` and so on.

A module that writes one is a run extension that wraps the part, so a module that writes none costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from flashtask.core.library_internals import change_count
from flashtask.core.metrics import uncounted
from flashtask.trainer.hooks import is_written
from flashtask.trainer.optimizers import needs_closure
from flashtask.trainer.run_extension import RunExtension

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.run import Run

__all__ = ["Evaluation", "StepOptimizer", "StepOverrides"]

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
        calls_closure: the optimizer calls the closure itself; otherwise it is called once, before the step.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[..., Any], calls_closure: bool) -> None:
        self.optimizer, self._step, self._calls_closure = optimizer, step, calls_closure

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "optimizer"), name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, with the closure that `optimizer_step` is given or without one."""
        if closure is not None and not self._calls_closure:
            closure()
            closure = None
        return self._step(self.optimizer) if closure is None else self._step(self.optimizer, closure)


class StepOverrides(RunExtension):
    """Lets the methods of a module take the places of the parts of a step.

    Args:
        run: of training; where the module steps its optimizers itself, it only has `backward` called.
        module_base: `Module`, whose own do what the engine does.
    """

    def __init__(self, run: FitRun, module_base: type) -> None:
        parts = _METHODS if run.automatic else {"backward": "backward"}
        self.written = {part: name for part, name in parts.items() if is_written(run.module, name, module_base)}
        if run.automatic and any(needs_closure(type(optimizer)) for optimizer in run.optimizers):
            self.written["optimizer_step"] = "optimizer_step"
        self._evaluation = Evaluation()

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The method of the module in the place of the part, if it is written."""
        if name in self.written:
            method = _as_written(getattr(run.module, self.written[name]))
            call = getattr(self, f"_{name}")(run, method, call)
        if "optimizer_step" in self.written and name in ("training_step", "backward"):
            call = getattr(self._evaluation, f"record_{name}")(run, call)
        return call

    def _backward(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: torch.Tensor, **options: Any) -> Any:
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
        def optimizer_step(optimizer: Optimizer) -> Any:
            # A scaler has to see each step's gradients, so it refuses a closure.
            calls_closure = needs_closure(type(optimizer)) or not run.precision.skips_overflow
            stepped = StepOptimizer(optimizer, call, calls_closure)
            given = [run.epoch, run.batch_idx - 1, stepped, self._evaluation.closure(run, optimizer)]
            returned = method(given, {"optimizer_idx": run.turn, **_OLDER})
            self._evaluation.forget(run.turn)
            return returned

        return optimizer_step

    def _zero_grad(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(optimizer: Optimizer) -> Any:
            return method([run.epoch, run.batch_idx - 1, optimizer], {"optimizer_idx": run.turn})

        return zero_grad

    def _scheduler_step(self, run: FitRun, method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def scheduler_step(scheduler: Any, metric: float | None) -> Any:
            return method([scheduler, metric], {"optimizer_idx": run.turn})

        return scheduler_step


class Evaluation:
    """The loss of an accumulation group and its gradients, which a closure can compute again.

    When an optimizer steps, both exist. So the first call of its closure gives them, unless the optimizer's weights
    have changed since; each further call runs the training steps of the group again.
    """

    def __init__(self) -> None:
        #: epoch and end of the group that the following belong to
        self._group: tuple[int, int] | None = None
        #: number of the optimizer -> for each training step its arguments, and its share of the group's samples
        self._steps: dict[int, list[tuple[tuple[Any, ...], float]]] = {}
        self._losses: dict[int, torch.Tensor] = {}

    def record_training_step(self, run: FitRun, call: Callable[..., Any]) -> Callable[..., Any]:
        """The training step, which remembers what it was called with."""
        self._training_step = call

        def training_step(*arguments: Any) -> Any:
            group = run.epoch, run.group_end
            if group != self._group:
                self._group, self._steps, self._losses = group, {}, {}
            self._steps.setdefault(run.turn, []).append((arguments, run.share))
            return call(*arguments)

        return training_step

    def record_backward(self, run: FitRun, call: Callable[..., Any]) -> Callable[..., Any]:
        """The backward pass, which remembers the loss."""
        self._backward = call

        def backward(loss: torch.Tensor, **options: Any) -> Any:
            self._add(run.turn, loss)
            return call(loss, **options)

        return backward

    def _add(self, turn: int, loss: torch.Tensor) -> None:
        before = self._losses.get(turn)
        self._losses[turn] = loss.detach() if before is None else before + loss.detach()

    def forget(self, turn: int) -> None:
        """Release the batches of an optimizer that has stepped."""
        self._steps.pop(turn, None)
        self._losses.pop(turn, None)

    def closure(self, run: FitRun, optimizer: Optimizer) -> Callable[[], torch.Tensor | None]:
        """What an optimizer calls for the loss and its gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changes = [change_count(parameter) for parameter in parameters]
        is_first = True

        def evaluate() -> torch.Tensor | None:
            nonlocal is_first
            is_fresh = is_first and changes == [change_count(parameter) for parameter in parameters]
            if not is_fresh or all(p.grad is None for p in parameters):
                with torch.enable_grad(), run.logging_nothing(), uncounted(run.metric_objects()):
                    self._compute_again(run, optimizer)
            is_first = False
            loss = self._losses.get(run.turn)
            if loss is None or run.strategy.world_size == 1 or not needs_closure(type(optimizer)):
                return loss
            return run.strategy.reduce(loss, "mean")  # a line search must go the same way in all processes

        return evaluate

    def _compute_again(self, run: FitRun, optimizer: Optimizer) -> None:
        self._losses.pop(run.turn, None)
        run.zero_grad(optimizer)
        for arguments, share in self._steps[run.turn]:
            with run.forward():
                outputs = self._training_step(*arguments)
            loss = run.loss_of(outputs)
            if loss is None:
                continue
            loss = loss if share == 1 else loss * share
            run.notify("before_backward", loss)
            self._add(run.turn, loss)
            self._backward(loss)
            run.notify("after_backward")
        run.precision.unscale(optimizer)
        run.notify("before_optimizer_step", optimizer, run.turn)
        run.clip_gradients(optimizer)


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
