"""`flashtask zoo check FILE`: everything in a zoo file that can be wrong, looked at before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashtask.cli.checks import check_arguments, check_keys, check_names, check_shape, check_values
from flashtask.cli.own_zoo import recipe_in
from flashtask.core.errors import UsageError
from flashtask.core.zoo import ZooFile, use_zoo_file

__all__ = ["check_zoo"]


def check_zoo(path: str) -> None:
    """Check one zoo file as it would be used, over the shipped one; say how many entries it has.

    Args:
        path: of the file.

    Raises:
        MissingInputError: there is no such file.
        UsageError: what is wrong first, with the file, line and column.
    """
    from flashtask.tasks.own_zoo import use_zoo

    use_zoo(path)
    file = use_zoo_file(path)
    _check_weights(file)
    _check_arguments(file)
    for name in file.zoo.recipes:
        _check_recipe(file, name)
    counts = {section: len(getattr(file.zoo, section)) for section in type(file.zoo).model_fields}
    told = [f"{count} {section if count > 1 else section[:-1]}" for section, count in counts.items() if count]
    click.echo(f"{Path(path)} is right: {', '.join(told) or 'no entries'}")


def _check_weights(file: ZooFile) -> None:
    """The tag of a backbone's source is one of the library's, and the head's options are its own."""
    from flashtask.backbones import BACKBONES
    from flashtask.core.registry import check_options
    from flashtask.heads import HEADS

    for name, entry in file.zoo.backbones.items():
        try:
            BACKBONES.entry(entry.source).known()
        except UsageError as error:
            raise _placed(file, ("backbones", name, "source"), error) from error
    for name, head in file.zoo.heads.items():
        for option in head.options:
            try:
                check_options(f"head {head.source!r}", HEADS.get(head.source or name), {option: None}, given=2)
            except UsageError as error:
                raise _placed(file, ("heads", name, "options", option), error) from error


def _check_arguments(file: ZooFile) -> None:
    """The defaults of a task are arguments that it has."""
    from flashtask.tasks import TASKS

    for name, task in file.zoo.tasks.items():
        known: list[str] = TASKS.get(name).argument_names()
        for argument in task.defaults:
            if argument not in known:
                keys = ("tasks", name, "defaults", argument)
                error = UsageError(f"the task has no argument {argument!r}", fix=f"its arguments: {', '.join(known)}")
                raise _placed(file, keys, error)


def _check_recipe(file: ZooFile, name: str) -> None:
    """A recipe has keys, values and names that can be meant, as if it were run."""
    from flashtask.tasks import TASKS
    from flashtask.trainer.trainer import Trainer

    recipe = recipe_in(file, name)
    check_shape(recipe)
    check_values(recipe)
    check_names(recipe)
    task: Any = TASKS.get(recipe.get("task") or "image_classification")
    check_arguments(recipe, "model", task)
    check_arguments(recipe, "trainer", Trainer)
    if recipe.get("data"):
        check_keys(recipe, "data", task.data_class.constructors)
        check_arguments(recipe, f"data.{recipe.constructor}", getattr(task.data_class, recipe.constructor))


def _placed(file: ZooFile, keys: tuple[str, ...], error: UsageError) -> UsageError:
    return file.error(*keys, what=f"{'.'.join(keys)}: {error.what}", why=error.why, fix=error.fix)
