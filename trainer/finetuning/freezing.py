"""What a strategy means for one module: which parameters train, their groups and rates, modes.

Frozen means: no gradient, eval mode, BatchNorm statistics untouched. What never trains is not given to the optimizer;
what trains later has its own parameter group from the start, so unfreezing only turns gradients on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.library_internals import batch_norm_class, normalization_class
from flashtask.trainer.finetuning.lora import adapted_layers, factor_names
from flashtask.trainer.finetuning.phase import GROUPS, Phase, Selection
from flashtask.trainer.finetuning.strategies import Finetuning, Position, Stage
from flashtask.trainer.wrapping import parameters_by_name, unwrapped_name

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["Freezing", "Parts", "TrainableGroup"]

#: Of more groups of the backbone than these, logs show the first and the last.
_MOST_SHOWN = 4
_NORMS = (
    normalization_class(),
    nn.CrossMapLRN2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


class Parts:
    """Names of a module's parameters, sorted by what a phase can train.

    Args:
        module: offers `modules_to_freeze()` (its backbone) and `layer_groups()` (names of the backbone's parameters,
            from the input to the output).

    Attributes:
        groups: the backbone's layers from the input to the output, each a list of names.
        head: names of everything else, factors aside.
        lora: names of the factors.
    """

    def __init__(self, module: Module) -> None:
        self.parameters = parameters_by_name(module)
        self.roots: list[nn.Module] = module.parts_to_freeze()
        self.lora = factor_names(module)
        groups = [[unwrapped_name(name) for name in group] for group in module.layer_groups()]
        self.groups = [[name for name in group if name not in self.lora] for group in groups]
        backbone = {id(self.parameters[name]) for group in self.groups for name in group}
        self.backbone = {name for name, p in self.parameters.items() if id(p) in backbone}
        self.head = [name for name in self.parameters if name not in self.backbone and name not in self.lora]
        self._norms = self._names_in_norms(module)

    def _names_in_norms(self, module: nn.Module) -> set[str]:
        found = set()
        for path, part in module.named_modules(remove_duplicate=False):
            # Libraries have norms of their own, which they call so.
            if isinstance(part, _NORMS) or "norm" in type(part).__name__.lower():
                prefix = f"{path}." if path else ""
                found |= {unwrapped_name(prefix + name) for name, _ in part.named_parameters(recurse=False)}
        return found & self.backbone

    def of_layers(self, count: int | None) -> set[str]:
        """Names in so many layers, counted from the output; None means all."""
        count = len(self.groups) if count is None else min(count, len(self.groups))
        return {name for group in self.groups[len(self.groups) - count :] for name in group}

    def layer_of(self) -> dict[int, int]:
        """The layer of each parameter of the backbone by its id; 1 is that nearest to the output."""
        return {id(self.parameters[n]): number for number, g in enumerate(reversed(self.groups), 1) for n in g}

    def names(self, selection: Selection) -> set[str]:
        """Every parameter that a phase trains.

        Raises:
            UsageError: a pattern that nothing matches, or a kind that the backbone has none of.
        """
        kinds = {
            "biases": {name for name in self.backbone if _is_bias(name)},
            "norms": self._norms,
            "lora": self.lora,
        }
        chosen = self.of_layers(selection.layers) | set(self.head if selection.head else ())
        for kind, names in kinds.items():
            if getattr(selection, kind):
                if not names:
                    raise UsageError(f"the backbone has no {kind} to train", fix='strategy="freeze"')
                chosen |= names
        for pattern in selection.patterns:
            chosen |= self._matching(pattern)
        return chosen

    def _matching(self, pattern: str) -> set[str]:
        names = [name for name in self.parameters if name not in self.lora]
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            close = did_you_mean(pattern, names) or f"names look like {names[0]!r}; a part ends with a star: 'head.*'"
            raise UsageError(f"train: no parameter is called {pattern!r}", fix=close)
        return found

    def ids(self, names: Iterable[str]) -> set[int]:
        """The parameters behind names: one that is shared has several, and trains if it does under any of them."""
        return {id(self.parameters[name]) for name in names}


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


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


def _group_parameters(parts: Parts, finetuning: Finetuning, names: Sequence[set[str]]) -> list[TrainableGroup]:
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
        TrainableGroup("", starts[first], found[place], GROUPS[region], layer, first, phases)
        for place in sorted(found, key=lambda place: (*place[:3], [not trains for trains in place[3]]))
        for region, first, layer, phases in [place]
    ]
    return _shown(_named(groups))


def _named(groups: list[TrainableGroup]) -> list[TrainableGroup]:
    alone = {region: sum(group.region == region for group in groups) == 1 for region in GROUPS}
    several = {region: len({g.phase for g in groups if g.region == region}) > 1 for region in GROUPS}
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


def _rate_in(number: int, group: TrainableGroup, phases: Sequence[Phase], base: Mapping[str, float]) -> float:
    """The base rate of a group in a phase, which a schedule multiplies.

    In a phase in which the group is frozen it is that of the next one in which it trains, or else of the last.

    Args:
        number: of the phase.
        group: whose rate it is.
        phases: of the strategy.
        base: the module's own rates by region.
    """
    trained = [n for n, trains in enumerate(group.trains) if trains]
    phase = phases[next((n for n in trained if n >= number), trained[-1])]
    rate = phase.learning_rates.get(group.region)
    if rate is None:
        rate = base[group.region] * phase.factors.get(group.region, 1)
    return rate * phase.layer_decay ** (group.layer - 1) if phase.layer_decay and group.layer else rate


class Freezing:
    """What a strategy means for one module.

    Args:
        module: offers `modules_to_freeze()` (its backbone) and `layer_groups()` (names of the backbone's parameters,
            from the input to the output).
        finetuning: the strategy.

    Raises:
        UsageError: a phase names something that the module does not have.
    """

    def __init__(self, module: Module, finetuning: Finetuning) -> None:
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

    def freeze_for_good(self) -> None:
        """Turn off gradients of what no phase trains, before the optimizers are made."""
        trains = self.parts.ids(name for names in self._names for name in names)
        for name in self._governed:
            parameter = self.parts.parameters[name]
            if id(parameter) not in trains:
                parameter.requires_grad_(False)

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
        for part, mode in self._modes_in(number):
            part.training = mode
        if self.finetuning.phases[number].train.lora:
            for layer in adapted_layers(self.module).values():
                # For the dropout before its factors; in torch's attention the mode means more.
                layer.training = not isinstance(layer, nn.MultiheadAttention)

    def _modes_in(self, number: int) -> Iterator[tuple[nn.Module, bool]]:
        """Whether each part that the strategy governs is in train mode in a phase."""
        trains = self.parts.ids(self._names[number])
        possible = self.parts.ids(name for name, wanted in self._settings_before.items() if wanted)
        for root in self.roots if self.finetuning.phases[number].train.head else [self.module]:
            active = _active_parts(root, trains, possible, {})
            yield from _modes(root, active, active[id(root)])

    @property
    def trains_batchnorm(self) -> bool:
        """Whether a BatchNorm layer is in train mode in any phase."""
        every = [part for part in self.module.modules() if isinstance(part, batch_norm_class())]
        for number in range(len(self.finetuning.phases)) if every else ():
            modes = {id(part): mode for part, mode in self._modes_in(number)}
            if any(modes.get(id(part), True) for part in every):
                return True
        return False

    def parameter_groups(self) -> list[TrainableGroup]:
        """What trains at some time, the head first: a group for each set of parameters that always train together."""
        return _group_parameters(self.parts, self.finetuning, self._names)

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
        base = {"head": head, "backbone": backbone, "lora": backbone}
        phases, groups = self.finetuning.phases, self.parameter_groups()
        self.rates = {
            group.name: [_rate_in(number, group, phases, base) for number in range(len(phases))] for group in groups
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


def _modes(part: nn.Module, active: dict[int, bool], parent_trains: bool) -> Iterator[tuple[nn.Module, bool]]:
    has_parameters = next(part.parameters(), None) is not None
    mode = active[id(part)] if has_parameters else parent_trains
    yield part, mode
    for child in part.children():
        yield from _modes(child, active, mode)
