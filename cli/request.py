"""What the user asks `flashtask finetune` for: a recipe file, over it the flags, over them `--set`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashtask.cli.model_source import check_source
from flashtask.cli.option import CONSTRUCTOR, OF_SHARDS, OF_TABLES, OF_THE_HUB, OF_YOLO
from flashtask.cli.options import FINETUNE, given, kinds_by_key
from flashtask.cli.own_zoo import use_option, use_recipe_zoo
from flashtask.cli.recipe import Recipe, absolute, is_path, read_recipe, zoo_recipe
from flashtask.cli.recipe_checks import check_names, check_shape, check_values, require_whole
from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.files import missing_file
from flashtask.core.zoo import load_zoo, own_file_of
from flashtask.data.cached_inputs import brought_here, is_address
from flashtask.data.layout import (
    DEFAULT_VAL_SPLIT,
    existing_folder,
    has_annotations,
    is_shards,
    is_table_name,
    is_yolo_file,
    resolve_layout,
)
from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS

__all__ = ["fill_in", "requested_recipe", "require_data"]

#: the task of a recipe that names none
DEFAULT_TASK = "image_classification"
_FOLDERS = ("train_folder", "val_folder", "test_folder", "predict_folder")


def requested_recipe(data: str | None, params: Mapping[str, Any]) -> Recipe:
    """Put the recipe together and check all that needs no torch: shape, values, names.

    Args:
        data: the folder or recipe that the user named, if any.
        params: the options of `flashtask finetune`.

    Raises:
        UsageError: a key, value or name that cannot be meant.
        MissingInputError: a recipe or folder that is not there.
    """
    data, config = _data_and_config(data, params["config"])
    if data and not _is_hub_dataset(data) and not is_shards(data) and not (is_address(data) and is_table_name(data)):
        data = brought_here(data)
    if config and not os.path.isfile(config):
        raise missing_file(config)
    recipe = _base(config, params)
    require_whole(recipe)
    check_shape(recipe)
    if data and _is_hub_dataset(data):
        _expect(recipe, OF_THE_HUB)
    elif data and is_shards(data):
        _expect(recipe, OF_SHARDS)
    elif data and is_yolo_file(data):
        _expect(recipe, OF_YOLO)
    elif data and is_table_name(data):
        _expect_table(recipe, data)
    options = given(FINETUNE, params)
    if recipe.constructor == OF_THE_HUB:
        options = {_of_the_hub(key): said for key, said in options.items()}
    elif recipe.constructor != OF_TABLES:
        if data and recipe.constructor == CONSTRUCTOR and os.path.isfile(data):
            existing_folder(data, "DATA")  # says what to do with a file of its kind
        refuse_columns(flag for key, (flag, _) in options.items() if key.startswith(f"data.{OF_TABLES}."))
    for key, (flag, value) in options.items():
        recipe.set(key, absolute(value, Path.cwd()) if is_path(key) else value, flag)
    for text in params["set"]:
        recipe.set_from_text(text)
    check_shape(recipe)
    _call_distributed_by_its_name(recipe)
    if data:
        _put_data(recipe, data)
    _forget_nulls(recipe)
    use_recipe_zoo(recipe)
    check_values(recipe)
    check_names(recipe)
    check_source(recipe)
    return recipe


def _base(config: str | None, params: Mapping[str, Any]) -> Recipe:
    """What the options go over: a recipe file, a recipe of the zoo, or nothing."""
    name = params.get("recipe")
    if name is None:
        return read_recipe(Path(config)) if config else Recipe()
    if config:
        raise UsageError(f"two recipes: {config} and --recipe {name}", fix=f"flashtask finetune DATA --recipe {name}")
    use_option(params)
    return zoo_recipe(name)


def _call_distributed_by_its_name(recipe: Recipe) -> None:
    """`distributed` in a recipe's `trainer` is `Trainer(strategy=...)`, as `--distributed` is."""
    key, name = "trainer.distributed", "trainer.strategy"
    if recipe.get(key) is None:
        return
    source = recipe.source_of(key)
    if recipe.get(name) is not None and not recipe.source_of(name).startswith("--"):
        raise UsageError(
            f"{source}: `distributed` and `strategy` ({recipe.source_of(name)}) are the same setting", fix="drop one"
        )
    value = recipe.remove(key)
    if recipe.get(name) is None:
        recipe.set(name, value, source)


