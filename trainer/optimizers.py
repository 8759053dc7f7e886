"""Optimizers and schedulers: by name, in every form that `configure_optimizers` may return, and their rates."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from flashtask.core.errors import UnknownNameError, UsageError, did_you_mean
from flashtask.core.number_checks import is_number, is_whole
from flashtask.core.optimizer_names import timm_optimizer, timm_optimizer_names
from flashtask.trainer.metric_order import direction_of

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = [
    "ScheduledRate",
    "check_names",
    "learning_rates",
    "make_optimizer",
    "make_scheduler",
    "name_and_options",
    "needs_closure",
    "optimizer_in_turn",
    "read_frequencies",
    "read_optimizers",
    "redraw",
    "set_rate",
    "target_rates",
    "weight_decay_of",
]


@dataclass
class ScheduledRate:
    """One learning-rate scheduler and when it steps.

    Args:
        scheduler: a torch scheduler, or any object with `step()`, `state_dict()` and `load_state_dict()`.
        interval: `epoch` or `step`.
        frequency: step it every so many epochs or steps.
        monitor: the metric that a plateau scheduler is given.
        strict: a missing `monitor` is an error, else a warning.
        name: how the learning-rate monitor calls it.

    Raises:
        UsageError: an invalid value.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False
    # No field, so no setting: it is for callbacks that set the rates themselves.
    is_paused = False

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
        if not (hasattr(self.scheduler, "state_dict") and hasattr(self.scheduler, "load_state_dict")):
            raise UsageError(
                f"a scheduler of learning rates has state_dict() and load_state_dict(), and {self.scheduler!r} has not",
                why="a run could not be resumed",
                fix="def state_dict(self): return {...}; def load_state_dict(self, state): ...",
            )
        if self.reduce_on_plateau and self.monitor is None:
            raise UsageError(
                "a plateau scheduler needs the metric to watch",
                fix='{"scheduler": scheduler, "monitor": "val_loss"}',
            )

    def step(self, metrics: dict[str, float], call: Callable[[Any, float | None], None]) -> None:
        """Step the scheduler, with the monitored metric if it wants one, unless it is paused.

        Args:
            metrics: the last value of each.
            call: steps a scheduler, with a metric or None.
        """
        if self.is_paused:
            return
        if not self.reduce_on_plateau:
            call(self.scheduler, None)
        elif self.monitor in metrics:
            call(self.scheduler, metrics[self.monitor])
        elif self.strict:
            raise UnknownNameError("metric to monitor", str(self.monitor), metrics)


def read_optimizers(returned: object, run: FitRun | None = None) -> tuple[list[Optimizer], list[ScheduledRate]]:
    """What `configure_optimizers` returned, as two lists.

    Accepts an optimizer, a list or tuple of them, two lists (optimizers, schedulers), a dictionary with `optimizer` and
    `lr_scheduler`, a tuple of such dictionaries, or None (nothing to optimize). In place of an optimizer there may be
    its name or `(name, {options})`, for all parameters of the module that want gradients; in place of a scheduler too,
    and `(name, {options}, {settings})`.

    Args:
        returned: by the module.
        run: of the fit; names need it.

    Raises:
        UsageError: it is none of these, or a part of it is not what it should be.
    """
    pairs = [(_optimizer(optimizer, run), rate) for optimizer, rate in _pairs(returned)]
    optimizers = [optimizer for optimizer, _ in pairs if optimizer is not None]
    rates = [
        _read_scheduler(rate, optimizer or _only(optimizers), run) for optimizer, rate in pairs if rate is not None
    ]
    return optimizers, [rate for rate in rates if rate is not None]


