"""Manual optimization: optimizers that a module with `automatic_optimization = False` steps itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from flashtask.trainer.distribution.sharded_tensors import whole

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["ManualOptimizer", "clip", "train_only"]


class ManualOptimizer:
    """An optimizer in the hands of a module: its steps go through the run's precision, and are counted.

    Everything else (`param_groups`, `state`, ...) is the optimizer's own.
    """

    def __init__(self, optimizer: Optimizer, run: FitRun) -> None:
        self.optimizer, self._run = optimizer, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer step; `closure` is for those that evaluate the loss several times, such as LBFGS."""
        run = self._run
        if closure is None:
            run.agree_on_gradients(self.optimizer)
            run.precision.unscale(self.optimizer)
        run.notify("before_optimizer_step", self.optimizer, run.optimizers.index(self.optimizer))
        run.guard.hold_back(self.optimizer)
        result = run.precision.step(self.optimizer, closure and partial(self._evaluated, closure))
        run.note_step()
        return result

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        """What a closure gives, as all processes see it: they have to take the same way."""
        loss = closure()
        self._run.agree_on_gradients(self.optimizer)
        return self._run.mean_over_processes(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of its parameters."""
        self._run.notify("before_zero_grad", self.optimizer)
        self.optimizer.zero_grad(set_to_none)


def clip(optimizer: Optimizer, limit: float | None, algorithm: str = "norm") -> torch.Tensor | None:
    """Clip the gradients of an optimizer's parameters.

    Args:
        optimizer: whose parameters.
        limit: of the norm of all gradients together, or of each value; None or 0 leaves them as they are.
        algorithm: `norm` or `value`.

    Returns:
        The 2-norm of all gradients before they were clipped; None where values are clipped, which needs no norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not limit:
        return _whole_norm(nn.utils.get_total_norm([p.grad for p in parameters]))
    if algorithm == "value":
        nn.utils.clip_grad_value_(parameters, limit)
        return None
    return _whole_norm(nn.utils.clip_grad_norm_(parameters, limit))


def _whole_norm(norm: torch.Tensor) -> torch.Tensor:
    """Over all processes, where each has a share of the gradients."""
    found: torch.Tensor = whole(norm)
    return found


def train_only(optimizer: Optimizer, others: Iterable[Optimizer]) -> dict[nn.Parameter, bool]:
    """Let only one optimizer's parameters want gradients; gives what all of them wanted before."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    before = {p: p.requires_grad for other in others for group in other.param_groups for p in group["params"]}
    for parameter, wanted in before.items():
        parameter.requires_grad_(wanted and parameter in own)
    return before