def _forget_nulls(recipe: Recipe) -> None:
    """A key that is an option and holds nothing (`max_steps: null`, or an empty value) says nothing."""
    for key in kinds_by_key():
        if recipe.get(recipe.here(key)) is None:
            recipe.remove(recipe.here(key))


def fill_in(recipe: Recipe) -> None:
    """Fill in what a recipe leaves out: the task that the data is for, and its defaults in the user's own zoo files.

    How long a run is and which strategy it has is left to the task: `Task.default_max_epochs`, `default_strategy`.

    Raises:
        UsageError: the data may be for several tasks.
    """
    if recipe.get("task") is None:
        recipe.set("task", _task_of_data(recipe), "default")
    # What a run begins from has a backbone and a head already.
    taken = (*OF_THE_WEIGHTS, *OF_THE_HEAD) if recipe.get("model.from") is not None else ()
    task = recipe.get("task")
    defaults = load_zoo().tasks[task].defaults if own_file_of("tasks", task) else {}
    for key, value in defaults.items():
        if recipe.get(f"model.{key}") is None and key not in taken:
            recipe.set(f"model.{key}", value, "default")


def _task_of_data(recipe: Recipe) -> str:
    """The task that data is for; class folders, and what a model is trained further on, are for the default one."""
    arguments = recipe.get(f"data.{recipe.constructor}")
    if not arguments or recipe.get("model.from") or recipe.get("model.multi_label"):
        return DEFAULT_TASK
    if recipe.constructor == CONSTRUCTOR and not has_annotations(arguments.get("train_folder")):
        return DEFAULT_TASK
    from flashtask.tasks.choosing import choose_task

    task, why = choose_task(recipe.constructor, arguments)
    if os.environ.get("RANK", "0") == "0":
        print(f"task: {task} ({why}); --task chooses another", file=sys.stderr)
    return task


def require_data(recipe: Recipe) -> None:
    """The recipe says where the training data is, and the folders or files are there.

    Raises:
        UsageError: it does not say.
        MissingInputError: a folder that is not there; with the nearest that is.
    """
    section = f"data.{recipe.constructor}"
    places = recipe.get(section) or {}
    needed = {
        CONSTRUCTOR: "train_folder",
        OF_TABLES: "train_file",
        OF_THE_HUB: "repository",
        OF_SHARDS: "shards_folder",
        OF_YOLO: "data_file",
    }.get(recipe.constructor)
    if not places or (needed and not places.get(needed)):
        raise UsageError("there is no data to train on", fix="flashtask finetune DATA, or train_folder in the recipe")
    for name in _FOLDERS:
        if places.get(name):
            existing_folder(places[name], name)
        file = places.get(name.replace("_folder", "_file"))
        if file and not is_address(file) and not os.path.isfile(file):
            raise missing_file(file)


def refuse_columns(flags: Iterable[str]) -> None:
    """Refuse options that name columns where the data is not a table.

    Raises:
        UsageError: there is such an option.
    """
    for flag in flags:
        raise UsageError(
            f"{flag} names a column, but DATA is not a table", fix=f"give a CSV file as DATA, or leave out {flag}"
        )


def _data_and_config(data: str | None, config: str | None) -> tuple[str | None, str | None]:
    """DATA may be a recipe itself, unless the file describes a data set of YOLO."""
    is_yaml = data is not None and data.lower().endswith((".yaml", ".yml"))
    if data is None or not is_yaml or os.path.isdir(data) or is_yolo_file(data):
        return data, config
    if config:
        raise UsageError(f"two recipes: {data} and --config {config}", fix=f"flashtask finetune --config {config}")
    return None, data