def read_frequencies(returned: object) -> list[int]:
    """The `frequency` of each of several dictionaries that `configure_optimizers` returned; empty if none has one.

    Raises:
        UsageError: some have one and others not, or it is not a whole number of at least 1.
    """
    if not isinstance(returned, (list, tuple)) or not all(isinstance(part, dict) for part in returned):
        return []
    found = [part.get("frequency") for part in returned]
    if all(frequency is None for frequency in found):
        return []
    if not all(is_whole(frequency, 1) for frequency in found):
        raise UsageError(
            f"the frequencies of the optimizers are {', '.join(map(str, found))}",
            why="each optimizer trains for so many batches in turn, so each has to have a whole number of at least 1",
            fix='{"optimizer": optimizer, "frequency": 1}, or none at all',
        )
    return found


def optimizer_in_turn(frequencies: list[int], batch: int) -> int:
    """Which optimizer a batch is for, where each has so many batches in turn.

    Args:
        frequencies: batches of each optimizer.
        batch: its number in the epoch, from 0.
    """
    return bisect_right([*accumulate(frequencies)], batch % sum(frequencies))


def _pairs(returned: Any) -> list[tuple[Any, Any]]:
    """Each optimizer with its scheduler; None if it has none."""
    if returned is None:
        return []
    if isinstance(returned, dict):
        return [_read_dict(returned)]
    if isinstance(returned, Optimizer) or _is_named(returned):
        return [(returned, None)]
    if not isinstance(returned, (list, tuple)):
        raise _not_optimizers(type(returned).__name__)
    if len(returned) == 2 and all(isinstance(part, (list, tuple)) and not _is_named(part) for part in returned):
        return [*((optimizer, None) for optimizer in returned[0]), *((None, rate) for rate in returned[1])]
    if returned and all(isinstance(part, dict) for part in returned):
        return [_read_dict(part) for part in returned]
    return [(part, None) for part in returned]


def _is_named(value: Any) -> bool:
    """Whether it is a name, or a name with options."""
    if isinstance(value, str):
        return True
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        return False
    return isinstance(value[0], str) and all(isinstance(part, Mapping) for part in value[1:])


def _optimizer(given: Any, run: FitRun | None) -> Optimizer | None:
    if given is None or isinstance(given, Optimizer):
        return given
    if run is None or not _is_named(given):
        raise _not_optimizers(f"{type(given).__name__} where an optimizer should be")
    name, options = (given, {}) if isinstance(given, str) else (given[0], dict(given[1]))
    own, hparams = getattr(run.module, "learning_rate", None), run.module.hparams
    rates = (options.pop("lr", None), own, hparams.get("lr"), hparams.get("learning_rate"))
    parameters = [p for p in run.module.parameters() if p.requires_grad]
    return make_optimizer(name, parameters, next((rate for rate in rates if rate is not None), None), **options)


def _only(optimizers: list[Optimizer]) -> Optimizer | None:
    return optimizers[0] if len(optimizers) == 1 else None


#: what a user may set of a scheduler
_SETTINGS = ("scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau")


def _not_optimizers(found: str) -> UsageError:
    return UsageError(
        f"configure_optimizers returned {found}",
        fix='return an optimizer, or {"optimizer": optimizer, "lr_scheduler": scheduler}',
    )


def _read_dict(config: dict[str, Any]) -> tuple[Any, Any]:
    _check_keys("the dictionary of configure_optimizers", config, ("optimizer", "lr_scheduler", "monitor", "frequency"))
    if "optimizer" not in config:
        raise _not_optimizers("a dictionary without `optimizer`")
    scheduler = config.get("lr_scheduler")
    if scheduler is not None and "monitor" in config:
        rate = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
        scheduler = {"monitor": config["monitor"], **rate}
    return config["optimizer"], scheduler


def _read_scheduler(config: Any, optimizer: Optimizer | None, run: FitRun | None) -> ScheduledRate | None:
    if not isinstance(config, dict):
        config = {"scheduler": config}
    _check_keys("a scheduler's settings", config, _SETTINGS)
    if "scheduler" not in config:
        raise UsageError("a scheduler's settings have no `scheduler`", fix='{"scheduler": scheduler, ...}')
    if not _is_named(config["scheduler"]):
        return ScheduledRate(**config)
    return _named_scheduler(config, optimizer, run)


