"""Which task data is for, where nobody says it: taken if only one is meant by it, else asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.tasks import TASKS

__all__ = ["choose_task"]


def choose_task(constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The registered task for the data that a recipe describes, and in words what was understood of it.

    Of tasks with the same data class one counts, flashtask's own before others; the others have to be asked for.

    Args:
        constructor: of the data class, such as `from_csv`.
        arguments: its arguments.

    Raises:
        UsageError: several tasks are possible, or none; with the candidates.
        MissingInputError, BadDataError: as the constructor.
    """
    loaded: list[tuple[bool, str, Any]] = []
    for name in TASKS.names():
        try:
            task = TASKS.get(name)
        except UsageError:  # an installed package that cannot be loaded, whose task nobody has asked for
            continue
        loaded.append((not task.__module__.startswith("flashtask."), name, task.data_class))
    classes: dict[Any, str] = {}
    for _, name, data_class in sorted(loaded, key=lambda one: one[:2]):
        if constructor in getattr(data_class, "constructors", ()):
            classes.setdefault(data_class, name)
    found = {name: data_class.suits(constructor, arguments) for data_class, name in classes.items()}
    certain = [name for name, (reading, _) in found.items() if reading == "certain"]
    if len(certain) == 1:
        return certain[0], found[certain[0]][1]
    candidates = certain or [name for name, (reading, _) in found.items() if reading == "possible"]
    if not candidates and constructor == "from_folders":
        return "image_classification", "no annotations were found"  # its constructor says what is wrong with the folder
    if not candidates:
        raise UsageError(
            "which task is the data for? None of those that were found reads it",
            fix=f"--task NAME, one of: {', '.join(TASKS.names())}",
        )
    raise UsageError(
        f"which task is the data for? Possible are {', '.join(candidates)}",
        why="; ".join(f"{name}: {found[name][1]}" for name in candidates),
        fix=f"--task {candidates[0]}",
    )
