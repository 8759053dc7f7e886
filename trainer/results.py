"""What `self.log` keeps: values of a step, and means over an epoch weighted by batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from flashtask.core.errors import UsageError
from flashtask.trainer.hooks import LEVELS

__all__ = ["Entry", "Results"]

_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {"sum": lambda a, b: a + b, "max": max, "min": min}


class Entry:
    """One logged name: its last value, and what is needed for its value over the epoch."""

    __slots__ = (
        "logger",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "prog_bar",
        "reduce_fx",
        "total",
        "value",
        "weight",
    )

    def __init__(self, name: str, on_step: bool, on_epoch: bool, prog_bar: bool, logger: bool, reduce_fx: str) -> None:
        self.name, self.on_step, self.on_epoch = name, on_step, on_epoch
        self.prog_bar, self.logger, self.reduce_fx = prog_bar, logger, reduce_fx
        self.metric: Metric | None = None
        self.value: Any = None
        self.total: Any = None
        self.weight = 0

    def update(self, value: Any, weight: int) -> None:
        """Take one value; on an accelerator it stays there, so that no step waits for it."""
        if isinstance(value, Metric):
            self.metric = value
            self.value = getattr(value, "_forward_cache", None)
            return
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if value.numel() != 1:
                raise UsageError(f"log({self.name!r}) takes a number, not a tensor of shape {tuple(value.shape)}")
            value = value.item() if value.device.type == "cpu" else value.float().reshape(())
        self.value = value
        if not self.on_epoch:
            return
        if self.reduce_fx == "mean":
            self.total = value * weight if self.total is None else self.total + value * weight
        else:
            self.total = value if self.total is None else _REDUCTIONS[self.reduce_fx](self.total, value)
        self.weight += weight

    def epoch_value(self) -> float:
        """The value over the epoch: a metric's result, or the reduced values."""
        if self.metric is not None:
            return float(self.metric.compute())
        if self.total is None:
            return math.nan
        return float(self.total) / self.weight if self.reduce_fx == "mean" else float(self.total)

    def state_dict(self) -> dict[str, Any]:
        """What a resume in the middle of an epoch needs."""
        state = {name: getattr(self, name) for name in self.__slots__ if name not in ("metric", "value", "total")}
        state["total"] = float(self.total) if isinstance(self.total, torch.Tensor) else self.total
        return state


