"""Finetuning strategies as data: phases that follow each other, and presets of them by name. No torch here.

Which phase an epoch belongs to is a pure function of the epoch and of the recorded ends of phases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_number, is_whole
from flashtask.core.registry import Registry
from flashtask.trainer.finetuning.phase import UNTIL, LowRank, Phase, Selection, check_keys

__all__ = ["FINETUNING", "Finetuning", "FinetuningLike", "Gradual", "Position", "Stage", "resolve_finetuning"]

FINETUNING: Registry[Any] = Registry("finetuning strategy")

_KEYS = [*(field.name for field in fields(Phase)), "until"]
_EXAMPLE = "phases: [{train: head, epochs: 2}, {train: all}]"


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
    """A finetuning strategy: phases, one after the other.

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
        """How many epochs the phases have at the most, None if that is not known."""
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
        """The settings of LoRA, None if no phase trains its factors."""
        return next((phase.train.lora for phase in self.phases if phase.train.lora is not None), None)

    @property
    def has_rates(self) -> bool:
        """Whether a phase sets learning rates, which needs parameter groups by phase."""
        return any(phase.learning_rates or phase.factors or phase.layer_decay for phase in self.phases)

    @property
    def widest(self) -> int:
        """The number of the phase in which a step needs the most memory."""
        return max(range(len(self.phases)), key=lambda number: (self.phases[number].train.width, number))

    def for_layers(self, count: int) -> Finetuning:
        """The strategy for a backbone with this number of layers; most strategies do not depend on it."""
        return self

    def recipe(self) -> Any:
        """How a recipe writes the strategy: its name, its stages, or its phases."""
        if self.name.partition(":")[0] in FINETUNING:
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


# ---- by name


@FINETUNING.register("freeze", description="train the head only")
def _freeze() -> Finetuning:
    return Finetuning([Stage(0, 0)], "freeze")


@FINETUNING.register("no_freeze", description="train everything from the start")
def _no_freeze() -> Finetuning:
    return Finetuning([Stage(0, None)], "no_freeze")


@FINETUNING.register("freeze_unfreeze", description="freeze_unfreeze:EPOCH - the head first, everything from EPOCH on")
def _freeze_unfreeze(epoch: Any = None) -> Finetuning:
    if not is_whole(epoch):
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
    if not well_formed or not all(is_whole(m) for m in milestones) or not is_whole(layers):
        raise UsageError(
            f"unfreeze_milestones needs two epochs and a number of layers, not {milestones!r} and {layers!r}",
            fix='strategy=("unfreeze_milestones", ((5, 10), 5)), or unfreeze_milestones:5,10:5 on the command line',
        )
    first, second = milestones
    name = f"unfreeze_milestones:{first},{second}:{layers}"
    return Finetuning([Stage(0, 0), Stage(first, layers), Stage(second, None)], name)


@FINETUNING.register(
    "lp_ft", description="lp_ft:EPOCHS - the head first, then everything at a tenth of the rates (Kumar et al., 2022)"
)
def _lp_ft(epochs: Any = None, factor: Any = 0.1) -> Finetuning:
    if not is_whole(epochs) or not is_number(factor) or factor <= 0:
        raise UsageError(
            f"lp_ft needs the epochs of the head alone, 1 or more, and a factor above 0, not {epochs!r} and {factor!r}",
            fix='strategy=("lp_ft", 5), or lp_ft:5 on the command line',
        )
    smaller = {"head": float(factor), "backbone": float(factor)}
    said = () if factor == 0.1 else (factor,)
    return Finetuning([Phase("head", epochs=epochs), Phase("all", factors=smaller)], _named("lp_ft", epochs, *said))


FINETUNING.register(
    "linear_probe_then_finetune", _lp_ft, description="linear_probe_then_finetune:EPOCHS - another word for lp_ft"
)


@FINETUNING.register(
    "gradual",
    description="gradual:EPOCHS:N - the head first, every EPOCHS epochs N more layers (ULMFiT; Howard and Ruder, 2018)",
)
def _gradual(epochs: Any = 1, layers: Any = 1) -> Finetuning:
    if not is_whole(epochs) or not is_whole(layers):
        raise UsageError(
            f"gradual needs a number of epochs and one of layers, 1 or more, not {epochs!r} and {layers!r}",
            fix='strategy=("gradual", 1), or gradual:1 on the command line',
        )
    return Gradual(epochs, layers, _named("gradual", epochs, *(() if layers == 1 else (layers,))))


@FINETUNING.register(
    "layer_decay", description="layer_decay:0.75 - everything, each layer at that share of the rate of the next"
)
def _layer_decay(decay: Any = 0.75) -> Finetuning:
    if not is_number(decay) or not 0 < decay <= 1:
        raise UsageError(
            f"layer_decay needs a number above 0 and at most 1, not {decay!r}",
            fix='strategy=("layer_decay", 0.75), or layer_decay:0.75 on the command line',
        )
    return Finetuning([Phase("all", layer_decay=decay)], _named("layer_decay", decay))


@FINETUNING.register("bitfit", description="the head and the backbone's biases (Ben Zaken et al., 2022)")
def _bitfit() -> Finetuning:
    return Finetuning([Phase("biases")], "bitfit")


@FINETUNING.register("norm_only", description="the head and the backbone's normalization layers (Frankle et al., 2021)")
def _norm_only() -> Finetuning:
    return Finetuning([Phase("norms")], "norm_only")


