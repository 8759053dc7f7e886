"""Checks of the arguments of `ModelCheckpoint`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.trainer.checkpoints.names import SUFFIX, NameTemplate, versions_of

__all__ = ["check_checkpoint_settings", "template_of"]


def check_checkpoint_settings(given: Mapping[str, Any]) -> None:
    """Look at every argument before anything is trained.

    Raises:
        UsageError: a value that cannot be meant, or two that contradict each other.
    """
    for name, (fits, needed, example) in _RULES.items():
        if not fits(given[name]):
            raise UsageError(f"ModelCheckpoint({name}={given[name]!r}): {needed} is needed", fix=f"{name}={example}")
    if given["every_n_steps"] is not None and given["every_n_train_steps"] is not None:
        raise UsageError("every_n_steps and every_n_train_steps are one argument", fix="drop every_n_steps")
    if given["save_last"] == "link" and given["save_weights_only"]:
        raise UsageError(
            'save_last="link" contradicts save_weights_only=True',
            why="last.ckpt would be a file that cannot be resumed",
            fix="save_last=True",
        )


def template_of(filename: str | None, save_top_k: int, insert_names: bool) -> NameTemplate:
    """The template for names; without one `best`, or `{epoch}-{step}` where several files are kept.

    Raises:
        UsageError: it names no file, or that of the newest.
    """
    default = "best" if save_top_k in (0, 1) else "{epoch}-{step}"
    template = NameTemplate(default if filename is None else filename, insert_names)
    if not template.fields and versions_of("last").fullmatch(template.text + SUFFIX):
        raise UsageError(f"filename={filename!r} is the name of the newest file", fix='filename="best"')
    return template


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


#: (whether a value can be meant, what is needed, an example)
_Rule = tuple[Callable[[Any], bool], str, str]
_SWITCH: _Rule = (_is_switch, "True or False", "True")
_FREQUENCY: _Rule = (lambda v: v is None or is_whole(v, 1), "None or a whole number of at least 1", "5")
_RULES: dict[str, _Rule] = {
    "dirpath": (lambda v: v is None or isinstance(v, (str, os.PathLike)), "None or a path", '"checkpoints"'),
    "monitor": (lambda v: v is None or isinstance(v, str), "None or the name of a metric", '"val_loss"'),
    "mode": (lambda v: v in (None, "min", "max"), 'None, "min" or "max"', '"min"'),
    "save_last": (lambda v: _is_switch(v) or v == "link", 'True, False or "link"', "True"),
    "save_top_k": (lambda v: is_whole(v, -1), "a whole number from 0 on, or -1 for all", "3"),
    "every_n_train_steps": _FREQUENCY,
    "every_n_steps": _FREQUENCY,
    "every_n_epochs": _FREQUENCY,
    "save_on_train_epoch_end": (lambda v: v is None or _is_switch(v), "None, True or False", "False"),
    "verbose": _SWITCH,
    "save_weights_only": _SWITCH,
    "auto_insert_metric_name": _SWITCH,
    "save_on_exception": _SWITCH,
}
