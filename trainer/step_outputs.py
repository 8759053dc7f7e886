"""The loss in what a training step returns."""

from __future__ import annotations

import torch

from flashtask.core.errors import UsageError

__all__ = ["loss_in"]


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
