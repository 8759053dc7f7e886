"""What a loss must be: one number that has a gradient, and finite before it can touch the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from flashtask.core.errors import UsageError
from flashtask.trainer.distribution.sharded_tensors import of_this_process

__all__ = ["NanGuard", "loss_in"]


def loss_in(outputs: object) -> torch.Tensor:
    """The loss in what a training step returned: itself, or its `loss`.

    Raises:
        UsageError: there is none.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, torch.Tensor):
        raise UsageError(
            f"training_step returned {type(outputs).__name__} without a loss",
            fix='return the loss, or {"loss": loss, ...}',
        )
    if loss.numel() != 1:
        raise UsageError(
            f"training_step returned a loss of shape {tuple(loss.shape)}",
            why="only a single number can be made smaller",
            fix="loss.mean()",
        )
    if loss.is_complex():
        raise UsageError("training_step returned a complex loss", fix="loss.abs(), or another real number")
    if not loss.requires_grad:
        raise UsageError(
            "training_step returned a loss that nothing can be learned from",
            why="it was detached, or no parameter that wants gradients took part in it",
            fix="return the loss as it was computed, without .detach() or .item(); is the whole module frozen?",
        )
    return loss


class NanGuard:
    """Looks at losses and norms before they can do harm.

    On a CPU each is read at once. On an accelerator reading one would make the step wait for the device: there a flag
    on the device holds back every update from the first bad loss on, and it is read only when values are logged, at the
    end of an epoch and before a checkpoint.

    Args:
        device: of the run.
        waits: whether values are read at once; None means on a CPU only.
        of_all: the largest of what all processes have, without waiting; a step that one holds back, all do.
    """

    def __init__(
        self,
        device: torch.device,
        waits: bool | None = None,
        of_all: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> None:
        self._of_all = of_all
        self.waits = device.type == "cpu" if waits is None else waits
        self._bad = None if self.waits else torch.zeros((), dtype=torch.float32, device=device)

    def refuses(self, value: torch.Tensor) -> bool:
        """Whether a loss or norm is known to be NaN or infinite; on an accelerator it is only noted there."""
        if self._bad is None:
            return not math.isfinite(value.item())
        self._bad.logical_or_(~torch.isfinite(value.detach()))
        return False

    def hold_back(self, optimizer: Optimizer) -> None:
        """Let the next step of the optimizer change no weight if something bad was noted; nothing waits for it.

        Fused optimizers skip such a step by themselves. Others get gradients of zero: no NaN reaches a weight, though
        momentum may still move it.
        """
        if self._bad is None:
            return
        self._bad = self._of_all(self._bad)
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]
            return
        bad = self._bad.bool()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_this_process(parameter.grad).masked_fill_(bad, 0)

    def has_seen_bad(self) -> bool:
        """Whether something bad was noted on the device; this waits for it."""
        return self._bad is not None and bool(self._bad.item())
