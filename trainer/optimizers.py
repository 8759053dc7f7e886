"""Optimizers and learning-rate schedulers: by name, and in every form that `configure_optimizers` may return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from flashtask.core.errors import UnknownNameError, UsageError, did_you_mean

__all__ = ["ScheduledRate", "check_names", "make_optimizer", "make_scheduler", "read_optimizers", "require_no_closure"]


@dataclass
class ScheduledRate:
    """One learning-rate scheduler and when it steps.

    Args:
        scheduler: a torch scheduler, or any object with `step()`.
        interval: `epoch` or `step`.
        frequency: step it every so many epochs or steps.
        monitor: the metric that a plateau scheduler is given.
        strict: a missing `monitor` is an error, else a warning.
        name: how the learning-rate monitor calls it.

    Raises:
        UsageError: a value that cannot be meant.
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
        if not isinstance(self.frequency, int) or isinstance(self.frequency, bool) or self.frequency < 1:
            raise UsageError(f"a scheduler's frequency is a whole number of at least 1, not {self.frequency!r}")
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise UsageError(f"a scheduler's monitor is the name of a metric, not {self.monitor!r}")
        if not callable(getattr(self.scheduler, "step", None)):
            raise UsageError(f"a scheduler of learning rates has a method step(), and {self.scheduler!r} has none")
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

    Raises:
        UsageError: it is none of these, or a part of it is not what it should be.
    """
    optimizers, rates = _parts(returned)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise _not_optimizers(f"{type(optimizer).__name__} where an optimizer should be")
    return optimizers, rates


def _parts(returned: Any) -> tuple[list[Optimizer], list[ScheduledRate]]:
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
    raise _not_optimizers(type(returned).__name__)


def _not_optimizers(found: str) -> UsageError:
    return UsageError(
        f"configure_optimizers returned {found}",
        fix='return an optimizer, or {"optimizer": optimizer, "lr_scheduler": scheduler}',
    )


def _read_dict(config: dict[str, Any]) -> tuple[list[Optimizer], list[ScheduledRate]]:
    _check_keys("the dictionary of configure_optimizers", config, ("optimizer", "lr_scheduler", "monitor", "frequency"))
    if "optimizer" not in config:
        raise _not_optimizers("a dictionary without `optimizer`")
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
    _check_keys("a scheduler's settings", config, ScheduledRate.__dataclass_fields__)
    if "scheduler" not in config:
        raise UsageError("a scheduler's settings have no `scheduler`", fix='{"scheduler": scheduler, ...}')
    return ScheduledRate(**config)


def _check_keys(whose: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            choices = f"choose from {', '.join(known)}" if known else "leave it out"
            raise UsageError(f"{whose}: there is no {key!r}", fix=did_you_mean(str(key), known) or choices)


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
        UsageError: an optimizer that evaluates the loss several times a step, such as `lbfgs`.
    """
    for kind, name, known in (("optimizer", optimizer, _OPTIMIZERS), ("learning-rate schedule", schedule, _SCHEDULES)):
        if not isinstance(name, str):
            raise UsageError(f"the {kind} is chosen by its name, not {name!r}", fix=f'"{next(iter(known))}"')
        if name.lower() not in known:
            raise UnknownNameError(kind, name, sorted(known))
    if _needs_closure(_OPTIMIZERS[optimizer.lower()]):
        raise _closure_error(optimizer, 'optimizer="adamw"')


