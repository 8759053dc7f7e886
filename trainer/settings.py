"""Checks of the trainer's arguments before anything is built, with the nearest right name for a wrong one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.trainer.accelerators import check_accelerator, check_devices
from flashtask.trainer.callbacks import Callback
from flashtask.trainer.loggers import Logger
from flashtask.trainer.precision import resolve_precision

__all__ = ["check_settings"]

#: whole numbers, and the least they may be; None is no number, so it means something only where it is the default
_COUNTS = {
    "max_epochs": 1,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "accumulate_grad_batches": 1,
}
_SWITCHES = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
_FOLDERS = ("default_root_dir", "output_dir")
_MAY_BE_NONE = {"max_epochs", "precision", "memory_format", "seed", "callbacks", "gradient_clip_val"}
_MAY_BE_NONE |= {*_LIMITS, *_FOLDERS}

#: what is no argument here, but is elsewhere, and where it goes
_ELSEWHERE = {
    "ckpt_path": "trainer.fit(model, ..., ckpt_path=...)",
    "gpus": 'accelerator="gpu"',
    "resume_from_checkpoint": "trainer.fit(model, ..., ckpt_path=...)",
    "strategy": 'finetuning: trainer.finetune(model, ..., strategy="freeze"); distribution is not there yet: devices=1',
}


def check_settings(given: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """Look at every argument before anything is built; no device is asked for.

    Args:
        given: the arguments that the trainer knows.
        unknown: those it does not.

    Raises:
        UsageError: an unknown name, or a value of a wrong type or out of range.
    """
    for name in unknown:
        fix = _ELSEWHERE.get(name) or did_you_mean(name, given) or "see help(Trainer)"
        raise UsageError(f"Trainer has no argument {name!r}", fix=fix)
    for name, value in given.items():
        if value is None and name in _MAY_BE_NONE:
            continue
        if name in _ITEMS:
            kind, needed = _ITEMS[name]
            _check_items(name, value, kind, needed)
        elif name in _RULES:
            fits, needed, example = _RULES[name]
            if not fits(value):
                raise UsageError(f"Trainer({name}={value!r}): {needed} is needed", fix=f"{name}={example}")
    check_accelerator(given.get("accelerator", "auto"))
    check_devices(given.get("devices", "auto"))
    if given.get("precision") is not None:
        resolve_precision(given["precision"], torch.device("cpu"))


def _check_items(name: str, value: Any, kind: type, needed: str) -> None:
    """One object or a list of them; the class in place of an instance is a common slip."""
    if name == "logger" and isinstance(value, bool):
        return
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, type) and issubclass(one, kind):
            raise UsageError(f"Trainer({name}=...): {one.__name__} is a class", fix=f"{name}=[{one.__name__}()]")
        if not isinstance(one, kind):
            raise UsageError(
                f"Trainer({name}={one!r}): {needed} is needed", fix=f"class Mine(flashtask.{kind.__name__})"
            )


def _whole(least: int, most: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _limit(value: Any) -> bool:
    return _number(value) and (isinstance(value, int) or value <= 1)


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _folder(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))


def _among(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


#: name -> (whether a value fits, what is needed, an example of it)
_RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    **{name: (_whole(least), f"a whole number of at least {least}", "10") for name, least in _COUNTS.items()},
    **dict.fromkeys(_SWITCHES, (_switch, "True or False", "True")),
    **dict.fromkeys(_LIMITS, (_limit, "a whole number of batches, or a share of them from 0.0 to 1.0,", "0.5")),
    **dict.fromkeys(_FOLDERS, (_folder, "the path of a folder", '"runs/mine"')),
    "seed": (_whole(0, 2**32 - 1), "a whole number from 0 to 4294967295", "42"),
    "gradient_clip_val": (_number, "None or a number of at least 0", "1.0"),
    "gradient_clip_algorithm": (_among("norm", "value"), '"norm" or "value"', '"norm"'),
    "memory_format": (
        _among("auto", "contiguous", "channels_last"),
        '"auto", "contiguous" or "channels_last"',
        '"channels_last"',
    ),
}

#: name -> (what one object must be, how that is said)
_ITEMS: dict[str, tuple[type, str]] = {
    "callbacks": (Callback, "a Callback or a list of them"),
    "logger": (Logger, "True, False, a Logger or a list of them"),
}
