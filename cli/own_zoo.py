"""The user's own zoo files on the command line: `--zoo`, a recipe's `zoo`, and the recipes that stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashtask.cli.recipe import Recipe, absolute_value, recipe_from
from flashtask.core.errors import FlashtaskError, UnknownNameError
from flashtask.core.zoo import ZooFile, load_zoo, own_file_of, own_zoo_files

__all__ = ["own_task_defaults", "recipe_in", "use_option", "use_recipe_zoo", "zoo_recipe"]


def use_option(params: Mapping[str, Any]) -> None:
    """Take the file of `--zoo` into use, and check those of `$FLASHTASK_ZOO` too.

    Raises:
        MissingInputError, UsageError: a file is not there, or wrong; with line and column.
    """
    _use([params["zoo"]] if params.get("zoo") else [], "--zoo")


def use_recipe_zoo(recipe: Recipe) -> None:
    """Take the files of a recipe's `zoo` into use; errors as `use_option`, with where the recipe names the file."""
    files = recipe.get("zoo") or []
    _use([files] if isinstance(files, str) else files, recipe.origin("zoo"))


def zoo_recipe(name: str) -> Recipe:
    """The recipe that stands under `recipes` in the zoo.

    Raises:
        UnknownNameError: there is none of this name.
    """
    zoo = load_zoo()
    if name not in zoo.recipes:
        raise UnknownNameError("recipe", name, zoo.recipes, listed_by="flashtask zoo --kind recipe")
    file = own_file_of("recipes", name)
    return recipe_in(file, name) if file else Recipe(dict(zoo.recipes[name].recipe), {})


def recipe_in(file: ZooFile, name: str) -> Recipe:
    """A recipe of a user's zoo file; its relative paths count from the folder of the file."""
    recipe = recipe_from(file.document, ("recipes", name, "recipe"))
    folder = file.path.parent if file.path else Path.cwd()
    for key, value in list(recipe.leaves()):
        recipe.set(key, absolute_value(key, value, folder), recipe.origin(key))
    return recipe


def own_task_defaults(task: str) -> Mapping[str, Any]:
    """What the user's own zoo files say that a task takes for arguments that are not said."""
    return {} if own_file_of("tasks", task) is None else load_zoo().tasks[task].defaults


def _use(files: list[str], origin: str) -> None:
    from flashtask.tasks.own_zoo import check_own_zoo, use_zoo

    for file in files:
        try:
            use_zoo(file)
        except FlashtaskError as error:
            error.what = error.what if file in error.what and "line" in error.what else f"{origin}: {error.what}"
            raise
    if own_zoo_files():
        check_own_zoo()
