"""Freezing and unfreezing a module according to the stages of a finetuning strategy.

Frozen means: no gradient, eval mode, BatchNorm statistics untouched. What never trains is not given to the optimizer;
what trains later has its own parameter group from the start, so unfreezing only turns gradients on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from flashtask.trainer.stages import Finetuning, Stage
from flashtask.trainer.wrapping import own_name, parameters_by_name

__all__ = ["Freezing", "TrainableGroup"]


class TrainableGroup(NamedTuple):
    """Parameters that start to train in the same epoch.

    Args:
        name: `head`, `backbone`, or `backbone_stage<n>` where a strategy unfreezes the backbone in several steps.
        start: the epoch.
        parameters: that the optimizer holds from the beginning.
    """

    name: str
    start: int
    parameters: list[nn.Parameter]


class Freezing:
    """What a strategy means for one module.

    Args:
        module: offers `modules_to_freeze()` (its backbone) and `layer_groups()` (names of the backbone's parameters,
            from the input to the output).
        finetuning: the strategy.
    """

    def __init__(self, module: Any, finetuning: Finetuning) -> None:
        self.module, self.finetuning = module, finetuning
        self.groups: list[list[str]] = [[own_name(name) for name in group] for group in module.layer_groups()]
        self.roots: list[nn.Module] = list(module.modules_to_freeze())
        self._parameters = parameters_by_name(module)
        self._settings_before = {name: p.requires_grad for name, p in self._parameters.items()}
        self._modes_before = [(part, part.training) for root in self.roots for part in root.modules()]

    def trainable(self, stage: Stage) -> set[str]:
        """Names of the backbone's parameters that train in a stage."""
        count = len(self.groups) if stage.layers is None else min(stage.layers, len(self.groups))
        names = {name for group in self.groups[len(self.groups) - count :] for name in group}
        return {name for name in names if self._settings_before[name]}

    def apply(self, epoch: int) -> Stage:
        """Turn gradients on or off and set train and eval modes as the epoch's stage wants them."""
        stage = self.finetuning.stage(epoch)
        trains = self._ids(self.trainable(stage))
        for group in self.groups:
            for name in group:
                parameter = self._parameters[name]
                parameter.requires_grad_(id(parameter) in trains)
                if id(parameter) not in trains:
                    parameter.grad = None
        self.set_modes(stage)
        return stage

    def set_modes(self, stage: Stage) -> None:
        """Train mode for what trains, eval mode for what is frozen; a part without parameters follows its parent."""
        trains = self._ids(self.trainable(stage))
        for root in self.roots:
            _set_mode(root, trains, any(id(p) in trains for p in root.parameters()))

    def parameter_groups(self) -> list[TrainableGroup]:
        """What trains at some time: the head first, then a group of the backbone for each stage that adds to it."""
        in_backbone = self._ids(name for group in self.groups for name in group)
        unique = {id(p): p for p in self._parameters.values()}
        head = [p for key, p in unique.items() if key not in in_backbone and p.requires_grad]
        groups = [TrainableGroup("head", 0, head)]
        everything, seen = self._ids(self.trainable(self.finetuning.widest)), set[int]()
        for number, stage in enumerate(self.finetuning.stages):
            added = self._ids(self.trainable(stage)) - seen
            label = "backbone" if added == everything else f"backbone_stage{number}"
            groups.append(TrainableGroup(label, stage.start, [p for key, p in unique.items() if key in added]))
            seen |= added
        return [group for group in groups if group.parameters]

    def _ids(self, names: Iterable[str]) -> set[int]:
        """The parameters behind names: one that is shared has several, and trains if it does under any of them."""
        return {id(self._parameters[name]) for name in names}

    def restore(self) -> None:
        """Put back which parameters want gradients and the modes of what was frozen, as they were before the run."""
        for name, wanted in self._settings_before.items():
            self._parameters[name].requires_grad_(wanted)
        for part, mode in self._modes_before:
            part.training = mode


def _set_mode(part: nn.Module, trains: set[int], parent_trains: bool) -> None:
    own = [id(parameter) for parameter in part.parameters()]
    part.training = any(key in trains for key in own) if own else parent_trains
    for child in part.children():
        _set_mode(child, trains, part.training)
