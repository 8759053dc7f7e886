"""The learning rates of optimizers, by the names of their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

__all__ = ["learning_rates", "redraw", "set_rate", "target_rates"]


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


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group, in place where it is a tensor that compiled steps read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def redraw(scheduler: Any) -> tuple[float, float] | None:
    """Set the rates of a schedule that was restored to those that its function gives now, such as for a longer run.

    Rates that something else than the schedule has set are left as they are.

    Returns:
        The first rate that changed, before and after; None if none did, or it is no `LambdaLR` or `OneCycleLR`.
    """
    changed = None
    if isinstance(scheduler, OneCycleLR):
        return _redraw_cycle(scheduler)
    if not isinstance(scheduler, LambdaLR):
        return None
    shown = scheduler.get_last_lr()
    for index, group in enumerate(scheduler.optimizer.param_groups):
        before = float(shown[index])
        drawn = float(scheduler.base_lrs[index] * scheduler.lr_lambdas[index](scheduler.last_epoch))
        # A phase of a strategy scales both, which rounds.
        if float(group["lr"]) == before and not math.isclose(before, drawn, rel_tol=1e-6, abs_tol=1e-12):
            set_rate(group, drawn)
            shown[index] = drawn
            changed = changed or (before, drawn)
    return changed


def _redraw_cycle(scheduler: OneCycleLR) -> tuple[float, float] | None:
    before = [float(rate) for rate in scheduler.get_last_lr()]
    if before != [float(group["lr"]) for group in scheduler.optimizer.param_groups]:
        return None
    scheduler.last_epoch -= 1
    scheduler.step()  # to where it was
    after = float(scheduler.get_last_lr()[0])
    return None if math.isclose(before[0], after, rel_tol=1e-6, abs_tol=1e-12) else (before[0], after)
