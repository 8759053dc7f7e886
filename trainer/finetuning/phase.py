"""A phase of finetuning as data: what trains, at which rates, and until when. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.number_checks import is_number, is_whole

__all__ = ["GROUPS", "UNTIL", "LowRank", "Phase", "Plateau", "Selection", "check_keys"]

#: what has a learning rate of its own
GROUPS = ("head", "backbone", "lora")
#: the ways in which a phase can end
UNTIL = ("epochs", "epoch", "steps", "plateau")
#: what names parts of a module; with each of them the head trains too
_WORDS = ("head", "all", "biases", "norms", "lora", "layers")
_CHOICES = 'head, all, biases, norms, {layers: 3}, {lora: 8}, or a list of patterns such as ["backbone.blocks.6.*"]'


@dataclass(frozen=True)
class LowRank:
    """LoRA: factors of a low rank are trained beside frozen weights (Hu et al., 2021).

    Args:
        rank: of the product of the two factors, at least 1.
        alpha: the product is multiplied by alpha / rank; None means `rank`, so by 1.
        dropout: share of the inputs of the factors that are dropped in training, from 0 to below 1.
        targets: patterns (`*`, `?`, `[...]`) of names of layers, or of the ends of their names: `qkv`, `*.mlp.*`.

    Raises:
        UsageError: an invalid value.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        checks = {
            "rank": (is_whole(self.rank), "a whole number of at least 1"),
            "alpha": (self.alpha is None or (is_number(self.alpha) and self.alpha > 0), "a number above 0"),
            "dropout": (is_number(self.dropout) and 0 <= self.dropout < 1, "a number from 0 to below 1"),
            "targets": (targets and all(isinstance(one, str) and one for one in targets), "a list of patterns"),
        }
        for name, (fits, needed) in checks.items():
            if not fits:
                raise UsageError(f"lora.{name}: {needed} is needed, not {getattr(self, name)!r}", fix="lora: {rank: 8}")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @classmethod
    def read(cls, value: object, where: str) -> Self:
        """From a rank, or a mapping of arguments."""
        if isinstance(value, cls):
            return value
        if is_whole(value):
            return cls(value)
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: a rank, or keys of its own, are needed, not {value!r}", fix="lora: {rank: 8}")
        check_keys(value, [field.name for field in fields(cls)], where)
        try:
            return cls(**value)
        except UsageError as error:
            error.what = f"{where}{error.what.removeprefix('lora')}"
            raise

    def recipe(self) -> int | dict[str, Any]:
        """How a recipe writes it: the rank alone if everything else is the default."""
        if self == LowRank(self.rank):
            return self.rank
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        plain = {name: list(value) if name == "targets" else value for name, value in given.items()}
        return {name: plain[name] for name in given if name == "rank" or given[name] != defaults[name]}


@dataclass(frozen=True)
class Selection:
    """What trains in a phase: the union of its parts.

    Args:
        head: everything outside the backbone.
        layers: groups of the backbone's layers, counted from the output; None means all of them.
        biases: every parameter of the backbone that is called bias.
        norms: the parameters of the backbone's normalization layers.
        lora: the factors that are added to the backbone's layers.
        patterns: patterns of names of parameters.
    """

    head: bool = True
    layers: int | None = 0
    biases: bool = False
    norms: bool = False
    lora: LowRank | None = None
    patterns: tuple[str, ...] = ()

    @property
    def is_head_only(self) -> bool:
        """Whether no part of the backbone trains, whatever the module."""
        return self == Selection()

    @property
    def is_few(self) -> bool:
        """Whether of the backbone only kinds of parameters train that are few: biases, norms, factors."""
        return self.layers == 0 and not self.patterns and not self.is_head_only

    @property
    def width(self) -> float:
        """How much of the backbone a step has to keep for its gradients, for comparing phases."""
        if self.layers is None or self.patterns:
            return math.inf if self.layers is None else 2**62
        return 2**61 if self.is_few else self.layers

    @classmethod
    def read(cls, value: object, where: str = "train") -> Self:
        """From `head`, `all`, `biases`, `norms`, `{layers: 3}`, `{lora: 8}`, a pattern, or a list of these.

        A list of nothing but patterns trains exactly what they match; everything else trains the head too.

        Raises:
            UsageError: it is none of these, with near matches.
        """
        if isinstance(value, cls):
            return value
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise UsageError(f"{where}: nothing is named", fix="train: head")
        parts: dict[str, Any] = {"head": False, "patterns": ()}
        for number, item in enumerate(items):
            place = f"{where}[{number}]" if isinstance(value, (list, tuple)) else where
            for key, part in _read_item(item, place).items():
                parts[key] = (*parts["patterns"], *part) if key == "patterns" else part
        return cls(**parts)

    def recipe(self) -> Any:
        """How a recipe writes it."""
        items: list[Any] = [{"layers": self.layers}] if self.layers else []
        items += ["all"] if self.layers is None else []
        items += [word for word in ("biases", "norms") if getattr(self, word)]
        items += [{"lora": self.lora.recipe()}] if self.lora else []
        items = (items or ["head"]) if self.head else []
        return items[0] if len(items) == 1 and not self.patterns else [*items, *self.patterns]

    def __str__(self) -> str:
        if self.is_head_only:
            return "head only"
        parts = ["last layer" if self.layers == 1 else f"last {self.layers} layers"] if self.layers else []
        parts += ["all"] if self.layers is None else []
        parts += [word for word in ("biases", "norms") if getattr(self, word)]
        parts += [f"LoRA of rank {self.lora.rank}"] if self.lora else []
        parts += [", ".join(self.patterns)] if self.patterns else []
        needs_head = self.head and parts != ["all"]
        return " and ".join(["head", *parts] if needs_head else parts)