def _named_scheduler(config: dict[str, Any], optimizer: Optimizer | None, run: FitRun | None) -> ScheduledRate | None:
    if optimizer is None or run is None:
        raise UsageError(
            f"the scheduler {config['scheduler']!r} is named, and there is not one optimizer that it could be for",
            fix='{"optimizer": optimizer, "lr_scheduler": "cosine"}, once for each optimizer',
        )
    given = config["scheduler"]
    name, options, settings = (given, {}, {}) if isinstance(given, str) else (*given, {})[:3]
    settings = {**settings, **{key: value for key, value in config.items() if key != "scheduler"}}
    _check_keys("a scheduler's settings", settings, _SETTINGS)
    if "monitor" in settings and name.lower() == "reducelronplateau":
        options = {"monitor": settings.pop("monitor"), **options}
    if name.lower() in _BY_STEP and "interval" in settings:
        options = {**options, "interval": settings["interval"]}
    made = make_scheduler(name, optimizer, run.total_steps, run.steps_before, **options)
    return None if made is None else replace(made, **settings)


def _check_keys(whose: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            choices = f"choose from {', '.join(known)}" if known else "leave it out"
            raise UsageError(f"{whose}: there is no {key!r}", fix=did_you_mean(str(key), known) or choices)


def _classes(module: ModuleType, base: type, left_out: Iterable[str]) -> dict[str, Any]:
    found = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    return {name.lower(): c for name, c in found.items() if name not in left_out and not name.startswith("_")}


_OPTIMIZERS = _classes(torch.optim, Optimizer, ("Optimizer",))
_SCHEDULES = {
    "constant": None,
    "cosine": None,
    **_classes(torch.optim.lr_scheduler, LRScheduler, ("LRScheduler",)),
}


def name_and_options(given: Any, options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """A name and its options, from `"sgd"` or `("sgd", {"momentum": 0.9})`; options that are given apart win."""
    if _is_named(given) and not isinstance(given, str) and len(given) == 2:
        return given[0], {**given[1], **(options or {})}
    return given, dict(options or {})


def check_names(optimizer: str, schedule: str) -> None:
    """Refuse a mistyped optimizer or schedule before anything is trained.

    Raises:
        UnknownNameError: with the nearest names.
        UsageError: an optimizer that evaluates the loss several times a step, such as `lbfgs`.
    """
    for kind, name, known in (("optimizer", optimizer, _OPTIMIZERS), ("learning-rate schedule", schedule, _SCHEDULES)):
        if not isinstance(name, str):
            raise UsageError(f"the {kind} is chosen by its name, not {name!r}", fix=f'"{next(iter(known))}"')
    if schedule.lower() not in _SCHEDULES:
        raise UnknownNameError("learning-rate schedule", schedule, sorted(_SCHEDULES))
    if needs_closure(_optimizer_class(optimizer)):
        raise UsageError(
            f"optimizer {optimizer!r} cannot be chosen by name",
            why="it takes parameters with one learning rate, and evaluates the loss several times a step",
            fix="return torch.optim.LBFGS(self.parameters()) from configure_optimizers",
        )


def _optimizer_class(name: str) -> Any:
    """What makes an optimizer: torch's class of a name in any case, else what timm's factory has under it.

    Raises:
        UnknownNameError: neither has the name.
        UsageError: it needs a library or a device that is not there, or second derivatives.
    """
    if name.lower() in _OPTIMIZERS:
        return _OPTIMIZERS[name.lower()]
    if (made := timm_optimizer(name)) is None:
        is_bare = not name.lower().startswith("timm/")
        further = [one if is_bare and one not in _OPTIMIZERS else f"timm/{one}" for one in timm_optimizer_names()]
        raise UnknownNameError("optimizer", name, [*sorted(_OPTIMIZERS), *sorted(further)])
    return made


def needs_closure(kind: Any) -> bool:
    """Whether the step of an optimizer has to be given a closure, as that of `torch.optim.LBFGS` has."""
    closure = inspect.signature(getattr(kind, "func", kind).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def weight_decay_of(name: str, options: Mapping[str, Any]) -> float:
    """The weight decay of an optimizer with these options: its class's own default, 0 where it knows none."""
    own = inspect.signature(_optimizer_class(name)).parameters.get("weight_decay")
    decay: float = options.get("weight_decay", 0.0 if own is None else own.default)
    return decay


def make_optimizer(
    name: str, parameters: Iterable[torch.Tensor] | Iterable[dict[str, Any]], lr: float | None, /, **options: Any
) -> Optimizer:
    """An optimizer by name; without `lr`, at its own rate.

    The name is that of a class of torch in any case, such as `adamw`, or of timm's factory: `lamb`, or `timm/adamw`
    where torch has one of this name too.

    Raises:
        UnknownNameError: neither has an optimizer of this name.
        UsageError: it does not take these options, values or parameters, or needs a closure.
    """
    check_names(name, "constant")
    if "lr" in options:
        raise UsageError("optimizer_options: the learning rate is an argument of its own", fix="learning_rate=0.001")
    fixed = {} if lr is None else {"lr": lr}
    made: Optimizer = _construct("optimizer", name, _optimizer_class(name), parameters, fixed, options)
    return made


def make_scheduler(
    name: str,
    optimizer: Optimizer,
    total_steps: int | None,
    steps_before: Callable[[int], int | None],
    first_step_of: Callable[[int], int | None] | None = None,
    /,
    **options: Any,
) -> ScheduledRate | None:
    """A schedule by name: `constant`, `cosine`, or a torch class.

    Args:
        name: `constant`; `cosine`, which warms every parameter group up from where it starts to train (its key
            `start`, an epoch) and goes to zero at the end of the run; or a class of `torch.optim.lr_scheduler` in any
            case, which steps once an epoch; `OneCycleLR` and `CyclicLR` step once an optimizer step, and the cycle
            of `OneCycleLR` is the whole run unless its length is given.
        optimizer: whose rates it changes.
        total_steps: optimizer steps of the whole run, None if it has no known end.
        steps_before: epoch -> optimizer steps before it, None if the loader has no length.
        first_step_of: phase -> the step at which it began, None before; for groups whose `start` is None because it
            depends on the run, and that name their `phase` instead.
        options: for `cosine`, `warm_up`: the share of the steps that a group warms up over (0.05), from 0 to below 1;
            for a torch class, its arguments, `interval` (`epoch` or `step`) and `frequency`, and for a plateau the
            metric to `monitor`, whose name implies the `mode` unless that is given.

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
        return _cosine_rate(optimizer, total_steps, steps_before, first_step_of, options)
    monitor, when = None, _when(name.lower(), options)
    options = {key: value for key, value in options.items() if key not in when}
    if name.lower() == "onecyclelr" and not options.keys() & {"total_steps", "epochs", "steps_per_epoch"}:
        if total_steps is None:
            raise UsageError(
                f"lr_scheduler {name!r} needs to know how long the run is",
                why="there is no limit, or the training loader has no length, so max_epochs does not give one",
                fix='lr_scheduler_options={"max_lr": 0.01, "total_steps": 1000}, or max_steps=1000',
            )
        options["total_steps"] = total_steps
    if name.lower() == "reducelronplateau":
        options = {"monitor": "val_loss", **options}
        monitor = options.pop("monitor")
        if "mode" not in options and isinstance(monitor, str):
            options["mode"] = _mode_of_plateau(name, monitor)
    made = _construct("lr_scheduler", name, _SCHEDULES[name.lower()], optimizer, {}, options)
    rate = ScheduledRate(made, monitor=monitor, **when)
    if name.lower() == "onecyclelr" and rate.interval == "step" and made.total_steps < (total_steps or 0):
        raise UsageError(
            f"lr_scheduler {name!r} has a cycle of {made.total_steps} steps, and the run has {total_steps}",
            fix='leave out the length of the cycle, which is then the run\'s; or "interval": "epoch"',
        )
    return rate


#: Schedules that count steps, as their own arguments do; the others step once an epoch.
_BY_STEP = ("cycliclr", "onecyclelr")


def _when(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """When a schedule steps: `interval` and `frequency`, from the options, or as is usual for it."""
    usual = {"interval": "step"} if name in _BY_STEP else {}
    return usual | {key: options[key] for key in ("interval", "frequency") if key in options}


def _mode_of_plateau(name: str, monitor: str) -> str:
    mode = direction_of(monitor)
    if mode is None:
        raise UsageError(
            f"lr_scheduler {name!r}: the name {monitor!r} does not imply whether more or less of it is better",
            fix=f'lr_scheduler_options={{"monitor": {monitor!r}, "mode": "max"}}, or "min"',
        )
    return mode


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
    first_step_of: Callable[[int], int | None] | None,
    options: dict[str, Any],
) -> ScheduledRate:
    _check_keys('lr_scheduler_options of "cosine"', options, ("warm_up",))
    share = options.get("warm_up", 0.05)
    if not is_number(share) or not 0 <= share < 1:
        raise UsageError(
            f"warm_up={share!r}: the share of the steps to warm up over, from 0 to below 1",
            fix='lr_scheduler_options={"warm_up": 0.05}',
        )
    if total_steps is None:
        raise UsageError(
            'lr_scheduler="cosine" needs to know how long the run is',
            why="there is no limit, or the training loader has no length, so max_epochs does not give one",
            fix='max_steps=1000, or max_epochs=10 where the loader has a length; or lr_scheduler="constant"',
        )
    starts = [group.get("start", 0) or 0 for group in optimizer.param_groups]
    begins = [steps_before(start) if start else 0 for start in starts]
    if None in begins:
        raise UsageError(
            f'lr_scheduler="cosine" cannot warm up what starts to train in epoch {max(starts)}',
            why="the training loader has no length, so that step is not known",
            fix='lr_scheduler="constant", or a loader with __len__',
        )
    warm_up = max(1, round(share * total_steps))
    waiting = {n: g["phase"] for n, g in enumerate(optimizer.param_groups) if g.get("start", 0) is None}
    factors: list[Callable[[int], float]] = [
        partial(_cosine, start=begin or 0, warm_up=warm_up, total=total_steps)
        if number not in waiting or first_step_of is None
        else partial(
            _cosine_of_phase, begun=partial(first_step_of, waiting[number]), warm_up=warm_up, total=total_steps
        )
        for number, begin in enumerate(begins)
    ]
    return ScheduledRate(LambdaLR(optimizer, factors), interval="step")


def _cosine_of_phase(step: int, begun: Callable[[], int | None], warm_up: int, total: int) -> float:
    """The same for a group that starts with a phase; before, it is frozen, and its rate that of the first step."""
    start = begun()
    return _cosine(step, step if start is None else start, warm_up, total)


def _cosine(step: int, start: int, warm_up: int, total: int) -> float:
    """Half a cosine over the whole run, times a linear rise over `warm_up` steps from `start` on."""
    rise = min(1.0, (step - start + 1) / warm_up)
    return max(0.0, rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


# ---- the rates of optimizers, by the names of their parameter groups


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Current rates: `learning_rate` for the first parameter group, `learning_rate_<name>` for the others.

    Groups with `shown: False`, the middle ones of many, are left out.
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
    if isinstance(group["lr"], torch.Tensor):
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
