"""What can be wrong with a recipe: shape, values and names, and the keys of each section."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from flashtask.cli.model_source import SOURCE_KEYS
from flashtask.cli.options import kinds_by_key
from flashtask.cli.processes import check_distributed
from flashtask.cli.recipe import MAPPINGS, SECTIONS, Recipe
from flashtask.core.errors import UsageError, key_fix
from flashtask.core.keywords import nearest_argument
from flashtask.trainer.by_name import WATCHING

__all__ = ["check_arguments", "check_names", "check_sections", "check_shape", "check_values", "lost_from"]
__all__ += ["require_whole"]


def require_whole(recipe: Recipe) -> None:
    """A recipe that a run wrote holds all of it; its key `not_saved` is taken out.

    Raises:
        UsageError: it does not: what is missing was an object in Python.
    """
    source = recipe.source_of("not_saved")
    if missing := lost_from(recipe):
        named = ", ".join(f"{key}: {what}" for key, what in missing.items())
        raise UsageError(
            f"{source}: this recipe does not hold everything that its run used ({named})",
            why="a recipe cannot hold what was made in Python, and without it the run would be different",
            fix="repeat the run from Python with these, or delete `not_saved` from the recipe to run without them",
        )


def lost_from(recipe: Recipe) -> dict[str, Any]:
    """What a recipe could not hold of the run that wrote it and what changes the run; the key is taken out.

    Raises:
        UsageError: the key holds something else.
    """
    source, lost = recipe.source_of("not_saved"), recipe.remove("not_saved") or {}
    if not isinstance(lost, dict):
        raise UsageError(f"{source}: `not_saved` must be a mapping of keys", fix="delete it")
    for key in WATCHING:
        if key in lost:
            print(f"running without {lost.pop(key)}, which the recipe cannot hold ({key})", file=sys.stderr)
    return lost


def check_shape(recipe: Recipe) -> None:
    """The sections are known and hold keys, and the data is made in one way.

    Raises:
        UsageError: with where the wrong key stands.
    """
    check_keys(recipe, "", SECTIONS)
    zoo = recipe.get("zoo") or []
    if not all(isinstance(path, str) and path for path in (zoo if isinstance(zoo, list) else [zoo])):
        raise UsageError(
            f"{recipe.source_of('zoo')}: `zoo` must be a zoo file, or a list of them", fix="zoo: my_zoo.yaml"
        )
    for section in MAPPINGS:
        if not isinstance(recipe.values.get(section, {}), dict):
            raise UsageError(
                f"{recipe.source_of(section)}: `{section}` must be a mapping of keys", fix=_EXAMPLES[section]
            )
    data = recipe.values.get("data", {})
    if len(data) > 1:
        raise UsageError(
            f"{recipe.source_of('data')}: `data` names {len(data)} constructors: {', '.join(data)}",
            fix=_EXAMPLES["data"],
        )
    for constructor, arguments in data.items():
        if not isinstance(arguments, dict):
            key = f"data.{constructor}"
            raise UsageError(f"{recipe.source_of(key)}: `{key}` must be a mapping of keys", fix=_EXAMPLES["data"])


_EXAMPLES = {
    "data": "data: {from_folders: {train_folder: data/train, batch_size: 32}}",
    "model": "model: {backbone: resnet18, head: linear}",
    "trainer": "trainer: {max_epochs: 10, seed: 42}",
    "finetune": "finetune: {strategy: freeze}",
    "licences": "licences: {data: CC-BY-4.0, weights: Apache-2.0}",
}


def check_values(recipe: Recipe) -> None:
    """Bring values that are options to their type; lists and mappings are for the rooms to check.

    Raises:
        UsageError: a value that cannot be meant, with where it stands.
    """
    for key, kind in kinds_by_key().items():
        here = recipe.here(key)
        value = recipe.get(here)
        if value is None or isinstance(value, list | tuple | dict):
            continue
        source = recipe.source_of(here)
        try:
            if isinstance(value, bool):
                raise ValueError(f"cannot be {str(value).lower()}")
            recipe.set(here, kind(str(value)), source)
        except ValueError as error:
            shown = source if source.startswith("--") else f"{source}: {here}"
            raise UsageError(f"{shown}: {error}") from None


def check_names(recipe: Recipe) -> None:
    """The task, backbone, head and strategy exist. Loads none of them.

    Raises:
        UnknownNameError: with near matches and where the name stands.
        UsageError: the arguments of a strategy cannot be meant.
    """
    from flashtask.backbones import BACKBONES
    from flashtask.heads import HEADS
    from flashtask.tasks import TASKS
    from flashtask.trainer.distribution.process_strategies import advice_on_distribution
    from flashtask.trainer.finetuning.strategies import resolve_finetuning

    check_distributed(recipe.get("trainer.strategy"), recipe.source_of("trainer.strategy"))
    checks: dict[str, Callable[[Any], Any]] = {
        "task": TASKS.entry,
        "model.backbone": BACKBONES.entry,
        "model.head": HEADS.entry,
        "finetune.strategy": resolve_finetuning,
    }
    for key, check in checks.items():
        value = recipe.get(key)
        if value is None or (key.startswith("model.") and not isinstance(value, str)):
            continue
        try:
            check(value)
        except UsageError as error:
            error.what = f"{recipe.source_of(key)}: {error.what}"
            if key == "finetune.strategy" and (advice := advice_on_distribution(value)):
                error.why = advice[0]
                error.fix = f"--distributed {advice[1]}, or `strategy: {advice[1]}` in the recipe's `trainer`"
            raise


def check_sections(recipe: Recipe, task_class: Any) -> None:
    """The keys below each section are those that a task, its data and the trainer take.

    Raises:
        UsageError: with the nearest right key and where the wrong one is.
    """
    from flashtask.trainer.trainer import Trainer

    if recipe.get("data"):
        check_keys(recipe, "data", task_class.data_class.constructors)
        check_arguments(recipe, f"data.{recipe.constructor}", getattr(task_class.data_class, recipe.constructor))
    check_arguments(recipe, "model", task_class)
    check_arguments(recipe, "trainer", Trainer)
    check_keys(recipe, "finetune", ["strategy", "restore_best", "budget"])
    check_keys(recipe, "licences", ["data", "weights"])


def check_arguments(recipe: Recipe, section: str, takes: Callable[..., Any]) -> None:
    """The keys below a section (`model`, `data.from_folders`) are arguments of what they are given to.

    Raises:
        UsageError: a key that is none, with the nearest right one and where it stands.
    """
    known = _arguments_of(takes)
    if known is not None:
        check_keys(recipe, section, known)


def _arguments_of(takes: Callable[..., Any]) -> list[str] | None:
    """Names of arguments: a task knows its own (those of its parents too). None: anything, for it passes them on."""
    own = getattr(takes, "argument_names", None)
    if own is not None:
        names: list[str] = own()
        return [*names, *SOURCE_KEYS]  # a task can be begun from a pretrained one
    parameters = inspect.signature(takes).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not isinstance(takes, type):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def check_keys(recipe: Recipe, section: str, known: Iterable[str]) -> None:
    """The keys below a section (of the whole recipe if it is empty) are among those known.

    Raises:
        UsageError: a key that is not, with the nearest right one and where it stands.
    """
    known = list(known)
    for key in recipe.get(section, {}) if section else recipe.values:
        if key not in known:
            full = f"{section}.{key}" if section else key
            where = f"in `{section}`" if section else "in a recipe"
            raise UsageError(
                f"{recipe.source_of(full)}: there is no key {key!r} {where}",
                fix=nearest_argument(key, known) or key_fix(key, known),
            )