def _read_item(item: Any, where: str) -> dict[str, Any]:
    """The fields of a selection that one entry means."""
    if item == "head":
        return {"head": True}
    if item == "all":
        return {"head": True, "layers": None}
    if item in ("biases", "norms"):
        return {"head": True, item: True}
    if item == "lora":
        return {"head": True, "lora": LowRank()}
    if isinstance(item, Mapping) and len(item) == 1:
        ((key, value),) = item.items()
        if key == "layers":
            if not is_whole(value, 0):
                raise UsageError(f"{where}.layers: a number of layers is needed, not {value!r}", fix="{layers: 3}")
            return {"head": True, "layers": int(value)}
        if key == "lora":
            return {"head": True, "lora": LowRank.read(value, f"{where}.lora")}
        raise UsageError(f"{where}: there is no {key!r}", fix=did_you_mean(str(key), ("layers", "lora")) or _CHOICES)
    if isinstance(item, str) and ("." in item or any(sign in item for sign in "*?[")):
        return {"patterns": (item,)}
    close = did_you_mean(item, _WORDS) if isinstance(item, str) else ""
    raise UsageError(f"{where}: {item!r} cannot be trained", fix=close or _CHOICES)


@dataclass(frozen=True)
class Plateau:
    """The end of a phase when a metric no longer gets better.

    Args:
        monitor: the metric.
        patience: the phase ends after so many epochs in a row without improvement; only those count in which the
            metric is measured.
        min_delta: by how much a better value must be better, at least 0.
        mode: `min` or `max`; None means the module's own for the module's own metric, and for any other what its name
            implies (`val_f1`: `max`, `val_loss`: `min`).

    Raises:
        UsageError: an invalid value.
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
        UsageError: an invalid value.
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
        """The epoch at which it is over at the latest, if it begins at `start`; infinite if that is not known."""
        by_length = math.inf if self.epochs is None else start + self.epochs
        return min(by_length, math.inf if self.epoch is None else self.epoch)

    @property
    def end(self) -> str:
        """When the phase ends, in words for a table."""
        parts = [f"{self.epochs} epochs" if self.epochs != 1 else "1 epoch"] if self.epochs is not None else []
        parts += [f"epoch {self.epoch}"] if self.epoch is not None else []
        parts += [f"{self.steps} steps"] if self.steps is not None else []
        parts += [str(self.plateau)] if self.plateau is not None else []
        return " or ".join(parts) or "the end of the run"

    def recipe(self) -> dict[str, Any]:
        """How a recipe writes it."""
        until: dict[str, Any] = {name: getattr(self, name) for name in UNTIL if getattr(self, name) is not None}
        if self.plateau is not None:
            given = {one.name: getattr(self.plateau, one.name) for one in fields(Plateau)}
            until["plateau"] = {name: value for name, value in given.items() if value is not None}
        written: dict[str, Any] = {"train": self.train.recipe()}
        written |= until if set(until) == {"epochs"} else {"until": until} if until else {}
        written |= {name: dict(getattr(self, name)) for name in ("learning_rates", "factors") if getattr(self, name)}
        return written if self.layer_decay is None else {**written, "layer_decay": self.layer_decay}


def _read_plateau(value: object) -> Plateau:
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


def _number(value: object) -> Any:
    """The number that a text holds: YAML 1.1 reads `1e-4` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_keys(given: Mapping[Any, Any], known: list[str], where: str) -> None:
    """Every key is among those known.

    Raises:
        UsageError: one is not, with the nearest.
    """
    for key in given:
        if key not in known:
            fix = did_you_mean(str(key), known) or f"the keys are {', '.join(known)}"
            raise UsageError(f"{where}: there is no key {key!r}", fix=fix)
