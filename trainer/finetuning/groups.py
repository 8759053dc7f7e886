"""The parameter groups of a strategy, and the learning rate of each in each phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from flashtask.trainer.finetuning.parts import Parts
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.phases import Finetuning

__all__ = ["BaseRates", "TrainableGroup", "group_parameters", "rate_in"]

#: Of more groups of the backbone than these, logs show the first and the last.
_MOST_SHOWN = 4


class TrainableGroup(NamedTuple):
    """Parameters that train in the same phases at the same rates.

    Args:
        name: `head`, `lora`, `backbone`, or where there are several groups of the backbone `backbone_stage<n>` (from
            phase n on), `backbone_layer<n>` (counted from the output), or both.
        start: the epoch in which they begin to train; None if that depends on the run.
        parameters: that the optimizer holds from the beginning.
        region: `head`, `backbone` or `lora`.
        layer: of the backbone, counted from the output, where layers have rates of their own; else 0.
        phase: the first phase in which they train.
        trains: in which phases they do.
        is_shown: whether logs have a column for its rate.
    """

    name: str
    start: int | None
    parameters: list[nn.Parameter]
    region: str = "head"
    layer: int = 0
    phase: int = 0
    trains: tuple[bool, ...] = (True,)
    is_shown: bool = True


class BaseRates(NamedTuple):
    """The module's own learning rates.

    Args:
        head: of everything outside the backbone.
        backbone: of the backbone, LoRA's factors among it.
    """

    head: float
    backbone: float


_REGIONS = ("head", "backbone", "lora")


def group_parameters(parts: Parts, finetuning: Finetuning, names: Sequence[set[str]]) -> list[TrainableGroup]:
    """A group for each set of parameters that train in the same phases and have the same rates.

    Args:
        parts: of the module.
        finetuning: the strategy.
        names: of what trains in each of its phases.
    """
    by_layer = any(phase.layer_decay for phase in finetuning.phases)
    layers = parts.layer_of() if by_layer else {}
    trains = [parts.ids(one) for one in names]
    lora = parts.ids(parts.lora)
    backbone = parts.ids(parts.backbone)
    found: dict[tuple[int, int, int, tuple[bool, ...]], list[nn.Parameter]] = {}
    for key, parameter in {id(p): p for p in parts.parameters.values()}.items():
        phases = tuple(key in one for one in trains)
        if any(phases):
            region = 2 if key in lora else 1 if key in backbone else 0
            place = (region, phases.index(True), layers.get(key, 0), phases)
            found.setdefault(place, []).append(parameter)
    starts = finetuning.starts
    groups = [
        TrainableGroup("", starts[first], found[place], _REGIONS[region], layer, first, phases)
        for place in sorted(found, key=lambda place: (*place[:3], [not trains for trains in place[3]]))
        for region, first, layer, phases in [place]
    ]
    return _shown(_named(groups))


def _named(groups: list[TrainableGroup]) -> list[TrainableGroup]:
    alone = {region: sum(group.region == region for group in groups) == 1 for region in _REGIONS}
    several = {region: len({g.phase for g in groups if g.region == region}) > 1 for region in _REGIONS}
    named, taken = [], Counter[str]()
    for group in groups:
        name = group.region
        if not alone[group.region]:
            name += f"_stage{group.phase}" if several[group.region] or not group.layer else ""
            name += f"_layer{group.layer}" if group.layer else ""
        taken[name] += 1
        named.append(group._replace(name=name if taken[name] == 1 else f"{name}_{taken[name]}"))
    return named


def _shown(groups: list[TrainableGroup]) -> list[TrainableGroup]:
    backbone = [group.name for group in groups if group.region == "backbone"]
    hidden = set(backbone[1:-1]) if len(backbone) > _MOST_SHOWN else set()
    return [group._replace(is_shown=group.name not in hidden) for group in groups]


def rate_in(number: int, group: TrainableGroup, phases: Sequence[Phase], base: BaseRates) -> float:
    """The base rate of a group in a phase, which a schedule multiplies.

    In a phase in which the group is frozen it is that of the next one in which it trains, or else of the last.
    """
    trained = [n for n, trains in enumerate(group.trains) if trains]
    phase = phases[next((n for n in trained if n >= number), trained[-1])]
    region = group.region
    if region in phase.learning_rates:
        rate = phase.learning_rates[region]
    else:
        rate = base.head if region == "head" else base.backbone
        rate = rate * phase.factors[region] if region in phase.factors else rate
    return rate * phase.layer_decay ** (group.layer - 1) if phase.layer_decay and group.layer else rate
