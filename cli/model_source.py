"""What a run begins from: `--from`, the recipe's `model.from`, in place of a backbone and a new head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.cli.recipe import Recipe
from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.hub.address import HubAddress, is_hub_address
from flashtask.core.model_path import model_path
from flashtask.tasks.arguments import OF_THE_WEIGHTS

__all__ = ["SOURCE_KEYS", "build_model", "check_source", "is_same_source"]

#: The keys of a recipe's `model` section that name it.
SOURCE_KEYS = ("from", "from_sha256")


def check_source(recipe: Recipe) -> None:
    """What the run begins from is there, as far as that can be seen without asking the hub, and is not contradicted.

    Raises:
        UsageError: the backbone is named too, or an address of the hub is none.
        MissingInputError: there is no such file or folder.
    """
    source = recipe.get("model.from")
    if source is None:
        if recipe.get("model.from_sha256") is not None:
            raise UsageError(f"{recipe.source_of('model.from_sha256')}: from_sha256 is set, but from is not")
        return
    if not isinstance(source, str):
        raise UsageError(f"{recipe.source_of('model.from')}: model.from must be a text, not {source!r}")
    for name in OF_THE_WEIGHTS:
        if recipe.get(f"model.{name}") is not None:
            where = recipe.source_of(f"model.{name}")
            raise UsageError(
                f"{where}: {name} is part of the model that the run starts from ({source})",
                fix=f"leave out {where if where.startswith('--') else name}, or --from",
            )
    if is_hub_address(source):
        HubAddress.parse(source)
    elif "://" not in source:
        try:
            # The file and not the run folder, so that `--resume` finds the source that recipe.yaml holds.
            recipe.set("model.from", str(model_path(source)), recipe.source_of("model.from"))
        except MissingInputError as error:
            error.fix = error.fix or "for a repository on the hub, write hf://org/name"
            raise


def build_model(task_class: Any, arguments: Mapping[str, Any]) -> Any:
    """The task that the `model` section of a recipe describes: built, or read from what it begins from.

    Args:
        task_class: of the recipe's task.
        arguments: the section.
    """
    if arguments.get("from") is None:
        return task_class(**arguments)
    from flashtask.tasks.pretrained.source import find_source
    from flashtask.tasks.stored_task import pretrained_task

    source = find_source(arguments["from"], sha256=arguments.get("from_sha256") or "")
    return pretrained_task(task_class, source, {k: v for k, v in arguments.items() if k not in SOURCE_KEYS})


def is_same_source(run: Any, asked: Any) -> bool:
    """Whether what is asked for now is what a run began from: that names a commit, where a branch may be asked for."""
    if not (isinstance(run, str) and isinstance(asked, str) and is_hub_address(run) and is_hub_address(asked)):
        return bool(run == asked)
    ours, theirs = HubAddress.parse(run), HubAddress.parse(asked)
    return ours.repository == theirs.repository and (not theirs.is_pinned or ours.revision == theirs.revision)
