"""Finetuning as data: which part of a backbone trains from which epoch. Pure functions; no torch here.

A strategy is a list of stages; the named ones (`freeze`, `freeze_unfreeze:5`, ...) are presets of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry import Registry

__all__ = ["FINETUNING", "Finetuning", "Stage", "resolve_finetuning"]

FINETUNING: Registry[Any] = Registry("finetuning strategy")


@dataclass(frozen=True)
class Stage:
    """What trains from an epoch on.

    Args:
        start: first epoch of the stage, counted from 0.
        layers: how many layer groups of the backbone train, counted from its output; None means all of them. The head
            (everything outside the backbone) always trains.
    """

    start: int
    layers: int | None

    @property
    def frozen(self) -> bool:
        """Whether no part of the backbone trains."""
        return self.layers == 0


class Finetuning:
    """A finetuning strategy: stages in the order of their epochs, the first at epoch 0.

    Args:
        stages: for example `[Stage(0, 0), Stage(3, 2), Stage(6, None)]`.
        name: how recipes and logs call it; a strategy of your own without one is called `custom`.

    Raises:
        UsageError: no stage at epoch 0, or epochs that do not grow.
    """

    def __init__(self, stages: Sequence[Stage], name: str = "custom") -> None:
        starts = [stage.start for stage in stages]
        if not stages or starts[0] != 0:
            raise UsageError(f"finetuning strategy {name!r}: its first stage must start at epoch 0")
        if any(b <= a for a, b in pairwise(starts)):
            raise UsageError(f"finetuning strategy {name!r}: the epochs of its stages must grow, not {starts}")
        self.stages, self.name = tuple(stages), name

    def stage(self, epoch: int) -> Stage:
        """The stage that an epoch belongs to."""
        return [stage for stage in self.stages if stage.start <= epoch][-1]

    @property
    def widest(self) -> Stage:
        """The stage in which the most of the backbone trains: what the optimizer has to hold."""
        return max(self.stages, key=lambda stage: float("inf") if stage.layers is None else stage.layers)

    def recipe(self) -> str | dict[str, list[list[int | None]]]:
        """How a recipe writes the strategy: its name if that is registered, else its stages."""
        if self.name.partition(":")[0] in FINETUNING:
            return self.name
        return {"stages": [[stage.start, stage.layers] for stage in self.stages]}

    def __repr__(self) -> str:
        return f"Finetuning({self.name!r}, {list(self.stages)})"


@FINETUNING.register("freeze", description="train the head only")
def _freeze() -> Finetuning:
    return Finetuning([Stage(0, 0)], "freeze")


@FINETUNING.register("no_freeze", description="train everything from the start")
def _no_freeze() -> Finetuning:
    return Finetuning([Stage(0, None)], "no_freeze")


@FINETUNING.register("freeze_unfreeze", description="freeze_unfreeze:EPOCH - the head first, everything from EPOCH on")
def _freeze_unfreeze(epoch: Any = None) -> Finetuning:
    if not _is_epoch(epoch):
        raise UsageError(
            f"freeze_unfreeze needs the epoch of unfreezing, 1 or more, not {epoch!r}",
            fix='strategy=("freeze_unfreeze", 5), or freeze_unfreeze:5 on the command line',
        )
    return Finetuning([Stage(0, 0), Stage(epoch, None)], f"freeze_unfreeze:{epoch}")


@FINETUNING.register(
    "unfreeze_milestones",
    description="unfreeze_milestones:E1,E2:N - the head first, the last N layers from E1, everything from E2",
)
def _unfreeze_milestones(milestones: Any = None, layers: Any = 5) -> Finetuning:
    well_formed = isinstance(milestones, (tuple, list)) and len(milestones) == 2
    if not well_formed or not all(_is_epoch(m) for m in milestones) or not _is_epoch(layers):
        raise UsageError(
            f"unfreeze_milestones needs two epochs and a number of layers, not {milestones!r} and {layers!r}",
            fix='strategy=("unfreeze_milestones", ((5, 10), 5)), or unfreeze_milestones:5,10:5 on the command line',
        )
    first, second = milestones
    name = f"unfreeze_milestones:{first},{second}:{layers}"
    return Finetuning([Stage(0, 0), Stage(first, layers), Stage(second, None)], name)


def _is_epoch(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def resolve_finetuning(strategy: Any) -> Finetuning:
    """The strategy that a name, a tuple, a string of the command line or an object means.

    Args:
        strategy: `"freeze"`, `("freeze_unfreeze", 5)`, `"freeze_unfreeze:5"`, `("unfreeze_milestones", ((5, 10), 5))`,
            `"unfreeze_milestones:5,10:5"`, a `Finetuning`, or any object with `stages`.

    Raises:
        UnknownNameError: no strategy has this name; the distribution strategies are pointed out.
        UsageError: its arguments cannot be meant.
    """
    if isinstance(strategy, Finetuning):
        return strategy
    if isinstance(strategy, str):
        name, *arguments = strategy.split(":")
        return _build(name, [_parse_argument(argument) for argument in arguments])
    if isinstance(strategy, (tuple, list)) and strategy and isinstance(strategy[0], str):
        name, *arguments = strategy
        if name == "unfreeze_milestones" and len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
            arguments = list(arguments[0])
        return _build(name, arguments)
    if isinstance(strategy, dict) and set(strategy) == {"stages"}:
        return Finetuning([Stage(start, layers) for start, layers in strategy["stages"]])
    if hasattr(strategy, "stages"):
        stages = strategy.stages() if callable(strategy.stages) else strategy.stages
        return Finetuning(tuple(stages), getattr(strategy, "name", "custom"))
    raise UsageError(
        f"a finetuning strategy is a name, a tuple or an object with `stages`, not {strategy!r}",
        fix='strategy="freeze"',
    )


#: What other engines call ways to spread a run over processes.
_DISTRIBUTION = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_true",
    "ddp_notebook",
    "ddp_spawn",
    "deepspeed",
    "dp",
    "fsdp",
    "single",
    "single_device",
)


def _build(name: str, arguments: list[Any]) -> Finetuning:
    try:
        make = FINETUNING.get(name)
    except UnknownNameError as error:
        if name in _DISTRIBUTION:
            error.why = "this is a strategy of distribution, which is not there yet; this argument is for finetuning"
            error.fix = f"train on one device (devices=1), and choose one of: {', '.join(FINETUNING.names())}"
        raise
    try:
        built: Finetuning = make(*arguments)
    except TypeError as error:
        raise UsageError(f"finetuning strategy {name!r} does not take {arguments}", why=str(error)) from None
    return built


def _parse_argument(text: str) -> Any:
    parts = [int(part) if part.strip().lstrip("-").isdigit() else part for part in text.split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)
