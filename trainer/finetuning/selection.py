"""What a phase trains, as data: the head, layers of the backbone, kinds of parameters, names. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from flashtask.core.checks import is_number, is_whole
from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["LowRank", "Selection", "check_keys"]

#: words that stand for a part of a module; each of them means the head too
_WORDS = ("head", "all", "biases", "norms", "lora")
_SHAPES = (*_WORDS, "layers")


@dataclass(frozen=True)
class LowRank:
    """LoRA: factors of a low rank are trained beside frozen weights (Hu et al., 2021).

    Args:
        rank: of the product of the two factors, at least 1.
        alpha: the product is multiplied by alpha / rank; None means `rank`, so by 1.
        dropout: share of the inputs of the factors that are dropped in training, from 0 to below 1.
        targets: patterns (`*`, `?`, `[...]`) of names of layers, or of the ends of their names: `qkv`, `*.mlp.*`.

    Raises:
        UsageError: a value that cannot be meant.
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
    def read(cls, value: Any, where: str) -> Self:
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
        """The rank alone where nothing else was said."""
        if self == LowRank(self.rank):
            return self.rank
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        plain = {name: list(value) if name == "targets" else value for name, value in said.items()}
        return {name: plain[name] for name in said if name == "rank" or said[name] != defaults[name]}


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
    def read(cls, value: Any, where: str = "train") -> Self:
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
    close = did_you_mean(item, _SHAPES) if isinstance(item, str) else ""
    raise UsageError(f"{where}: {item!r} cannot be trained", fix=close or _CHOICES)


_CHOICES = 'head, all, biases, norms, {layers: 3}, {lora: 8}, or a list of patterns such as ["backbone.blocks.6.*"]'


def check_keys(given: Mapping[Any, Any], known: list[str], where: str) -> None:
    """Every key is among those known.

    Raises:
        UsageError: one is not, with the nearest.
    """
    for key in given:
        if key not in known:
            fix = did_you_mean(str(key), known) or f"the keys are {', '.join(known)}"
            raise UsageError(f"{where}: there is no key {key!r}", fix=fix)
