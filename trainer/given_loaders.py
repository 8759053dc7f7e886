"""What a user may give where a loader is needed, and the errors for anything else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flashtask.core.errors import UsageError, nearest
from flashtask.trainer.combined_loader import CombinedLoader, holds_loaders, is_batch_list
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.distribution.process_strategies import STRATEGIES
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.strategies import FINETUNING, Finetuning

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["check_loader"]

_PARTS = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}


def check_loader(value: object, stage: str, module: Module) -> None:
    """Refuse what cannot be a loader, or a structure of them; what is iterable and not known otherwise is left alone.

    Args:
        value: that was given, or returned by a `*_dataloader` method.
        stage: `train`, `val`, `test` or `predict`.
        module: that the data is for.

    Raises:
        UsageError: it is a strategy, a path, a dataset, an array, ...; the fix is the call that was probably intended.
    """
    if value is None or isinstance(value, (DataLoader, DataModule)):
        return
    if isinstance(value, CombinedLoader):
        value = value.flattened
    if isinstance(value, Mapping) and holds_loaders(value):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and not _is_strategy(value):
        if not is_batch_list(value):
            for one in value:
                check_loader(one, stage, module)
            return
        if not (isinstance(value, tuple) and _are_inputs_and_targets(value)):
            return
    what, fix = _described(value, stage, module)
    if what:
        raise UsageError(f"the {_PARTS[stage]} data must be a DataLoader or a DataModule, not {what}", fix=fix)


def _described(value: Any, stage: str, module: Module) -> tuple[str, str]:
    """What a value is in words, and the fix; empty words where it may be a loader."""
    if _is_strategy(value):
        return _described_strategy(value)
    options = "batch_size=32" + (", shuffle=True" if stage == "train" else "")
    if isinstance(value, IterableDataset):
        if not hasattr(module, "data_class"):
            return "", ""  # it may give the batches that the module's steps take
        fix = "DataLoader(dataset, batch_size=32); batch_size=None if it gives batches already"
        return f"a dataset ({type(value).__name__})", fix
    if isinstance(value, Dataset):
        return f"a dataset ({type(value).__name__})", f"DataLoader(dataset, {options})"
    if isinstance(value, (str, bytes, os.PathLike)):
        return f"{value!r}", _fix_of_path(value, stage, module)
    if isinstance(value, tuple) or hasattr(value, "__array__") or isinstance(value, torch.Tensor):
        shape = getattr(value, "shape", None)
        what = "a pair of tensors" if shape is None else f"{_a(value)} of shape {tuple(shape)}"
        return what, f"DataLoader(TensorDataset(images, targets), {options})"
    if isinstance(value, Mapping):
        return f"a dictionary ({', '.join(map(repr, list(value)[:5]))})", "a dictionary of loaders"
    if isinstance(value, type):
        return f"the class {value.__name__}", f"{value.__name__}(...)"
    if not hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        if callable(value):
            return f"the function {getattr(value, '__name__', value)!s}", "call it, and give the loader that it returns"
        return f"{value!r}", f"DataLoader(dataset, {options})"
    return "", ""


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _fix_of_path(value: Any, stage: str, module: Module) -> str:
    path = os.fspath(value)
    data_class = getattr(module, "data_class", None)
    if stage == "predict" and hasattr(module, "predict"):
        return f"model.predict({path!r})"
    if isinstance(data_class, type) and stage == "train":
        return f"datamodule={data_class.__name__}.from_root({path!r})"
    if isinstance(data_class, type):
        return f"datamodule={data_class.__name__}.from_folders({stage}_folder={path!r})"
    return "DataLoader(dataset, batch_size=32) over a dataset that reads it"


# ---- strategies


def _is_strategy(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        first = value[0] if value else None
        return isinstance(first, Phase) or (isinstance(first, str) and _is_strategy(first))
    if isinstance(value, str):
        is_name = not os.path.exists(value) and not {os.sep, "/", "."} & set(value)
        return is_name and bool(_nearest_strategy(value))
    return isinstance(value, (Phase, Finetuning))


def _nearest_strategy(value: str) -> str:
    name, *arguments = value.split(":")
    known = [*FINETUNING.names(), *STRATEGIES.names()]
    close = [name] if name in known else nearest(name, known, most=1)
    return ":".join([*close, *arguments]) if close else ""


def _described_strategy(value: Any) -> tuple[str, str]:
    given = value[0] if isinstance(value, (tuple, list)) else value
    if not isinstance(given, str):
        return "a finetuning strategy", "trainer.finetune(model, data, strategy=...)"
    right = _nearest_strategy(given)
    if right.partition(":")[0] not in FINETUNING:
        return f"{value!r}, a strategy of distribution", f"Trainer(strategy={right!r})"
    shown = repr((right, *value[1:])) if isinstance(value, (tuple, list)) else repr(right)
    call = f"trainer.finetune(model, data, strategy={shown})"
    if given != right:
        return f"{value!r}", f"did you mean the finetuning strategy {right!r}? {call}"
    return f"{value!r}, a finetuning strategy", call


def _are_inputs_and_targets(value: tuple[Any, ...]) -> bool:
    """A tuple of two tensors of as many samples, which are not batches alike."""
    if len(value) != 2 or not all(isinstance(one, torch.Tensor) and one.ndim for one in value):
        return False
    first, second = value
    return len(first) == len(second) and first.ndim != second.ndim
