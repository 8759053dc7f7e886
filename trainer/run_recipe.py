"""The recipe of a run: what describes it in names and numbers, so that it can be run again."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

from flashtask.core.zoo import own_zoo_files
from flashtask.trainer.callbacks.reading import recipe_of_callbacks
from flashtask.trainer.fit_run import FitRun

__all__ = ["recipe_of"]

#: Where a run writes, and objects: not part of what describes it.
_LEFT_OUT = ("output_dir", "default_root_dir", "callbacks", "logger", "plugins", "profiler")


def recipe_of(run: FitRun) -> dict[str, Any] | None:
    """The sections `task`, `data`, `model`, `trainer` and `finetune`; None if module or data cannot be described.

    Where zoo files of the user's are in use, `zoo` names them.
    """
    module, data = run.module.recipe(), getattr(run.data, "recipe", lambda: None)()
    if module is None or data is None:
        return None
    finetune = {"strategy": "no_freeze", "restore_best": False}
    if run.finetuning is not None:
        finetune = {"strategy": run.finetuning.recipe(), "restore_best": run.restores_best}
    own = [str(file.path) for file in own_zoo_files()]
    return {
        "task": module["task"],
        **({"zoo": own} if own else {}),
        "data": data,
        "model": module["model"],
        "trainer": _settings(run),
        "finetune": finetune,
    }


def _settings(run: FitRun) -> dict[str, Any]:
    """What was said otherwise than it is by default, and what decides the numbers in any case."""
    trainer = run.trainer
    defaults = {name: p.default for name, p in inspect.signature(type(trainer)).parameters.items()}
    precision = getattr(trainer.precision, "name", trainer.precision) or run.module.default_precision
    said = {name: value for name, value in trainer.arguments.items() if value != defaults[name]}
    said |= {"max_epochs": trainer.epochs_of(run.module), "max_steps": trainer.max_steps, "precision": str(precision)}
    said["seed"] = run.seed
    settings = {name: _plain(said[name]) for name in defaults if name in said and name not in _LEFT_OUT}
    if named := recipe_of_callbacks(trainer.arguments["callbacks"]):
        settings["callbacks"] = named
    return settings


def _plain(value: Any) -> Any:
    """A setting as a recipe can hold it: an object by its name, a length of time in seconds."""
    if isinstance(value, timedelta):
        return {"seconds": value.total_seconds()}
    return getattr(value, "name", value)
