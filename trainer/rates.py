"""The learning rates of optimizers, by the names of their parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

__all__ = ["learning_rates", "target_rates"]


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Current rates: `learning_rate` for the first parameter group, `learning_rate_<name>` for the others.

    Groups that say `shown: False`, the middle ones of many, are left out.
    """
    rates: dict[str, float] = {}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            if not group.get("shown", True):
                continue
            name = str(group.get("name", f"{number}_{index}"))
            rates["learning_rate" if not rates else f"learning_rate_{name}"] = float(group["lr"])
    return rates


def target_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The rates that optimizers were made with, by name of the parameter group, before any schedule."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("shown", True)]
    return {
        str(group.get("name", f"group {index}")) + " learning rate": group.get("initial_lr", group["lr"])
        for index, group in enumerate(groups)
    }
