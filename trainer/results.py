"""What `self.log` keeps: values of a step, and means over an epoch weighted by batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsFloat, TypeAlias

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import metric_sums, set_update_count, update_count, value_of_batch
from flashtask.core.metrics import is_metric
from flashtask.trainer.batch_transfer import move_to_device
from flashtask.trainer.hooks import LEVELS

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy

__all__ = ["Entry", "LogSettings", "Logged", "Results", "reduction_name", "results_here"]


def _most(a: Any, b: Any) -> Any:
    """The larger of two numbers, or tensors, without waiting for a device; NaN stays NaN."""
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, torch.as_tensor(b, device=a.device, dtype=a.dtype))
    return b if b > a or b != b else a


_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "max": _most,
    "min": lambda a, b: -_most(-a, -b),
}


#: What `log` takes: a number, a tensor of one element, or a metric object.
Logged: TypeAlias = "SupportsFloat | Metric | Accuracy"
#: A number over all processes: (value, `sum`, `mean`, `max` or `min`).
Reduce = Callable[[Any, str], Any]


def _alone(value: Any, how: str) -> Any:
    """A value of this process, whatever others have."""
    return value


#: columns that every row of the log has: a value that is logged under such a name is for callbacks and the bar
_COLUMNS = ("epoch", "step", "seconds")


def reduction_name(reduce_fx: str | Callable[..., Any]) -> str:
    """The name of a reduction that was given as a function: `torch.mean`, `max`, ...; of another, its own."""
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    return {"amax": "max", "amin": "min"}.get(name, name)


class LogSettings(NamedTuple):
    """How a value is kept and shown; `Module.log` explains each."""

    prog_bar: bool = False
    logger: bool = True
    on_step: bool | None = None
    on_epoch: bool | None = None
    reduce_fx: str = "mean"
    sync_dist: bool = False
    add_dataloader_idx: bool = True


#: what a process that has seen nothing adds to a value over all of them
_NOTHING = {"mean": 0.0, "sum": 0.0, "max": -math.inf, "min": math.inf}


class Entry:
    """One logged name: its last value, and what is needed for its value over the epoch."""

    __slots__ = (
        "last_weight",
        "loaders",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "settings",
        "total",
        "value",
        "weight",
    )

    def __init__(self, name: str, settings: LogSettings, loader: int | None = None) -> None:
        self.name, self.settings = name, settings
        #: the numbers of the loaders that it was logged for; None where it is not of a single one
        self.loaders = {loader}
        self.on_step, self.on_epoch = bool(settings.on_step), bool(settings.on_epoch)
        self.metric: Metric | Accuracy | None = None
        self.value: Any = None
        self.total: Any = None
        self.weight = self.last_weight = 0

    def update(self, value: Logged, weight: int) -> None:
        """Take one value; on an accelerator it stays there, so that no step waits for it."""
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise UsageError(f"log({self.name!r}) takes a number, not a tensor of shape {tuple(value.shape)}")
            value = value.item() if value.is_cpu else value.detach().float().reshape(())
        elif is_metric(value):
            self.metric = value
            self.value = value_of_batch(value)
            return
        elif not isinstance(value, (int, float)):
            value = self._number(value)
        self.value, self.last_weight = value, weight
        if not self.on_epoch or not weight:
            return
        reduce_fx = self.settings.reduce_fx
        if reduce_fx == "mean":
            self.total = value * weight if self.total is None else self.total + value * weight
        else:
            self.total = value if self.total is None else _REDUCTIONS[reduce_fx](self.total, value)
        self.weight += weight

    def _number(self, value: Logged) -> float:
        """A number of another library, such as NumPy's."""
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UsageError(
                f"log({self.name!r}) takes a number, a tensor, a metric or a dictionary of them, "
                f"not {type(value).__name__}"
            ) from None

    def step_value(self, reduce: Reduce = _alone) -> float:
        """The last value, over all processes if that was asked for: a mean counts each by its samples."""
        if not self.is_shared:
            return self._scalar(self.value)
        reduce_fx = self.settings.reduce_fx
        value = self._scalar(self.value) if self.last_weight else _NOTHING[reduce_fx]
        if reduce_fx != "mean":
            return float(reduce(value, reduce_fx))
        total, weight = reduce(value * self.last_weight, "sum"), reduce(self.last_weight, "sum")
        return float(total / weight) if weight else math.nan

    def epoch_value(self, reduce: Reduce = _alone) -> float:
        """The value over the epoch: a metric's result, or the reduced values (of all processes if so asked for)."""
        if self.metric is not None:
            return self._scalar(self.metric.compute())
        reduce_fx = self.settings.reduce_fx
        if self.is_shared:
            total = _NOTHING[reduce_fx] if self.total is None else float(self.total)
            if reduce_fx != "mean":
                return float(reduce(total, reduce_fx))
            total, weight = reduce(total, "sum"), reduce(self.weight, "sum")
            return float(total / weight) if weight else math.nan
        if self.total is None or not self.weight:
            return math.nan
        return float(self.total) / self.weight if reduce_fx == "mean" else float(self.total)

    @property
    def is_shared(self) -> bool:
        """A metric object shares its state over processes by itself."""
        return self.settings.sync_dist and self.metric is None

    def _scalar(self, value: Any) -> float:
        if (isinstance(value, torch.Tensor) and value.numel() != 1) or isinstance(value, dict):
            raise UsageError(
                f"log({self.name!r}): the metric's result is no single number",
                fix="log its parts in on_*_epoch_end: self.log_dict({...: value for ... in metric.compute()})",
            )
        return float(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resume in the middle of an epoch needs."""
        total = float(self.total) if isinstance(self.total, torch.Tensor) else self.total
        return {"name": self.name, "settings": self.settings._asdict(), "total": total, "weight": self.weight}


class Results:
    """All entries of one pass over some data.

    Args:
        reduce: a value over all processes, by `sum`, `mean`, `max` or `min`: what `sync_dist=True` asks for.
    """

    def __init__(self, reduce: Reduce = _alone) -> None:
        self._reduce = reduce
        self.entries: dict[tuple[str, str], Entry] = {}
        #: names under which dictionaries were logged: each is one chart
        self.charts: set[str] = set()

    def chart(self, name: str, loggers: Iterable[Any]) -> None:
        """A dictionary is logged under this name: its values are series of one chart."""
        if name not in self.charts:
            self.charts.add(name)
            for logger in loggers:
                logger.draw_together(name)

    def log(
        self,
        hook: str,
        name: str,
        value: Logged,
        weight: int,
        settings: LogSettings = LogSettings(),  # noqa: B008 - immutable
        loader: int | None = None,
    ) -> None:
        """Keep one value under the hook it was logged in.

        Args:
            hook: the hook or step that runs now.
            name: of the value.
            value: a number, a scalar tensor or a metric object.
            weight: samples that it was computed from.
            settings: how it is kept; the first time that a name is logged decides.
            loader: number of the loader, where there are several: their values get names of their own, unless the
                settings say otherwise.

        Raises:
            UsageError: nothing can be logged here, or not on this level, or the value is not a number.
        """
        if loader is not None and settings.add_dataloader_idx:
            name = f"{name}/dataloader_idx_{loader}"
        entry = self.entries.get((hook, name))
        if entry is None:
            entry = self.entries[(hook, name)] = Entry(name, _settled(hook, name, settings), loader)
        elif loader is not None:
            entry.loaders.add(loader)
        entry.update(value, weight)

    def agree(self, gather: Callable[[Any], list[Any]], module: nn.Module) -> None:
        """Let every process have the entries of all, in one order; a process may have been given no batch at all.

        Args:
            gather: what every process has, in the order of their ranks.
            module: that the metric objects are part of.
        """
        places = {id(part): place for place, part in module.named_modules() if is_metric(part)}
        own = [(key, e.name, e.settings, e.loaders, places.get(id(e.metric))) for key, e in self.entries.items()]
        known, self.entries = self.entries, {}
        for key, name, settings, loaders, place in (one for of_process in gather(own) for one in of_process):
            if key in self.entries:
                self.entries[key].loaders |= loaders
                continue
            entry = self.entries[key] = known.get(key) or Entry(name, settings)
            entry.loaders = set(loaders)
            if entry.metric is None and place is not None:
                entry.metric = module.get_submodule(place)  # type: ignore[assignment]
            if entry.metric is not None and not update_count(entry.metric):
                # Another process has given its own something: torchmetrics is not to warn of one that saw nothing.
                set_update_count(entry.metric, 1)

    def step_values(self, *, of_all: bool = True) -> dict[str, float]:
        """The last value of what is logged on steps, under the names loggers show.

        Args:
            of_all: reduce over all processes what asks for it; each of them must call this.
        """
        return {
            _fork(e, "_step"): e.step_value(self._reduce if of_all else _alone)
            for e in self.entries.values()
            if _shows_step(e) and e.settings.logger
        }

    def epoch_names(self) -> list[str]:
        """The names among `callback_values` that loggers are given at the end of an epoch."""
        return [_fork(e, "_epoch") for e in self.entries.values() if e.on_epoch and e.settings.logger]

    def is_of_loader(self, number: int) -> dict[str, bool]:
        """For each value of `epoch_values`: whether it was logged for this loader, or for all of them."""
        logged = [entry for entry in self.entries.values() if entry.on_epoch]
        return {_fork(entry, "_epoch"): not entry.loaders.isdisjoint((number, None)) for entry in logged}

    def callback_values(self) -> dict[str, float]:
        """Everything callbacks may monitor: epoch values (forked ones under both names) and last step values."""
        values: dict[str, float] = {}
        for entry in self.entries.values():
            if _shows_step(entry):
                values[_fork(entry, "_step")] = values[entry.name] = entry.step_value(self._reduce)
        for entry in self.entries.values():
            if entry.on_epoch:
                values[_fork(entry, "_epoch")] = values[entry.name] = entry.epoch_value(self._reduce)
        return values

    def values_in_step(self) -> dict[str, float]:
        """What was logged in the last step, in this process, under the names that `callback_values` has."""
        values: dict[str, float] = {}
        for entry in self.entries.values():
            if entry.on_step and entry.value is not None:
                values[_fork(entry, "_step")] = values[entry.name] = entry.step_value()
        return values

    def bar_values(self) -> dict[str, float]:
        """The last values of what was logged with `prog_bar=True`."""
        return {e.name: e.step_value() for e in self.entries.values() if e.settings.prog_bar and e.value is not None}

    def reset_metrics(self) -> None:
        """Reset the logged metric objects: the next pass may be another run's."""
        for entry in self.entries.values():
            if entry.metric is not None:
                entry.metric.reset()

    def reset(self) -> None:
        """Forget everything, and reset the logged metric objects."""
        self.reset_metrics()
        self.entries.clear()

    def state_dict(self, module: nn.Module) -> list[dict[str, Any]]:
        """Entries with what they have summed up so far; metric objects by their place in the module."""
        places = {id(part): place for place, part in module.named_modules() if is_metric(part)}
        rows = []
        for (hook, _), entry in self.entries.items():
            row = {"moment": hook, **entry.state_dict()}
            if entry.metric is not None and id(entry.metric) in places:
                row["metric"] = {
                    "place": places[id(entry.metric)],
                    "states": metric_sums(entry.metric),
                    "updates": update_count(entry.metric),
                }
            rows.append(row)
        return rows

    def load_state_dict(self, state: list[dict[str, Any]], module: nn.Module) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self.entries.clear()
        for row in state:
            entry = Entry(row["name"], LogSettings(**row["settings"]))
            entry.total, entry.weight = row["total"], row["weight"]
            if "metric" in row:
                metric = module.get_submodule(row["metric"]["place"])
                assert is_metric(metric)
                for name, value in row["metric"]["states"].items():
                    setattr(metric, name, move_to_device(value, metric.device))
                set_update_count(metric, row["metric"]["updates"])
                entry.metric = metric
            self.entries[(row["moment"], row["name"])] = entry


def results_here(states: Sequence[list[dict[str, Any]]], rank: int, world_size: int) -> list[dict[str, Any]]:
    """What one process goes on with of what all had summed up in an epoch that was cut short.

    Args:
        states: as `Results.state_dict` gave them, by process.
        rank: of the process that goes on.
        world_size: where it is another number, the first process goes on with the sums of all.
    """
    if world_size == len(states):
        return states[rank]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for state in (states if rank == 0 else ()) for row in state):
        held = found.setdefault((row["moment"], row["name"]), {**row, "total": None, "weight": 0})
        how = "sum" if row["settings"]["reduce_fx"] == "mean" else row["settings"]["reduce_fx"]
        totals = [one["total"] for one in (held, row) if one["total"] is not None]
        held["total"] = _REDUCTIONS[how](*totals) if len(totals) == 2 else next(iter(totals), None)
        held["weight"] += row["weight"]
    return [*found.values()]