def _put_data(recipe: Recipe, data: str) -> None:
    """DATA replaces all folders or files of the recipe; flags and `--set` still win."""
    if _is_hub_dataset(data):
        recipe.set(f"data.{OF_THE_HUB}.repository", data, "DATA")
        return
    if is_shards(data):
        _put_shards(recipe, data)
        return
    if is_yolo_file(data):
        _put_yolo(recipe, data)
        return
    if is_table_name(data):
        _put_table(recipe, data)
        return
    if (other := recipe.constructor) != CONSTRUCTOR:
        raise UsageError(
            f"{recipe.source_of(f'data.{other}')}: DATA needs `{CONSTRUCTOR}`, but the recipe has `{other}`",
            fix=_below(other) or did_you_mean(other, [CONSTRUCTOR]) or f"leave out DATA {data!r}",
        )
    section = f"data.{CONSTRUCTOR}"
    layout = resolve_layout(existing_folder(data, "DATA"))
    for name in _FOLDERS:
        if not recipe.source_of(f"{section}.{name}").startswith("--"):
            recipe.remove(f"{section}.{name}")
    for name, folder in zip(_FOLDERS, (layout.train, layout.val, layout.test, layout.predict), strict=True):
        if folder is not None and recipe.get(f"{section}.{name}") is None:
            recipe.set(f"{section}.{name}", str(folder), "DATA")
    _split_off(recipe, section, "val_folder")


def _below(option: str) -> str:
    """What to write for an option of the constructors that was given as if it were one of them."""
    from flashtask.data.arguments import ImageOptions

    return f"it is data.{CONSTRUCTOR}.{option}" if option in ImageOptions.__annotations__ else ""


def _split_off(recipe: Recipe, section: str, *others: str) -> None:
    """Let a part of DATA validate, unless something else is said of validation: `--set` may also say null."""
    if recipe.get("folds") is not None:
        return
    said_by = recipe.sources.get(f"{section}.val_split", "")
    if all(recipe.get(f"{section}.{name}") is None for name in (*others, "val_split", "fold")) and said_by != "--set":
        recipe.set(f"{section}.val_split", DEFAULT_VAL_SPLIT, "DATA")


def _of_the_hub(key: str) -> str:
    """The key of an option for columns, in data from a repository of the hub."""
    return key.replace(f"data.{OF_TABLES}.", f"data.{OF_THE_HUB}.", 1)


def _is_hub_dataset(data: str) -> bool:
    """Whether DATA is a dataset repository; `hf://datasets/org/name/file.csv` is a file."""
    return data.startswith("hf://datasets/") and data.count("/") == 4


def _expect_table(recipe: Recipe, data: str) -> None:
    """DATA is a table.

    Raises:
        MissingInputError: there is no such file.
        UsageError: the recipe makes its data in another way.
    """
    if not is_address(data) and not os.path.isfile(data):
        raise missing_file(data)
    _expect(recipe, OF_TABLES)


def _expect(recipe: Recipe, constructor: str) -> None:
    """DATA is for another constructor than folders are: what the recipe says of these counts for it as well.

    Raises:
        UsageError: the recipe makes its data in another way.
    """
    before = recipe.constructor
    if before not in (CONSTRUCTOR, constructor):
        raise UsageError(f"{recipe.source_of(f'data.{before}')}: DATA needs `{constructor}`, the recipe has `{before}`")
    said = [
        (key.rpartition(".")[2], value, recipe.source_of(key)) for key, value in recipe.leaves() if key[:5] == "data."
    ]
    recipe.remove("data")
    recipe.set(f"data.{constructor}", {}, "DATA")
    for name, value, source in said:
        if name not in _FOLDERS and not name.endswith("_file"):
            recipe.set(f"data.{constructor}.{name}", value, source)


def _put_shards(recipe: Recipe, data: str) -> None:
    """DATA is a folder of shards; without validation images of their own, a part of the others validates."""
    from flashtask.data.shard_index import ShardIndex

    section = f"data.{OF_SHARDS}"
    index = ShardIndex.read(data)
    recipe.set(f"{section}.shards_folder", index.place, "DATA")
    has_val = any(shard.part == "val" for shard in index.shards)
    if not has_val:
        _split_off(recipe, section)


def _put_yolo(recipe: Recipe, data: str) -> None:
    """DATA describes a data set of YOLO; if it names no validation images, a part of the others validates."""
    from flashtask.data.box_files import read_yolo_file

    section = f"data.{OF_YOLO}"
    recipe.set(f"{section}.data_file", absolute(data, Path.cwd()), "DATA")
    if "val" not in read_yolo_file(data)[1]:
        _split_off(recipe, section)


def _put_table(recipe: Recipe, data: str) -> None:
    """DATA is the table to train on; `--set` may name others."""
    section = f"data.{OF_TABLES}"
    recipe.set(f"{section}.train_file", absolute(data, Path.cwd()), "DATA")
    _split_off(recipe, section, "val_file", "split_field")
