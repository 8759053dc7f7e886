"""A phase of finetuning as data: what trains, at which rates, and until when. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flashtask.core.checks import is_number, is_whole
from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning.selection import Selection, check_keys

__all__ = ["GROUPS", "UNTIL", "Phase", "Plateau"]

#: what has a learning rate of its own
GROUPS = ("head", "backbone", "lora")

UNTIL = ("epochs", "epoch", "steps", "plateau")


@dataclass(frozen=True)
class Plateau:
    """The end of a phase when a metric no longer gets better.

    Args:
        monitor: the metric.
        patience: the phase ends after so many epochs in a row without improvement; only those count in which the
            metric is measured.
        min_delta: by how much a better value must be better, at least 0.
        mode: `min` or `max`; None means the module's own for the module's own metric, and for any other what its name
            says (`val_f1`: `max`, `val_loss`: `min`).

    Raises:
        UsageError: a value that cannot be meant.
    """

    monitor: str = "val_loss"
    patience: int = 2
    min_delta: float = 0.0
    mode: str | None = None

    def __post_init__(self) -> None:
        checks = {
            "monitor": (isinstance(self.monitor, str) and bool(self.monitor), "the name of a metric"),
            "patience": (is_whole(self.patience), "a whole number of at least 1"),
            "min_delta": (is_number(self.min_delta) and self.min_delta >= 0, "a number of at least 0"),
            "mode": (self.mode in (None, "min", "max"), '"min" or "max"'),
        }
        for name, (fits, needed) in checks.items():
            if not fits:
                raise UsageError(f"plateau.{name}: {needed} is needed, not {getattr(self, name)!r}")

    def __str__(self) -> str:
        return f"{self.monitor} has not improved for {self.patience} epoch{'s' if self.patience > 1 else ''}"


@dataclass(frozen=True)
class Phase:
    """What trains for a while, and at which learning rates.

    A phase without an end lasts as long as the run. With several ends, the first that comes counts.

    Args:
        train: `head`, `all`, `biases`, `norms`, `{"layers": 3}` (from the output), `{"lora": 8}`, or a list of these
            and of patterns of parameters' names; the head trains too, unless there are patterns alone.
        epochs: how long it lasts.
        epoch: the first epoch that no longer belongs to it, counted from 0.
        steps: it ends with the first epoch after which it has had so many optimizer steps.
        plateau: it ends when a metric no longer gets better.
        learning_rates: rates by group (`head`, `backbone`, `lora`) instead of the module's own; a schedule multiplies
            them as it does those.
        factors: what the module's own rates are multiplied by, by group.
        layer_decay: each layer of the backbone has this share of the rate of the layer after it; the last one has the
            backbone's rate. Above 0, at most 1.

    Raises:
        UsageError: a value that cannot be meant.
    """

    train: Any = "all"
    epochs: int | None = None
    epoch: int | None = None
    steps: int | None = None
    plateau: Any = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Selection.read(self.train))
        for name in ("epochs", "epoch", "steps"):
            value = getattr(self, name)
            if value is not None and not is_whole(value):
                raise UsageError(f"{name}: a whole number of at least 1 is needed, not {value!r}", fix=f"{name}: 2")
        if self.plateau is not None and not isinstance(self.plateau, Plateau):
            object.__setattr__(self, "plateau", _read_plateau(self.plateau))
        for name in ("learning_rates", "factors"):
            object.__setattr__(self, name, _rates(getattr(self, name), name))
        if both := [group for group in self.learning_rates if group in self.factors]:
            raise UsageError(f"factors.{both[0]}: there is learning_rates.{both[0]} already", fix="drop one of them")
        if self.layer_decay is not None and not (is_number(self.layer_decay) and 0 < self.layer_decay <= 1):
            raise UsageError(
                f"layer_decay: a number above 0 and at most 1 is needed, not {self.layer_decay!r}",
                fix="layer_decay: 0.75",
            )

    @property
    def waits(self) -> bool:
        """Whether its end depends on the run, so that it is recorded."""
        return self.steps is not None or self.plateau is not None

    def fixed_end(self, start: int) -> float:
        """The epoch at which it is over at the latest, if it begins at `start`; infinite if nothing says so."""
        by_length = math.inf if self.epochs is None else start + self.epochs
        return min(by_length, math.inf if self.epoch is None else self.epoch)

    @property
    def end(self) -> str:
        """When it ends, in words."""
        parts = [f"{self.epochs} epochs" if self.epochs != 1 else "1 epoch"] if self.epochs is not None else []
        parts += [f"epoch {self.epoch}"] if self.epoch is not None else []
        parts += [f"{self.steps} steps"] if self.steps is not None else []
        parts += [str(self.plateau)] if self.plateau is not None else []
        return " or ".join(parts) or "the end of the run"

    def recipe(self) -> dict[str, Any]:
        """How a recipe writes it."""
        until: dict[str, Any] = {name: getattr(self, name) for name in UNTIL if getattr(self, name) is not None}
        if self.plateau is not None:
            said = {one.name: getattr(self.plateau, one.name) for one in fields(Plateau)}
            until["plateau"] = {name: value for name, value in said.items() if value is not None}
        written: dict[str, Any] = {"train": self.train.recipe()}
        written |= until if set(until) == {"epochs"} else {"until": until} if until else {}
        written |= {name: dict(getattr(self, name)) for name in ("learning_rates", "factors") if getattr(self, name)}
        return written if self.layer_decay is None else {**written, "layer_decay": self.layer_decay}


def _read_plateau(value: Any) -> Plateau:
    if isinstance(value, str):
        return Plateau(value)
    if not isinstance(value, Mapping):
        raise UsageError(f"plateau: keys of its own are needed, not {value!r}", fix="plateau: {monitor: val_loss}")
    check_keys(value, [one.name for one in fields(Plateau)], "plateau")
    return Plateau(**value)


def _rates(given: Any, name: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise UsageError(f"{name}: rates by group are needed, not {given!r}", fix=f"{name}: {{head: 0.001}}")
    check_keys(given, list(GROUPS), name)
    rates = {group: _number(value) for group, value in given.items()}
    for group, rate in rates.items():
        if not is_number(rate) or rate <= 0:
            raise UsageError(f"{name}.{group}: a number above 0 is needed, not {given[group]!r}")
    return rates


def _number(value: Any) -> Any:
    """YAML 1.1 takes `1e-4` for a text; who writes it means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
