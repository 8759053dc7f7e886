"""A zoo file of the user's: taken into use, checked, and asked for by the checkpoints that need it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from flashtask.backbones import BACKBONES
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.registry import Registry
from flashtask.core.zoo import ZooFile, own_file_of, own_zoo_files, use_zoo_file
from flashtask.heads import HEADS
from flashtask.tasks import TASKS

__all__ = ["REGISTRIES", "check_own_zoo", "own_names", "require_own_names", "use_zoo"]

#: The registries whose names zoo files add to.
REGISTRIES: dict[str, Registry[Any]] = {"backbone": BACKBONES, "head": HEADS, "task": TASKS}


def use_zoo(path: str | os.PathLike[str]) -> None:
    """Merge a zoo file of your own over the shipped one, for the rest of the process.

    Files are merged in this order, each over the ones before: the shipped one, those of `$FLASHTASK_ZOO`, and those
    given here. What an entry replaces is printed on standard error.

    Args:
        path: of the file; one that is in use already is read again.

    Raises:
        MissingInputError: there is no such file.
        UsageError: a wrong key, type or name in it, with line and column, or an entry that replaces a name without
            `override: true`.
    """
    use_zoo_file(path, check_own_zoo)


def check_own_zoo() -> None:
    """Check that the sources, heads, tasks and backbones that the user's zoo files name exist. Loads no torch.

    Raises:
        UsageError: with the file, line and column of the first name that does not.
    """
    for registry in REGISTRIES.values():
        registry.names()  # each checks its own section
    for file in own_zoo_files():
        for name, task in file.zoo.tasks.items():
            _check_names(file, ("tasks", name, "defaults"), task.defaults, "backbone", "head")
        for name, checkpoint in file.zoo.checkpoints.items():
            _check_names(file, ("checkpoints", name), {"task": checkpoint.task}, "task")
        for name, entry in file.zoo.recipes.items():
            keys = ("recipes", name, "recipe")
            _check_names(file, keys, entry.recipe, "task")
            if isinstance(model := entry.recipe.get("model"), dict):
                _check_names(file, (*keys, "model"), model, "backbone", "head")


def own_names(backbone: Any, head: Any) -> dict[str, dict[str, str]]:
    """The names of a backbone and a head that come from a user's zoo file, and from which: kept in checkpoints."""
    return {
        part: {"name": name, "file": str(file.path)}
        for part, name in (("backbone", backbone), ("head", head))
        if isinstance(name, str) and (file := own_file_of(f"{part}s", name)) is not None
    }


def require_own_names(stored: Any, given: Mapping[str, Any], path: Any) -> None:
    """A name that a checkpoint has from a zoo file must come from one now, unless another is given instead.

    Args:
        stored: what `own_names` gave when the checkpoint was written.
        given: arguments that replace stored ones.
        path: of the checkpoint, for messages.

    Raises:
        MissingInputError: a name does not come from a zoo file; the fix names the file it came from.
        IntegrityError: `stored` is not what `own_names` gives.
    """
    if not isinstance(stored, Mapping):
        raise IntegrityError(f"{path}: its record of zoo files is a {type(stored).__name__}, not a mapping")
    for part in ("backbone", "head"):
        if part not in stored or part in given:
            continue
        needed = stored[part]
        if not isinstance(needed, Mapping) or not all(isinstance(needed.get(key), str) for key in ("name", "file")):
            raise IntegrityError(f"{path}: its record of the {part}'s zoo file is not a name and a file")
        name, file = needed["name"][:200], needed["file"][:500]
        if own_file_of(f"{part}s", name) is None:
            typed = shlex.quote(file)  # a checkpoint may come from anyone, and this is text to copy into a shell
            raise MissingInputError(
                f"{path} needs the {part} {name!r} from a zoo file that is not loaded",
                why=f"it was trained with {file!r}",
                fix=f"add --zoo {typed}, set FLASHTASK_ZOO={typed}, or in Python flashtask.use_zoo({file!r})",
            )


def _check_names(file: ZooFile, keys: tuple[str, ...], holder: Mapping[str, Any], *parts: str) -> None:
    """The backbone, the head or the task that a part of a zoo file names is in its registry."""
    for part in parts:
        if (name := holder.get(part)) is not None:
            with file.at(*keys, part):
                if not isinstance(name, str):
                    raise UsageError(f"{name!r} is not a name")
                REGISTRIES[part].entry(name)