def require_no_closure(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that automatic optimization cannot step, such as `torch.optim.LBFGS`.

    Raises:
        UsageError: one evaluates the loss several times a step.
    """
    for optimizer in optimizers:
        if _needs_closure(type(optimizer)):
            raise _closure_error(type(optimizer).__name__, "another optimizer, such as torch.optim.AdamW")


def _closure_error(name: str, instead: str) -> UsageError:
    return UsageError(
        f"optimizer {name!r} cannot be stepped automatically",
        why="its step evaluates the loss several times, through a closure that training does not give it",
        fix=f"{instead}, or a Module with automatic_optimization = False that calls optimizer.step(closure) itself",
    )


def _needs_closure(kind: type[Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def make_optimizer(name: str, parameters: Any, lr: float, /, **options: Any) -> Optimizer:
    """A torch optimizer by its class name in any case, such as `adamw`.

    Raises:
        UnknownNameError: torch has no optimizer of this name.
        UsageError: it does not take these options, values or parameters, or needs a closure.
    """
    check_names(name, "constant")
    if "lr" in options:
        raise UsageError("optimizer_options: the learning rate is an argument of its own", fix="learning_rate=0.001")
    made: Optimizer = _construct("optimizer", name, _OPTIMIZERS[name.lower()], parameters, {"lr": lr}, options)
    return made


def make_scheduler(
    name: str,
    optimizer: Optimizer,
    total_steps: int | None,
    steps_before: Callable[[int], int | None],
    /,
    **options: Any,
) -> ScheduledRate | None:
    """A schedule by name: `constant`, `cosine`, or a torch class.

    Args:
        name: `constant`; `cosine`, which warms every parameter group up from where it starts to train (its key
            `start`, an epoch) and goes to zero at the end of the run; or a class of `torch.optim.lr_scheduler` in any
            case, which steps once an epoch.
        optimizer: whose rates it changes.
        total_steps: optimizer steps of the whole run, None if it has no known end.
        steps_before: epoch -> optimizer steps before it, None if the loader has no length.
        options: for `cosine`, `warm_up`: the share of the steps that a group warms up over (0.05), from 0 to below 1;
            for a torch class, its arguments, and for a plateau the metric to `monitor`.

    Raises:
        UsageError: `cosine` for a run without an end, or with groups that start later in a run whose epochs have no
            known length; options that the schedule does not take, or one that it needs.
        UnknownNameError: no schedule has this name.
    """
    check_names("sgd", name)
    if name.lower() == "constant":
        _check_keys('lr_scheduler_options of "constant", which has none', options, ())
        return None
    if name.lower() == "cosine":
        return _cosine_rate(optimizer, total_steps, steps_before, options)
    monitor = None
    if name.lower() == "reducelronplateau":
        options = {"monitor": "val_loss", **options}
        monitor = options.pop("monitor")
    return ScheduledRate(
        _construct("lr_scheduler", name, _SCHEDULES[name.lower()], optimizer, {}, options), monitor=monitor
    )


def _construct(kind: str, name: str, make: Any, first: Any, fixed: dict[str, Any], options: dict[str, Any]) -> Any:
    """`make(first, **fixed, **options)`, where whatever does not fit is an error that names the option."""
    _, *rest = inspect.signature(make).parameters.values()
    taken = [p.name for p in rest if p.name not in fixed and p.kind is not p.VAR_KEYWORD]
    _check_keys(f"{kind}_options of {name!r}", options, taken)
    missing = [p.name for p in rest if p.default is p.empty and p.name in taken and p.name not in options]
    if missing:
        example = ", ".join(f'"{option}": ...' for option in missing)
        raise UsageError(f"{kind} {name!r} needs {', '.join(missing)}", fix=f"{kind}_options={{{example}}}")
    try:
        return make(first, **fixed, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{kind} {name!r} cannot be made with {options or fixed}", why=str(error)) from None


def _cosine_rate(
    optimizer: Optimizer,
    total_steps: int | None,
    steps_before: Callable[[int], int | None],
    options: dict[str, Any],
) -> ScheduledRate:
    _check_keys('lr_scheduler_options of "cosine"', options, ("warm_up",))
    share = options.get("warm_up", 0.05)
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
        raise UsageError(
            f"warm_up={share!r}: the share of the steps to warm up over, from 0 to below 1",
            fix='lr_scheduler_options={"warm_up": 0.05}',
        )
    if total_steps is None:
        raise UsageError('lr_scheduler="cosine" needs to know how long the run is', fix="give max_epochs or max_steps")
    starts = [group.get("start", 0) for group in optimizer.param_groups]
    begins = [steps_before(start) if start else 0 for start in starts]
    if None in begins:
        raise UsageError(
            f'lr_scheduler="cosine" cannot warm up what starts to train in epoch {max(starts)}',
            why="the training loader has no length, so nobody knows at which step that is",
            fix='lr_scheduler="constant", or a loader with __len__',
        )
    warm_up = max(1, round(share * total_steps))
    factors: list[Callable[[int], float]] = [
        partial(_cosine, start=begin or 0, warm_up=warm_up, total=total_steps) for begin in begins
    ]
    return ScheduledRate(LambdaLR(optimizer, factors), interval="step")


def _cosine(step: int, start: int, warm_up: int, total: int) -> float:
    """Half a cosine over the whole run, times a linear rise over `warm_up` steps from `start` on."""
    rise = min(1.0, (step - start + 1) / warm_up)
    return max(0.0, rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