class Results:
    """All entries of one pass over some data."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def log(
        self,
        moment: str,
        name: str,
        value: Any,
        *,
        weight: int,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        prog_bar: bool = False,
        logger: bool = True,
        reduce_fx: str = "mean",
        loader: int | None = None,
    ) -> None:
        """Keep one value under the moment it was logged in.

        Args:
            moment: the hook or step that runs now.
            name: of the value.
            value: a number, a scalar tensor or a metric object.
            weight: samples that it stands for.
            on_step: as in `Module.log`; so are `on_epoch`, `prog_bar`, `logger`, `reduce_fx`.
            on_epoch: see there.
            prog_bar: see there.
            logger: see there.
            reduce_fx: see there.
            loader: number of the loader, where there are several: their values get names of their own.

        Raises:
            UsageError: nothing can be logged at this moment, or not on this level, or the value is no number.
        """
        if loader is not None:
            name = f"{name}/dataloader_idx_{loader}"
        entry = self.entries.get((moment, name))
        if entry is None:
            entry = _new_entry(moment, name, on_step, on_epoch, prog_bar, logger, reduce_fx)
            self.entries[(moment, name)] = entry
        entry.update(value, weight)

    def step_values(self) -> dict[str, float]:
        """The last value of what is logged on steps, under the names loggers show."""
        return {_fork(e, "_step"): float(e.value) for e in self.entries.values() if _shows_step(e) and e.logger}

    def epoch_values(self, *, logger_only: bool = False) -> dict[str, float]:
        """The values over the epoch, under the names loggers show."""
        return {
            _fork(e, "_epoch"): e.epoch_value()
            for e in self.entries.values()
            if e.on_epoch and (e.logger or not logger_only)
        }

    def callback_values(self) -> dict[str, float]:
        """Everything callbacks may monitor: epoch values (forked ones under both names) and last step values."""
        values: dict[str, float] = {}
        for entry in self.entries.values():
            if _shows_step(entry):
                values[_fork(entry, "_step")] = values[entry.name] = float(entry.value)
        for entry in self.entries.values():
            if entry.on_epoch:
                values[_fork(entry, "_epoch")] = values[entry.name] = entry.epoch_value()
        return values

    def bar_values(self) -> dict[str, float]:
        """The last values of what was logged with `prog_bar=True`."""
        return {e.name: float(e.value) for e in self.entries.values() if e.prog_bar and e.value is not None}

    def reset_metrics(self) -> None:
        """Let the logged metric objects begin anew: the next pass may be another run's."""
        for entry in self.entries.values():
            if entry.metric is not None:
                entry.metric.reset()

    def reset(self) -> None:
        """Forget everything; logged metric objects begin anew too."""
        self.reset_metrics()
        self.entries.clear()

    def state_dict(self, module: nn.Module) -> list[dict[str, Any]]:
        """Entries with what they have summed up so far; metric objects by their place in the module."""
        places = {id(part): place for place, part in module.named_modules() if isinstance(part, Metric)}
        rows = []
        for (moment, _), entry in self.entries.items():
            row = {"moment": moment, **entry.state_dict()}
            if entry.metric is not None and id(entry.metric) in places:
                states = {name: getattr(entry.metric, name) for name in entry.metric._defaults}
                row["metric"] = {"place": places[id(entry.metric)], "states": states}
                row["metric"]["updates"] = entry.metric._update_count
            rows.append(row)
        return rows

    def load_state_dict(self, state: list[dict[str, Any]], module: nn.Module) -> None:
        """Take back what `state_dict` gave."""
        self.entries.clear()
        for row in state:
            settings = {k: row[k] for k in ("name", "on_step", "on_epoch", "prog_bar", "logger", "reduce_fx")}
            entry = Entry(**settings)
            entry.total, entry.weight = row["total"], row["weight"]
            if "metric" in row:
                metric = module.get_submodule(row["metric"]["place"])
                assert isinstance(metric, Metric)
                for name, value in row["metric"]["states"].items():
                    setattr(metric, name, value)
                metric._update_count = row["metric"]["updates"]
                entry.metric = metric
            self.entries[(row["moment"], row["name"])] = entry


def _shows_step(entry: Entry) -> bool:
    return entry.on_step and entry.value is not None


def _fork(entry: Entry, suffix: str) -> str:
    """A name logged on both levels stands for two: `loss_step` and `loss_epoch`."""
    return entry.name + suffix if entry.on_step and entry.on_epoch else entry.name


def _new_entry(
    moment: str,
    name: str,
    on_step: bool | None,
    on_epoch: bool | None,
    prog_bar: bool,
    logger: bool,
    reduce_fx: str,
) -> Entry:
    if moment not in LEVELS:
        raise UsageError(f"log({name!r}): nothing can be logged in on_{moment}", fix="log it in training_step")
    step, epoch = LEVELS[moment]
    if on_step and not step and epoch and not moment.endswith(("_step", "batch_start", "batch_end")):
        raise UsageError(
            f"log({name!r}, on_step=True): on_{moment} comes once an epoch", fix="log it with on_epoch=True"
        )
    if reduce_fx not in ("mean", *_REDUCTIONS):
        raise UsageError(f"log({name!r}, reduce_fx={reduce_fx!r}): one of mean, sum, max, min")
    return Entry(
        name,
        step if on_step is None else on_step,
        epoch if on_epoch is None else on_epoch,
        prog_bar,
        logger,
        reduce_fx,
    )