@FINETUNING.register(
    "lora", description="lora:RANK:ALPHA - the head, and low-rank factors beside frozen weights (Hu et al., 2021)"
)
def _lora(rank: Any = 8, alpha: Any = None, dropout: Any = 0.0, targets: Any = ("*",)) -> Finetuning:
    try:
        settings = LowRank(rank, alpha, dropout, targets)
    except UsageError as error:
        error.fix = 'strategy=("lora", 8), or lora:8 on the command line'
        raise
    phase = Phase(Selection(lora=settings))
    plain = settings == LowRank(rank, alpha)
    # Dropout and targets are not part of the name, so a recipe writes phases.
    return Finetuning([phase], _named("lora", rank, *(() if alpha is None else (alpha,))) if plain else "custom")


def _named(name: str, *arguments: Any) -> str:
    return ":".join([name, *map(str, arguments)])


# ---- from what a user gives


class _HasPhases(Protocol):
    @property
    def phases(self) -> Any: ...


class _HasStages(Protocol):
    @property
    def stages(self) -> Any: ...


#: What `strategy=` takes; `resolve_finetuning` explains each.
FinetuningLike = str | Sequence[Any] | Mapping[str, Any] | Finetuning | _HasPhases | _HasStages


def resolve_finetuning(strategy: FinetuningLike) -> Finetuning:
    """The strategy that a name, a tuple, a string of the command line, data or an object means.

    Args:
        strategy: `"freeze"`, `("freeze_unfreeze", 5)`, `"freeze_unfreeze:5"`, `("unfreeze_milestones", ((5, 10), 5))`,
            `"unfreeze_milestones:5,10:5"`, `{"phases": [{"train": "head", "epochs": 2}, {"train": "all"}]}`, a
            list of these or of `Phase`, a `Finetuning`, or any object with `phases` or `stages`.

    Raises:
        UnknownNameError: no strategy has this name.
        UsageError: invalid arguments.
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
    if isinstance(strategy, (tuple, list)) and strategy and all(isinstance(one, (Phase, Mapping)) for one in strategy):
        return read_mapping({"phases": strategy})
    if isinstance(strategy, Mapping):
        return read_mapping(strategy)
    for attribute in () if isinstance(strategy, type) else ("phases", "stages"):
        if hasattr(strategy, attribute):
            found = getattr(strategy, attribute)
            return Finetuning(tuple(found() if callable(found) else found), getattr(strategy, "name", "custom"))
    raise UsageError(
        f"a finetuning strategy is a name, a tuple or an object with `phases` or `stages`, not {strategy!r}",
        fix='strategy="freeze"',
    )


def _build(name: str, arguments: list[Any]) -> Finetuning:
    make = FINETUNING.get(name)
    try:
        built: Finetuning = make(*arguments)
    except TypeError as error:
        raise UsageError(f"finetuning strategy {name!r} does not take {arguments}", why=str(error)) from None
    return built


def _parse_argument(text: str) -> Any:
    parts = [_parse_number(part) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _parse_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_mapping(value: Mapping[str, Any]) -> Finetuning:
    """The strategy that a mapping with `phases`, or with `stages`, means.

    Raises:
        UsageError: an invalid key or value, with its path.
    """
    known = ["phases", "stages"]
    check_keys(value, known, "strategy")
    if len(value) != 1:
        raise UsageError("strategy: `phases` is needed", fix=_EXAMPLE)
    ((key, items),) = value.items()
    if isinstance(items, str) or not isinstance(items, Sequence) or not items:
        raise UsageError(f"strategy.{key}: a list is needed, not {items!r}", fix=_EXAMPLE)
    if key == "stages":
        return Finetuning([_read_stage(item, f"strategy.stages[{n}]") for n, item in enumerate(items)])
    return Finetuning([_read_phase(item, f"strategy.phases[{n}]") for n, item in enumerate(items)])


def _read_stage(item: Any, where: str) -> Stage:
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise UsageError(f"{where}: an epoch and a number of layers are needed, not {item!r}", fix="stages: [[0, 0]]")
    return Stage(*item)


def _read_phase(item: Any, where: str) -> Phase:
    if isinstance(item, Phase):
        return item
    if not isinstance(item, Mapping):
        raise UsageError(f"{where}: a phase has keys of its own, and this is {item!r}", fix=_EXAMPLE)
    check_keys(item, _KEYS, where)
    if "train" not in item:
        raise UsageError(f"{where}: `train` is missing", fix="train: head")
    arguments = {key: value for key, value in item.items() if key != "until" and value is not None}
    until = item.get("until")
    inside: dict[str, str] = {}
    if until is not None:
        if not isinstance(until, Mapping):
            raise UsageError(f"{where}.until: keys of its own are needed, not {until!r}", fix="until: {epoch: 5}")
        check_keys(until, [*UNTIL], f"{where}.until")
        if twice := [key for key in until if key in arguments]:
            raise UsageError(f"{where}.until.{twice[0]}: the phase has it already", fix="drop one of them")
        arguments |= until
        inside = dict.fromkeys(until, "until.")
    try:
        return Phase(**arguments)
    except UsageError as error:
        first = error.what.split(":")[0].split(".")[0].split("[")[0]
        error.what = f"{where}.{inside.get(first, '')}{error.what}"
        raise
