"""A zoo file of the user's: taken into use, checked, and asked for by the checkpoints that need it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flashtask.backbones import BACKBONES
from flashtask.core.errors import FlashtaskError, IntegrityError, MissingInputError, UsageError
from flashtask.core.registry import Registry
from flashtask.core.zoo import ZooFile, leave_zoo_file, own_file_of, own_zoo_files, use_zoo_file
from flashtask.heads import HEADS
from flashtask.tasks import TASKS

__all__ = ["check_own_zoo", "own_names", "require_own_names", "use_zoo"]

#: argument of a task -> the section of a zoo file that its names stand in
_SECTIONS = {"backbone": "backbones", "head": "heads"}


def use_zoo(path: str | os.PathLike[str]) -> None:
    """Merge a zoo file of your own over the shipped one, for the rest of the process.

    Files are merged in this order, each over the ones before: the shipped one, those of `$FLASHTASK_ZOO`, and those
    given here. What an entry replaces is printed on standard error.

    Args:
        path: of the file; once more for the same file reads it anew.

    Raises:
        MissingInputError: there is no such file.
        UsageError: a wrong key, type or name in it, with line and column, or a name that there is already in an entry
            without `override: true`.
    """
    before = len(own_zoo_files())
    use_zoo_file(path)
    try:
        check_own_zoo()
    except FlashtaskError:
        if len(own_zoo_files()) > before:
            leave_zoo_file(path)
        raise


def check_own_zoo() -> None:
    """Check that what the user's own zoo files name is there: sources, heads, tasks, strategies. Loads no torch.

    Raises:
        UsageError: with the file, line and column of the first name that is not.
    """
    for registry in (BACKBONES, HEADS, TASKS):
        registry.names()  # each looks through its own section
    for file in own_zoo_files():
        for provider in file.zoo.providers:
            if not any(provider == known for known in ("timm", "torchvision")):
                what = f"providers.{provider}: flashtask builds models of timm and torchvision only"
                raise file.error("providers", provider, what=what)
        for keys, value, check in _names_in(file):
            _check_name(file, keys, value, check)


def own_names(backbone: Any, head: Any) -> dict[str, dict[str, str]]:
    """Which of a task's two names come from a zoo file of the user's, and from which: what a checkpoint keeps."""
    names = {"backbone": backbone, "head": head}
    found = {}
    for part, section in _SECTIONS.items():
        name = names[part]
        if isinstance(name, str) and (file := own_file_of(section, name)) is not None:
            found[part] = {"name": name, "file": str(file.path)}
    return found


def require_own_names(stored: Any, given: Mapping[str, Any], path: Any) -> None:
    """What a checkpoint had from a zoo file must come from one now, unless it is given instead.

    Args:
        stored: what `own_names` gave when the checkpoint was written.
        given: arguments that stand in for stored ones.
        path: of the checkpoint, for messages.

    Raises:
        MissingInputError: a name does not come from a zoo file; the fix names the file it came from.
        IntegrityError: what the checkpoint says of it cannot be read.
    """
    if not isinstance(stored, Mapping):
        raise IntegrityError(f"{path}: what it says of zoo files is {type(stored).__name__}, not names")
    for part, section in _SECTIONS.items():
        if part not in stored or part in given:
            continue
        needed = stored[part]
        if not isinstance(needed, Mapping) or not all(isinstance(needed.get(key), str) for key in ("name", "file")):
            raise IntegrityError(f"{path}: what it says of the zoo file of its {part} is not a name and a file")
        name, file = needed["name"][:200], needed["file"][:500]
        if own_file_of(section, name) is None:
            typed = shlex.quote(file)  # a checkpoint may come from anyone, and this is text to copy into a shell
            raise MissingInputError(
                f"{path} needs the {part} {name!r} of a zoo file that is not in use",
                why=f"it was trained with {file!r}",
                fix=f"add --zoo {typed}, set FLASHTASK_ZOO={typed}, or in Python flashtask.use_zoo({file!r})",
            )


Named = tuple[tuple[str, ...], Any, Callable[[Any], Any]]


def _names_in(file: ZooFile) -> Iterator[Named]:
    """The keys in a file whose values must be names that there are: (keys, value, check)."""
    for name, task in file.zoo.tasks.items():
        yield from _named_parts(("tasks", name, "defaults"), task.defaults)
    for name, checkpoint in file.zoo.checkpoints.items():
        yield ("checkpoints", name, "task"), checkpoint.task, TASKS.entry
    for name, entry in file.zoo.recipes.items():
        keys = ("recipes", name, "recipe")
        if "task" in entry.recipe:
            yield (*keys, "task"), entry.recipe["task"], TASKS.entry
        if isinstance(model := entry.recipe.get("model"), dict):
            yield from _named_parts((*keys, "model"), model)


def _named_parts(keys: tuple[str, ...], arguments: Mapping[str, Any]) -> Iterator[Named]:
    registries: dict[str, Registry[Any]] = {"backbone": BACKBONES, "head": HEADS}
    for part, registry in registries.items():
        if arguments.get(part) is not None:
            yield (*keys, part), arguments[part], registry.entry


def _check_name(file: ZooFile, keys: tuple[str, ...], value: Any, check: Callable[[Any], Any]) -> None:
    try:
        if not isinstance(value, str):
            raise UsageError(f"{value!r} is no name")
        check(value)
    except UsageError as error:
        raise file.error(*keys, what=f"{'.'.join(keys)}: {error.what}", why=error.why, fix=error.fix) from error
