"""Optimizers and learning-rate schedulers: by name, and in every form that `configure_optimizers` may return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from flashtask.core.errors import UnknownNameError, UsageError, did_you_mean

__all__ = ["ScheduledRate", "check_names", "make_optimizer", "make_scheduler", "read_optimizers"]


@dataclass
class ScheduledRate:
    """One learning-rate scheduler and when it steps.

    Args:
        scheduler: a torch scheduler.
        interval: `epoch` or `step`.
        frequency: step it every so many epochs or steps.
        monitor: the metric that a plateau scheduler is given.
        strict: a missing `monitor` is an error, else a warning.
        name: how the learning-rate monitor calls it.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False

    def __post_init__(self) -> None:
        self.reduce_on_plateau = self.reduce_on_plateau or isinstance(self.scheduler, ReduceLROnPlateau)
        if self.interval not in ("epoch", "step"):
            raise UsageError(f'a scheduler\'s interval is "epoch" or "step", not {self.interval!r}')
        if self.reduce_on_plateau and self.monitor is None:
            raise UsageError(
                "a plateau scheduler needs the metric to watch",
                fix='{"scheduler": scheduler, "monitor": "val_loss"}',
            )

    def step(self, metrics: dict[str, float]) -> None:
        """Step the scheduler, with the monitored metric if it wants one."""
        if not self.reduce_on_plateau:
            self.scheduler.step()
        elif self.monitor in metrics:
            self.scheduler.step(metrics[self.monitor])
        elif self.strict:
            raise UnknownNameError("metric to monitor", str(self.monitor), metrics)


def read_optimizers(returned: Any) -> tuple[list[Optimizer], list[ScheduledRate]]:
    """What `configure_optimizers` returned, as two lists.

    Accepts an optimizer, a list or tuple of them, two lists (optimizers, schedulers), a dictionary with `optimizer` and
    `lr_scheduler`, a tuple of such dictionaries, or None (nothing to optimize).
    """
    if returned is None:
        return [], []
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, dict):
        return _read_dict(returned)
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
            return list(returned[0]), [_read_scheduler(s) for s in returned[1]]
        if all(isinstance(part, Optimizer) for part in returned):
            return list(returned), []
        if all(isinstance(part, dict) for part in returned):
            pairs = [_read_dict(part) for part in returned]
            return [o for optimizers, _ in pairs for o in optimizers], [s for _, rates in pairs for s in rates]
    raise UsageError(
        f"configure_optimizers returned {type(returned).__name__}",
        fix='return an optimizer, or {"optimizer": optimizer, "lr_scheduler": scheduler}',
    )


def _read_dict(config: dict[str, Any]) -> tuple[list[Optimizer], list[ScheduledRate]]:
    unknown = set(config) - {"optimizer", "lr_scheduler", "monitor", "frequency"}
    if unknown or "optimizer" not in config:
        wrong = ", ".join(sorted(unknown)) or "no `optimizer`"
        raise UsageError(
            f"configure_optimizers returned a dictionary with {wrong}", fix="keys: optimizer, lr_scheduler"
        )
    scheduler = config.get("lr_scheduler")
    if scheduler is None:
        return [config["optimizer"]], []
    rate = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
    if "monitor" in config:
        rate = {"monitor": config["monitor"], **rate}
    return [config["optimizer"]], [_read_scheduler(rate)]


def _read_scheduler(config: Any) -> ScheduledRate:
    if not isinstance(config, dict):
        return ScheduledRate(config)
    known = ScheduledRate.__dataclass_fields__
    for key in config:
        if key not in known:
            raise UsageError(
                f"a scheduler's settings have no {key!r}", fix=did_you_mean(key, known) or ", ".join(known)
            )
    return ScheduledRate(**config)


def _classes(module: Any, base: type, left_out: Iterable[str]) -> dict[str, Any]:
    found = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    return {name.lower(): c for name, c in found.items() if name not in left_out and not name.startswith("_")}


_OPTIMIZERS = _classes(torch.optim, Optimizer, ("Optimizer",))
_SCHEDULES = {
    "constant": None,
    "cosine": None,
    **_classes(torch.optim.lr_scheduler, LRScheduler, ("LRScheduler",)),
}


def check_names(optimizer: str, schedule: str) -> None:
    """Refuse a mistyped optimizer or schedule before anything is trained.

    Raises:
        UnknownNameError: with the nearest names.
    """
    for kind, name, known in (("optimizer", optimizer, _OPTIMIZERS), ("learning-rate schedule", schedule, _SCHEDULES)):
        if name.lower() not in known:
            raise UnknownNameError(kind, name, sorted(known))


def make_optimizer(name: str, parameters: Any, lr: float, **options: Any) -> Optimizer:
    """A torch optimizer by its class name in any case, such as `adamw`.

    Raises:
        UnknownNameError: torch has no optimizer of this name.
        UsageError: it does not take these options.
    """
    check_names(name, "constant")
    try:
        made: Optimizer = _OPTIMIZERS[name.lower()](parameters, lr=lr, **options)
    except TypeError as error:
        raise UsageError(f"optimizer {name!r} does not take these options: {options}", why=str(error)) from None
    return made


def make_scheduler(
    name: str, optimizer: Optimizer, total_steps: int | None, steps_in_epoch: int | None, **options: Any
) -> ScheduledRate | None:
    """A schedule by name: `constant`, `cosine`, or a torch class.

    Args:
        name: `constant`; `cosine`, which warms every parameter group up from where it starts to train (its key
            `start`, an epoch) and goes to zero at the end of the run; or a class of `torch.optim.lr_scheduler` in any
            case, which steps once an epoch.
        optimizer: whose rates it changes.
        total_steps: optimizer steps of the whole run, None if it has no known end.
        steps_in_epoch: optimizer steps of an epoch.
        options: for `cosine`, `warm_up`: the share of the steps that a group warms up over (0.05); for a torch class,
            its arguments.

    Raises:
        UsageError: `cosine` for a run without an end.
        UnknownNameError: no schedule has this name.
    """
    check_names("sgd", name)
    if name == "constant":
        return None
    if name == "cosine":
        if total_steps is None:
            raise UsageError(
                'lr_scheduler="cosine" needs to know how long the run is', fix="give max_epochs or max_steps"
            )
        warm_up = max(1, round(options.get("warm_up", 0.05) * total_steps))
        starts = [group.get("start", 0) * (steps_in_epoch or 0) for group in optimizer.param_groups]
        factors: list[Callable[[int], float]] = [
            partial(_cosine, start=start, warm_up=warm_up, total=total_steps) for start in starts
        ]
        return ScheduledRate(LambdaLR(optimizer, factors), interval="step")
    monitor = options.pop("monitor", "val_loss" if name.lower() == "reducelronplateau" else None)
    return ScheduledRate(_SCHEDULES[name.lower()](optimizer, **options), monitor=monitor)


def _cosine(step: int, start: int, warm_up: int, total: int) -> float:
    """Half a cosine over the whole run, times a linear rise over `warm_up` steps from `start` on."""
    rise = min(1.0, (step - start + 1) / warm_up)
    return max(0.0, rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
