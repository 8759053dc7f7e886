"""Finetuning strategies by name: presets of phases. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.core.checks import is_number, is_whole
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry import Registry
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.phases import Finetuning, Gradual, Stage
from flashtask.trainer.finetuning.reading import read_mapping
from flashtask.trainer.finetuning.selection import LowRank, Selection

__all__ = ["FINETUNING", "resolve_finetuning"]

FINETUNING: Registry[Any] = Registry("finetuning strategy")


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


def resolve_finetuning(strategy: Any) -> Finetuning:
    """The strategy that a name, a tuple, a string of the command line, data or an object means.

    Args:
        strategy: `"freeze"`, `("freeze_unfreeze", 5)`, `"freeze_unfreeze:5"`, `("unfreeze_milestones", ((5, 10), 5))`,
            `"unfreeze_milestones:5,10:5"`, `{"phases": [{"train": "head", "epochs": 2}, {"train": "all"}]}`, a
            list of these or of `Phase`, a `Finetuning`, or any object with `phases` or `stages`.

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
    if isinstance(strategy, (tuple, list)) and strategy and all(isinstance(one, (Phase, Mapping)) for one in strategy):
        return read_mapping({"phases": strategy})
    if isinstance(strategy, Mapping):
        return read_mapping(strategy)
    for attribute in () if isinstance(strategy, type) else ("phases", "stages"):
        if hasattr(strategy, attribute):
            found = getattr(strategy, attribute)
            return Finetuning(tuple(found() if callable(found) else found), getattr(strategy, "name", "custom"))
    error = UsageError(
        f"a finetuning strategy is a name, a tuple or an object with `phases` or `stages`, not {strategy!r}",
        fix='strategy="freeze"',
    )
    _point_out_distribution(error, strategy)
    raise error


def _build(name: str, arguments: list[Any]) -> Finetuning:
    try:
        make = FINETUNING.get(name)
    except UnknownNameError as error:
        _point_out_distribution(error, name)
        raise
    try:
        built: Finetuning = make(*arguments)
    except TypeError as error:
        raise UsageError(f"finetuning strategy {name!r} does not take {arguments}", why=str(error)) from None
    return built


def _point_out_distribution(error: UsageError, strategy: Any) -> None:
    """Where a strategy of distribution was given, let the message say where it belongs."""
    # That module knows this one; it is needed here for the text of an error only.
    from flashtask.trainer.placement.strategies import advice_on_distribution

    if advice := advice_on_distribution(strategy):
        error.why, meant = advice
        given_here = f"Trainer(strategy={meant!r})" if isinstance(strategy, str) else f"Trainer(strategy={meant})"
        error.fix = f"{given_here}; for finetuning choose one of: {', '.join(FINETUNING.names())}"


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
