"""The user's own zoo files on the command line: `--zoo`, a recipe's `zoo`, and `flashtask zoo check FILE`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flashtask.backbones import BACKBONES
from flashtask.cli.recipe import Recipe, recipe_in
from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.core.registry import check_options
from flashtask.core.zoo import own_zoo_files, use_zoo_file
from flashtask.heads import HEADS
from flashtask.tasks import TASKS
from flashtask.tasks.own_zoo import check_own_zoo, use_zoo

__all__ = ["check_zoo", "use_option", "use_recipe_zoo"]


def use_option(params: Mapping[str, Any]) -> None:
    """Take the file of `--zoo` into use, and check those of `$FLASHTASK_ZOO` too.

    Raises:
        MissingInputError, UsageError: a file is missing or wrong; with line and column.
    """
    _use([params["zoo"]] if params.get("zoo") else [], "--zoo")


def use_recipe_zoo(recipe: Recipe) -> None:
    """Take the files of a recipe's `zoo` into use; errors as `use_option`, with where the recipe names the file."""
    files = recipe.get("zoo") or []
    _use([files] if isinstance(files, str) else files, recipe.source_of("zoo"))


def _use(files: list[str], source: str) -> None:
    for file in files:
        try:
            use_zoo(file)
        except FlashtaskError as error:
            error.what = error.what if file in error.what and "line" in error.what else f"{source}: {error.what}"
            raise
    if own_zoo_files():
        check_own_zoo()


def check_zoo(path: str) -> None:
    """Check all of one zoo file, over the shipped one; print how many entries it has.

    It looks further than a run does: at tags of weights, options of heads, arguments of tasks, and whole recipes.

    Args:
        path: of the file.

    Raises:
        MissingInputError: there is no such file.
        UsageError: what is wrong first, with the file, line and column.
    """
    from flashtask.cli.recipe_checks import check_names, check_sections, check_shape, check_values

    file = use_zoo_file(path, check_own_zoo)
    for name, backbone in file.zoo.backbones.items():
        with file.at("backbones", name, "source"):
            BACKBONES.entry(backbone.source).known()
    for name, head in file.zoo.heads.items():
        for option in head.options:
            with file.at("heads", name, "options", option):
                check_options(f"head {head.source!r}", HEADS.get(head.source or name), {option: None}, given=2)
    for name, task in file.zoo.tasks.items():
        known: list[str] = TASKS.get(name).argument_names()
        for argument in task.defaults:
            if argument not in known:
                with file.at("tasks", name, "defaults", argument):
                    raise UsageError(f"the task has no argument {argument!r}", fix=f"its arguments: {', '.join(known)}")
    for name in file.zoo.recipes:
        recipe = recipe_in(file, name)
        check_shape(recipe)
        check_values(recipe)
        check_names(recipe)
        check_sections(recipe, TASKS.get(recipe.get("task") or "image_classification"))
    counts = {section: len(getattr(file.zoo, section)) for section in type(file.zoo).model_fields}
    told = [f"{count} {section if count > 1 else section[:-1]}" for section, count in counts.items() if count]
    click.echo(f"{Path(path)} is valid: {', '.join(told) or 'no entries'}")
