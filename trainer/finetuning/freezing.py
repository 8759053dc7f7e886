"""Freezing and unfreezing a module according to the phases of a finetuning strategy.

Frozen means: no gradient, eval mode, BatchNorm statistics untouched. What never trains is not given to the optimizer;
what trains later has its own parameter group from the start, so unfreezing only turns gradients on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from flashtask.trainer.finetuning.groups import BaseRates, TrainableGroup, group_parameters, rate_in
from flashtask.trainer.finetuning.lora import adapted_layers
from flashtask.trainer.finetuning.parts import Parts
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.phases import Finetuning, Position, Stage
from flashtask.trainer.finetuning.selection import Selection

__all__ = ["Freezing", "TrainableGroup"]


class Freezing:
    """What a strategy means for one module.

    Args:
        module: offers `modules_to_freeze()` (its backbone) and `layer_groups()` (names of the backbone's parameters,
            from the input to the output).
        finetuning: the strategy.

    Raises:
        UsageError: a phase names something that the module does not have.
    """

    def __init__(self, module: Any, finetuning: Finetuning) -> None:
        self.module, self.parts = module, Parts(module)
        self.finetuning = finetuning.for_layers(len(self.parts.groups))
        self.groups, self.roots = self.parts.groups, self.parts.roots
        self._settings_before = {name: p.requires_grad for name, p in self.parts.parameters.items()}
        #: whether the head trains in every phase, so that nothing outside the backbone is touched
        self._spares_head = all(phase.train.head for phase in self.finetuning.phases)
        touched = self.roots if self._spares_head else [module]
        self._modes_before = [(part, part.training) for root in touched for part in root.modules()]
        self._names = [self._selected(phase.train) for phase in self.finetuning.phases]
        #: rates by name of a group, one for each phase; known once a module has asked for `optimizer_groups`
        self.rates: dict[str, list[float]] = {}

    def _selected(self, selection: Selection) -> set[str]:
        return {name for name in self.parts.names(selection) if self._settings_before[name]}

    def trainable(self, stage: Stage | Phase) -> set[str]:
        """Names of the backbone's parameters, factors among them, that train in a stage or phase."""
        selection = Selection(layers=stage.layers) if isinstance(stage, Stage) else stage.train
        return self._selected(selection) & (self.parts.backbone | self.parts.lora)

    def count(self, number: int) -> int:
        """How many numbers train in a phase."""
        unique = {id(self.parts.parameters[name]): self.parts.parameters[name] for name in self._names[number]}
        return sum(parameter.numel() for parameter in unique.values())

    def is_frozen(self, number: int) -> bool:
        """Whether no part of the backbone trains in a phase."""
        selection: Selection = self.finetuning.phases[number].train
        return selection.is_head_only or (
            bool(selection.patterns) and not self.trainable(self.finetuning.phases[number])
        )

    def apply(self, epoch: int, ends: Mapping[int, int] | None = None) -> Position:
        """Turn gradients on or off and set train and eval modes as the epoch's phase wants them.

        Args:
            epoch: counted from 0.
            ends: number of a phase -> the epoch at which it was over, for those whose end depends on the run.
        """
        position = self.finetuning.position(epoch, ends)
        trains = self.parts.ids(self._names[position.number])
        for name in self._governed:
            parameter = self.parts.parameters[name]
            parameter.requires_grad_(id(parameter) in trains)
            if id(parameter) not in trains:
                parameter.grad = None
        self.set_modes(position.number)
        return position

    @property
    def _governed(self) -> set[str]:
        """Names of what the strategy freezes at some time: the backbone and, if a phase leaves it out, the head."""
        own = {name for name in self.parts.head if self._settings_before[name]}
        return self.parts.backbone | self.parts.lora | (set() if self._spares_head else own)

    def set_modes(self, number: int) -> None:
        """Train mode for what trains, eval mode for what is frozen; a part without parameters follows its parent.

        A part with parameters of its own trains when all of them do: a BatchNorm of which the bias alone trains keeps
        its statistics.
        """
        trains = self.parts.ids(self._names[number])
        possible = self.parts.ids(name for name, wanted in self._settings_before.items() if wanted)
        for root in self.roots if self.finetuning.phases[number].train.head else [self.module]:
            active = _active_parts(root, trains, possible, {})
            _set_mode(root, active, active[id(root)])
        if self.finetuning.phases[number].train.lora:
            for layer in adapted_layers(self.module).values():
                # For the dropout before its factors; in torch's attention the mode means more.
                layer.training = not isinstance(layer, nn.MultiheadAttention)

    def parameter_groups(self) -> list[TrainableGroup]:
        """What trains at some time, the head first: a group for each set of parameters that always train together."""
        return group_parameters(self.parts, self.finetuning, self._names)

    def optimizer_groups(
        self, *, head: float, backbone: float, undecayed: Iterable[nn.Parameter] = ()
    ) -> list[dict[str, Any]]:
        """The parameter groups for an optimizer, with the rates that each has in the first phase in which it trains.

        Args:
            head: the learning rate of everything outside the backbone.
            backbone: that of the backbone, LoRA's factors among it.
            undecayed: parameters that weight decay leaves alone. Where a group has such and others, they become a
                second one of the same name and rates, which logs do not show.
        """
        base = BaseRates(head, backbone)
        phases, groups = self.finetuning.phases, self.parameter_groups()
        self.rates = {
            group.name: [rate_in(number, group, phases, base) for number in range(len(phases))] for group in groups
        }
        starts, spared = self.finetuning.starts, {id(parameter) for parameter in undecayed}
        return [
            {
                "params": parameters,
                "name": group.name,
                "lr": self.rates[group.name][0],
                "base_lr": self.rates[group.name][0],
                "start": starts[group.phase],
                **({} if starts[group.phase] is not None else {"phase": group.phase}),
                **({} if group.is_shown and not is_second else {"shown": False}),
                **({"weight_decay": 0.0} if id(parameters[0]) in spared else {}),
            }
            for group in groups
            for is_second, parameters in enumerate(_parted(group.parameters, spared))
        ]

    def restore(self) -> None:
        """Put back which parameters want gradients and the modes of what was frozen, as they were before the run."""
        for name, wanted in self._settings_before.items():
            self.parts.parameters[name].requires_grad_(wanted)
        for part, mode in self._modes_before:
            part.training = mode


def _parted(parameters: list[nn.Parameter], spared: set[int]) -> list[list[nn.Parameter]]:
    """Those that weight decay takes, then those that it spares; an empty list is left out."""
    parts = [[p for p in parameters if (id(p) in spared) == is_spared] for is_spared in (False, True)]
    return [part for part in parts if part]


def _active_parts(part: nn.Module, trains: set[int], possible: set[int], known: dict[int, bool]) -> dict[int, bool]:
    """Whether each part of a module trains: all of its own parameters that can, or one of the parts in it."""
    inner = [_active_parts(child, trains, possible, known)[id(child)] for child in part.children()]
    own = [id(p) for p in part.parameters(recurse=False) if id(p) in possible]
    known[id(part)] = (bool(own) and all(key in trains for key in own)) or any(inner)
    return known


def _set_mode(part: nn.Module, active: dict[int, bool], parent_trains: bool) -> None:
    has_parameters = next(part.parameters(), None) is not None
    part.training = active[id(part)] if has_parameters else parent_trains
    for child in part.children():
        _set_mode(child, active, part.training)