def _shows_step(entry: Entry) -> bool:
    # Where a value is shared, a process that has none takes part.
    return entry.on_step and (entry.value is not None or entry.is_shared)


def _fork(entry: Entry, suffix: str) -> str:
    """A name that is logged on both levels becomes two: `loss_step` and `loss_epoch`."""
    if not (entry.on_step and entry.on_epoch):
        return entry.name
    name, of_loader, number = entry.name.partition("/dataloader_idx_")
    return f"{name}{suffix}{of_loader}{number}"


def _settled(hook: str, name: str, settings: LogSettings) -> LogSettings:
    """The settings with the levels that the hook has by default."""
    if hook not in LEVELS:
        loops = "go through trainer.loops.step(run, group) in a loop of your own"
        raise UsageError(
            f"log({name!r}): nothing can be logged in {hook if hook.endswith('_step') else f'on_{hook}'}",
            fix=loops if hook == "setup" else "log it in training_step",
        )
    step, epoch = LEVELS[hook]
    if settings.on_step and not step and epoch and not hook.endswith(("_step", "batch_start", "batch_end")):
        raise UsageError(f"log({name!r}, on_step=True): on_{hook} comes once an epoch", fix="log it with on_epoch=True")
    if settings.reduce_fx not in ("mean", *_REDUCTIONS):
        raise UsageError(
            f"log({name!r}, reduce_fx={settings.reduce_fx!r}): one of mean, sum, max, min",
            fix="collect the values in a list, and log what you make of them in on_*_epoch_end",
        )
    return settings._replace(
        logger=settings.logger and name not in _COLUMNS,
        on_step=step if settings.on_step is None else settings.on_step,
        on_epoch=epoch if settings.on_epoch is None else settings.on_epoch,
    )
