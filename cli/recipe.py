"""A recipe: all that describes a run, from a YAML file, flags and `--set`, and where each value was said."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashtask.cli.options import CONSTRUCTOR
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.hub.address import is_hub_address
from flashtask.core.yaml_reader import YamlDocument, read_yaml
from flashtask.core.zoo import ZooFile, load_zoo, own_file_of

__all__ = ["MAPPINGS", "SECTIONS", "SEVERAL", "Recipe", "absolute", "absolute_value", "asked_for_several", "is_path"]
__all__ += ["read_recipe", "recipe_in", "zoo_recipe"]

#: The keys of a recipe that hold keys of their own.
MAPPINGS = ("data", "model", "trainer", "finetune", "licences")
#: The keys of a recipe that make several runs of it: with other seeds or splits, over folds.
SEVERAL = ("repeats", "folds", "vary")
#: The keys of a recipe; `task` is a name, `zoo` a zoo file of the user's or a list of them.
SECTIONS = ("task", "zoo", *MAPPINGS, *SEVERAL)


@dataclass
class Recipe:
    """Nested values with dotted keys.

    Args:
        values: `{"model": {"backbone": "resnet18"}, ...}`.
        sources: dotted key -> where it was said: `recipe.yaml, line 3, column 5`, `--backbone`, `--set`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key."""
        found: Any = self.values
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def set(self, key: str, value: Any, source: str) -> None:
        """Give a dotted key a value; what was there before is forgotten.

        Raises:
            UsageError: a part of the key has a value that holds no keys.
        """
        inner = self.values
        *parents, last = self.here(key).split(".")
        for part in parents:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError(f"{source}: {key} cannot be set, because {part} is {inner!r}")
        inner[last] = value
        self.sources[self.here(key)] = source

    def remove(self, key: str) -> Any:
        """Take a dotted key out, and give its value (None if there is none)."""
        *parents, last = key.split(".")
        holder = self.get(".".join(parents)) if parents else self.values
        return holder.pop(last, None) if isinstance(holder, dict) else None

    def here(self, key: str) -> str:
        """The key in this recipe, whose data may be made otherwise than by the `from_folders` of options."""
        generic = f"data.{CONSTRUCTOR}"
        return key.replace(generic, f"data.{self.constructor}", 1) if key.startswith(generic + ".") else key

    @property
    def constructor(self) -> str:
        """The name of the data constructor, `from_folders` if nothing is said."""
        data = self.values.get("data")
        return str(next(iter(data))) if isinstance(data, dict) and data else CONSTRUCTOR

    def source_of(self, key: str) -> str:
        """The source of a key, or of the nearest key around it or below it that has one."""
        around = key
        while around:
            if around in self.sources:
                return self.sources[around]
            around = around.rpartition(".")[0]
        return next((source for known, source in self.sources.items() if known.startswith(f"{key}.")), "recipe")

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every dotted key whose value holds no keys of its own, with that value.

        What a data constructor or the model takes may itself be a mapping: it counts as one value.
        """
        for section, value in self.values.items():
            depth = 2 if section == "data" else 1 if section in MAPPINGS else 0
            yield from _leaves(section, value, depth)

    def set_from_text(self, text: str) -> None:
        """Take `--set KEY=VALUE`: the value is YAML, a relative path counts from the current folder.

        Raises:
            UsageError: no `=`, or a key that is not below a section.
        """
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {text!r} is not KEY=VALUE", fix="--set trainer.gradient_clip_val=1.0")
        content = read_yaml(value, name=f"--set {key}").content
        self.set(key, absolute_value(key, content, Path.cwd()), "--set")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file; its relative paths become absolute, counted from the folder of the file.

    Raises:
        MissingInputError: there is no such file.
        UsageError: it is not YAML, or not a mapping of names; with line and column.
    """
    return _recipe_at(read_yaml(path), (), path.parent)


def zoo_recipe(name: str) -> Recipe:
    """The recipe of a name under `recipes` in the zoo.

    Raises:
        UnknownNameError: there is no recipe of this name.
    """
    recipes = load_zoo().recipes
    if name not in recipes:
        raise UnknownNameError("recipe", name, recipes, listed_by="flashtask zoo --kind recipe")
    file = own_file_of("recipes", name)
    return recipe_in(file, name) if file else Recipe(dict(recipes[name].recipe), {})


def recipe_in(file: ZooFile, name: str) -> Recipe:
    """A recipe of a user's zoo file; its relative paths count from the folder of the file."""
    return _recipe_at(file, ("recipes", name, "recipe"), file.path.parent if file.path else Path.cwd())


def _recipe_at(document: YamlDocument, path: tuple[str, ...], folder: Path) -> Recipe:
    """The recipe at a key path of a YAML document, with the lines of its values; paths are counted from a folder.

    Raises:
        UsageError: it is not a mapping of names; with line and column.
    """
    content: Any = copy.deepcopy(document.content)
    for key in path:
        content = content[key]
    if not isinstance(content, dict):
        raise document.error(
            *path, what="a recipe must be a mapping of keys", fix=f"the keys are {', '.join(SECTIONS)}"
        )
    recipe = Recipe(content, dict(_origins(document, content, path, len(path))))
    for key, value in list(recipe.leaves()):
        if is_path(key):
            recipe.set(key, absolute_value(key, value, folder), recipe.source_of(key))
    return recipe


def asked_for_several(recipe: Recipe) -> str:
    """The key of a recipe that makes several runs of it; empty for one run."""
    return next((key for key in ("folds", "repeats") if recipe.get(key) is not None), "")


def is_path(key: str) -> bool:
    """Whether the value of a dotted key is a path in the file system, or a list of paths (`zoo`)."""
    if key in ("zoo", "model.from"):
        return True
    return key.startswith(("data.", "trainer.")) and key.endswith(("_folder", "_file", "_dir", "_root"))


def absolute_value(key: str, value: Any, folder: Path) -> Any:
    """The value of a dotted key with its path, or its list of paths, counted from `folder`; any other as it is."""
    if not is_path(key) or not value:
        return value
    if isinstance(value, list):
        return [absolute_value(key, each, folder) for each in value]
    return absolute(value, folder) if isinstance(value, str) else value


def absolute(path: str, folder: Path) -> str:
    """A path counted from `folder`, with `~` expanded and `..` taken out; an address stays as it is."""
    if "://" in path or is_hub_address(path):
        return path
    return os.path.abspath(folder / Path(path).expanduser())


def _origins(document: YamlDocument, content: Any, path: tuple[Any, ...], depth: int) -> Iterator[tuple[str, str]]:
    for name, value in content.items() if isinstance(content, dict) else ():
        here = (*path, name)
        # Below the arguments numbers may stand: `accumulate_grad_batches: {0: 1, 4: 2}`.
        if not isinstance(name, str) and len(here) - depth <= 2:
            raise document.error(*here, what=f"a key of a recipe must be a name, not {name!r}")
        line, column = document.place(here)
        yield ".".join(map(str, here[depth:])), f"{document.name}, line {line}, column {column}"
        yield from _origins(document, value, here, depth)


def _leaves(key: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth and isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner, depth - 1)
    else:
        yield key, value
