"""LoRA in files: what a checkpoint says of the factors beside its weights, and how the layers are made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flashtask.core.checks import is_whole
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.seeding import seeded_generators
from flashtask.trainer.finetuning.lora import FACTORS, adapted_layers, add_factors, weight_in
from flashtask.trainer.finetuning.selection import LowRank
from flashtask.trainer.wrapping import own_name

__all__ = ["describe_adapters", "restore_adapters"]


def describe_adapters(module: nn.Module) -> dict[str, Any]:
    """`{"lora": ...}` for a checkpoint, from which `restore_adapters` makes the layers again; empty without any."""
    layers = adapted_layers(module)
    if not layers:
        return {}
    settings = next(iter(layers.values())).lora_settings
    return {
        "lora": {
            "rank": settings.rank,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "targets": list(settings.targets),
            "layers": list(layers),
        }
    }


def restore_adapters(module: nn.Module, content: Mapping[str, Any], path: Any) -> None:
    """Give a module the factors that a checkpoint describes, if it has none; the weights are loaded afterwards.

    Raises:
        IntegrityError: the description is none, or does not fit the module or the file's own tensors.
    """
    described = content.get("lora")
    if described is None or adapted_layers(module):
        return
    settings, names = _read_description(described, path)
    parts = {own_name(name): part for name, part in module.named_modules()}
    state = content["state_dict"]
    for name in names:
        weight = weight_in(parts[name]) if name in parts else None
        shapes = [tuple(state[key].shape) if (key := f"{name}.{one}") in state else () for one in FACTORS]
        if weight is None or shapes != [(settings.rank, weight[0].numel()), (weight.shape[0], settings.rank)]:
            raise _damaged(path, f"layer {name!r} does not fit")
        with seeded_generators(0):  # what is drawn here is replaced, and no stream of the process's is moved
            add_factors(parts[name], settings)


def _read_description(described: Any, path: Any) -> tuple[LowRank, list[str]]:
    if not isinstance(described, Mapping) or set(described) != {"rank", "alpha", "dropout", "targets", "layers"}:
        raise _damaged(path, "it has other keys")
    names = described["layers"]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _damaged(path, "its layers are no list of names")
    if not is_whole(described["rank"]) or len(set(names)) != len(names):
        raise _damaged(path, "its rank or its layers cannot be meant")
    try:
        targets = tuple(described["targets"])
        return LowRank(described["rank"], described["alpha"], described["dropout"], targets), list(names)
    except (UsageError, TypeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _damaged(path: Any, why: str) -> IntegrityError:
    return IntegrityError(f"{path}: its description of LoRA factors cannot be used", why=why)
