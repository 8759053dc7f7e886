"""New learning rates in the middle of a run: a phase changes the base rates, and schedules go on multiplying them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from flashtask.core.errors import UsageError

__all__ = ["require_phase_groups", "set_base_rates"]

#: what schedules keep in a parameter group, and as a list with a place for each, that is a learning rate
_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
_IN_SCHEDULES = ("base_lrs", "max_lrs", "_last_lr")


def set_base_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], rates: Mapping[str, float]) -> None:
    """Give parameter groups the base rates of a phase; one that has its rate already is left as it is.

    Args:
        optimizers: whose groups have names, and keep their base rates.
        schedulers: torch's, that change the rates of those groups.
        rates: by name of the group.
    """
    for optimizer in optimizers:
        own = [one for one in schedulers if getattr(one, "optimizer", None) is optimizer]
        for index, group in enumerate(optimizer.param_groups):
            rate, base = rates.get(group.get("name", "")), group.get("base_lr")
            if rate is None or base is None or rate == base:
                continue
            group["base_lr"] = rate
            for key in _IN_GROUPS:
                if key in group:
                    group[key] = _changed(group[key], base, rate)
            for scheduler in own:
                _change_schedule(scheduler, index, base, rate)


def _change_schedule(scheduler: Any, index: int, base: float, rate: float) -> None:
    for key in _IN_SCHEDULES:
        values = getattr(scheduler, key, None)
        if isinstance(values, list) and index < len(values):
            values[index] = _changed(values[index], base, rate)
    for inner in getattr(scheduler, "_schedulers", ()):
        _change_schedule(inner, index, base, rate)


def _changed(value: float, base: float, rate: float) -> float:
    return rate if value == base else value * (rate / base)


def require_phase_groups(optimizers: Iterable[Optimizer], rates: Mapping[str, list[float]], module: Any) -> None:
    """Refuse phases with rates of their own for a module whose optimizer does not have the strategy's groups.

    Raises:
        UsageError: with the line that gives it them.
    """
    held = {group.get("name") for optimizer in optimizers for group in optimizer.param_groups}
    if not rates or not held >= set(rates):
        raise UsageError(
            f"the strategy has learning rates of its own, and {type(module).__name__} makes its optimizer without them",
            why="what configure_optimizers returns is never edited",
            fix="torch.optim.AdamW(self.trainer.fit_run.freezing.optimizer_groups(head=1e-3, backbone=1e-4))",
        )
