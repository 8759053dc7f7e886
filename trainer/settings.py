"""Checks of the trainer's arguments, with the nearest right name for a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["check_settings"]

_COUNTS = {
    "max_epochs": 1,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "accumulate_grad_batches": 1,
}


def check_settings(given: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """Look at every argument before anything is built.

    Args:
        given: the arguments that the trainer knows.
        unknown: those it does not.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    for name in unknown:
        raise UsageError(f"Trainer has no argument {name!r}", fix=did_you_mean(name, given) or "see help(Trainer)")
    for name, least in _COUNTS.items():
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"Trainer({name}={value!r}): a whole number of at least {least} is needed")
    seed = given.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32):
        raise UsageError(f"Trainer(seed={seed!r}): a whole number from 0 to 4294967295 is needed")
    if given.get("gradient_clip_algorithm", "norm") not in ("norm", "value"):
        raise UsageError(
            f"Trainer(gradient_clip_algorithm={given['gradient_clip_algorithm']!r})", fix='"norm" or "value"'
        )
    if given.get("memory_format") not in (None, "auto", "contiguous", "channels_last"):
        raise UsageError(
            f"Trainer(memory_format={given['memory_format']!r})",
            fix='"auto", "contiguous" or "channels_last"',
        )
