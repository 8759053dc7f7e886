"""Finetuning as data: the phases of a strategy, and which of them an epoch belongs to. Pure functions; no torch here.

A strategy is a list of phases; the named ones (`freeze`, `freeze_unfreeze:5`, `lora:8`, ...) are presets of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.selection import LowRank, Selection

__all__ = ["Finetuning", "Gradual", "Position", "Stage"]


@dataclass(frozen=True)
class Stage:
    """What trains from an epoch on: the short way to write phases that differ in layers alone.

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


class Position(NamedTuple):
    """Where in a strategy an epoch is.

    Args:
        number: of the phase, counted from 0.
        start: the phase's first epoch.
    """

    number: int
    start: int


class Finetuning:
    """A finetuning strategy: phases that follow each other.

    Args:
        phases: `[Phase("head", epochs=2), Phase("all")]`, or stages in the order of their epochs, the first at epoch 0:
            `[Stage(0, 0), Stage(3, 2), Stage(6, None)]`.
        name: how recipes and logs call it; a strategy of your own without one is called `custom`.

    Raises:
        UsageError: no phase or stage, one after a phase that has no end, or epochs that do not grow.
    """

    def __init__(self, phases: Sequence[Phase] | Sequence[Stage], name: str = "custom") -> None:
        self.name = name
        self._given_as_stages = not any(isinstance(phase, Phase) for phase in phases)
        self.phases = _from_stages(phases, name) if self._given_as_stages else _checked(phases, name)

    def position(self, epoch: int, ends: Mapping[int, int] | None = None) -> Position:
        """Which phase an epoch belongs to.

        Args:
            epoch: counted from 0.
            ends: number of a phase -> the epoch at which it was over, for those whose end depends on the run.
        """
        start = 0
        for number, phase in enumerate(self.phases[:-1]):
            end = min(phase.fixed_end(start), (ends or {}).get(number, math.inf))
            if epoch < end:
                return Position(number, start)
            start = max(start, int(end))
        return Position(len(self.phases) - 1, start)

    @property
    def starts(self) -> list[int | None]:
        """The first epoch of each phase, None from where on it depends on the run."""
        starts: list[int | None] = [0]
        for phase in self.phases[:-1]:
            before = starts[-1]
            end = math.inf if before is None or phase.waits else phase.fixed_end(before)
            starts.append(None if before is None or math.isinf(end) else max(before, int(end)))
        return starts

    @property
    def length(self) -> int | None:
        """How many epochs the phases have at the most, None if nothing says so."""
        start: float = 0
        for phase in self.phases:
            start = max(start, phase.fixed_end(int(start)))
            if math.isinf(start):
                return None
        return int(start)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The phases as stages; empty if they differ in more than layers, or an end is not known beforehand."""
        starts = self.starts
        plain = all(phase.train == Selection(layers=phase.train.layers) for phase in self.phases)
        if not plain or self.has_rates or None in starts or self.length is not None:
            return ()
        return tuple(Stage(start or 0, phase.train.layers) for start, phase in zip(starts, self.phases, strict=True))

    def stage(self, epoch: int) -> Stage:
        """The stage that an epoch belongs to.

        Raises:
            UsageError: the strategy is not one of stages.
        """
        if not self.stages:
            raise UsageError(f"finetuning strategy {self.name!r} has phases and no stages", fix="position(epoch)")
        return [stage for stage in self.stages if stage.start <= epoch][-1]

    def only(self, number: int) -> Finetuning:
        """A strategy of one of the phases, without an end."""
        phase = replace(self.phases[number], epochs=None, epoch=None, steps=None, plateau=None)
        return Finetuning([phase], self.name)

    @property
    def lora(self) -> LowRank | None:
        """The settings of the factors that a phase trains, None if none does."""
        return next((phase.train.lora for phase in self.phases if phase.train.lora is not None), None)

    @property
    def has_rates(self) -> bool:
        """Whether a phase says something about learning rates."""
        return any(phase.learning_rates or phase.factors or phase.layer_decay for phase in self.phases)

    @property
    def widest(self) -> int:
        """The number of the phase in which a step needs the most memory."""
        return max(range(len(self.phases)), key=lambda number: (self.phases[number].train.width, number))

    def for_layers(self, count: int) -> Finetuning:
        """The strategy for a backbone of so many layers; most are the same for any."""
        return self

    def recipe(self) -> Any:
        """How a recipe writes the strategy: its name, its stages, or its phases."""
        if self.name.partition(":")[0] in _registered():
            return self.name
        if self._given_as_stages:
            return {"stages": [[stage.start, stage.layers] for stage in self.stages]}
        return {"phases": [phase.recipe() for phase in self.phases]}

    def __repr__(self) -> str:
        return f"Finetuning({self.name!r}, {list(self.stages or self.phases)})"


class Gradual(Finetuning):
    """The head first, then more layers every few epochs, until all train (ULMFiT; Howard and Ruder, 2018).

    Args:
        epochs: between two steps.
        layers: how many more train with each.
        name: how recipes and logs call it.
    """

    def __init__(self, epochs: int, layers: int, name: str) -> None:
        super().__init__([Phase("head", epochs=epochs), Phase("all")], name)
        self.epochs, self.layers = epochs, layers

    def for_layers(self, count: int) -> Finetuning:
        """A phase for each step."""
        between = [Phase({"layers": n}, epochs=self.epochs) for n in range(self.layers, count, self.layers)]
        return Finetuning([self.phases[0], *between, self.phases[-1]], self.name)


def _registered() -> Any:
    from flashtask.trainer.finetuning.strategies import FINETUNING

    return FINETUNING


def _from_stages(stages: Sequence[Any], name: str) -> tuple[Phase, ...]:
    starts = [stage.start for stage in stages]
    if not stages or starts[0] != 0:
        raise UsageError(f"finetuning strategy {name!r}: its first stage must start at epoch 0")
    if any(b <= a for a, b in pairwise(starts)):
        raise UsageError(f"finetuning strategy {name!r}: the epochs of its stages must grow, not {starts}")
    ends = [*starts[1:], None]
    return tuple(Phase(Selection(layers=s.layers), epoch=end) for s, end in zip(stages, ends, strict=True))


def _checked(phases: Sequence[Any], name: str) -> tuple[Phase, ...]:
    whose = f"finetuning strategy {name!r}"
    for number, phase in enumerate(phases):
        if not isinstance(phase, Phase):
            raise UsageError(f"{whose}: phase {number} is {phase!r}", fix='Phase("head", epochs=2)')
        if number < len(phases) - 1 and math.isinf(phase.fixed_end(0)) and not phase.waits:
            raise UsageError(
                f"{whose}: phase {number} has no end, so phase {number + 1} would never begin",
                fix="epochs: 2, or until: {plateau: {monitor: val_loss}}",
            )
    latest = [phase.epoch for phase in phases if phase.epoch is not None]
    if any(b <= a for a, b in pairwise(latest)):
        raise UsageError(f"{whose}: the epochs at which its phases end must grow, not {latest}")
    if len({phase.train.lora for phase in phases if phase.train.lora}) > 1:
        raise UsageError(f"{whose}: its phases have different settings of lora", fix="the same lora in each")
    return tuple(phases)
