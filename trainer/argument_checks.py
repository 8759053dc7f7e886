"""Checks of the trainer's arguments before anything is built, with the nearest right name for a wrong one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_number, is_whole
from flashtask.trainer.callbacks.accumulation import accumulation_by_epoch
from flashtask.trainer.callbacks.timing import read_duration
from flashtask.trainer.profiling.profilers import resolve_profiler

__all__ = ["check_settings"]

#: whole numbers, and the least they may be; None is no number, so it means something only where it is the default
_COUNTS = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "num_nodes": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "flush_logs_every_n_steps": 1,
}
_SWITCHES = (
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "detect_anomaly",
    "benchmark",
    "use_distributed_sampler",
    "sync_batchnorm",
    "report",
)
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
_FOLDERS = ("default_root_dir", "output_dir")
_MAY_BE_NONE = {"max_epochs", "min_epochs", "min_steps", "max_time", "precision", "plugins", "memory_format", "seed"}
_MAY_BE_NONE |= {
    "callbacks",
    "check_val_every_n_epoch",
    "gradient_clip_val",
    "deterministic",
    "benchmark",
    "ema_decay",
    "profiler",
    *_LIMITS,
    *_FOLDERS,
}


def check_settings(given: Mapping[str, Any]) -> None:
    """Look at every argument of a trainer before anything is built; no device is asked for.

    Raises:
        UsageError: a value of a wrong type or out of range.
    """
    for name, value in given.items():
        if value is None and name in _MAY_BE_NONE:
            continue
        if name in _RULES:
            fits, needed, example = _RULES[name]
            if not fits(value):
                raise UsageError(f"Trainer({name}={value!r}): {needed} is needed", fix=f"{name}={example}")
    if given["check_val_every_n_epoch"] is None and not is_whole(given["val_check_interval"], 1):
        raise UsageError(
            "check_val_every_n_epoch=None needs to know after how many batches validation comes",
            fix="val_check_interval=1000",
        )
    accumulation_by_epoch(given["accumulate_grad_batches"])
    if given["max_time"] is not None:
        read_duration(given["max_time"])
    resolve_profiler(given["profiler"])


def _whole(least: int, most: int = sys.maxsize) -> Callable[[Any], bool]:
    return lambda value: is_whole(value, least) and value <= most


def _number(value: Any) -> bool:
    return is_number(value) and 0 <= value <= sys.maxsize


def _limit(value: Any) -> bool:
    return _number(value) and (isinstance(value, int) or value <= 1)


def _interval(value: Any) -> bool:
    return is_whole(value, 1) or (isinstance(value, float) and 0 < value <= 1)


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _switch_or_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= sys.maxsize


def _norm(value: Any) -> bool:
    return value in ("inf", -1) or (_number(value) and value > 0)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is known or (isinstance(known, str) and value == known) for known in values)


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
    "feature_cache": (
        lambda value: isinstance(value, bool) or value == "auto" or is_whole(value),
        '"auto", True, False or a number of views',
        '"auto"',
    ),
    "seed": (_whole(0, 2**32 - 1), "a whole number from 0 to 4294967295", "42"),
    "gradient_clip_val": (_number, "None or a number of at least 0", "1.0"),
    "gradient_clip_algorithm": (_among("norm", "value"), '"norm" or "value"', '"norm"'),
    "ema_decay": (lambda value: is_number(value) and 0 <= value < 1, "None or a number from 0 to below 1", "0.999"),
    "val_check_interval": (_interval, "a number of batches, or a share of an epoch up to 1.0,", "0.25"),
    "overfit_batches": (_limit, "a whole number of batches, or a share of them from 0.0 to 1.0,", "10"),
    "fast_dev_run": (_switch_or_count, "True, False or a whole number of batches", "True"),
    "track_grad_norm": (_norm, 'a number above 0, "inf", or -1 for none', "2"),
    "deterministic": (_one_of(True, False, "warn"), 'True, False or "warn"', "True"),
    "auto_lr_find": (
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value.isidentifier()),
        "True, False or the name of an attribute",
        "True",
    ),
    "auto_scale_batch_size": (
        _one_of(True, False, "power", "binsearch"),
        'True, False, "power" or "binsearch"',
        "True",
    ),
    "memory_format": (
        _among("auto", "contiguous", "channels_last"),
        '"auto", "contiguous" or "channels_last"',
        '"channels_last"',
    ),
}
