"""`flashtask tune`: find a batch size and a learning rate, and only tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from flashtask.cli.kinds import AUTO
from flashtask.cli.parts import SEARCHED, build_parts
from flashtask.cli.processes import are_several
from flashtask.cli.request import requested_recipe, require_data
from flashtask.core.errors import UsageError

__all__ = ["tune"]


def tune(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the folder or recipe that the user named, if any.
        params: the options of the command.
    """
    recipe = requested_recipe(data, params)
    for key in map(recipe.here, SEARCHED.values()):
        if recipe.get(key) is None:
            recipe.set(key, AUTO, "default")
    sought = [name for name, key in SEARCHED.items() if recipe.get(recipe.here(key)) == AUTO]
    if not sought:
        raise UsageError(
            "there is nothing to search for",
            why="the batch size and the learning rate are both set",
            fix="--batch-size auto, or --lr auto",
        )
    if params["picture"] and "learning_rate" not in sought:
        raise UsageError(
            "--picture plots the search for a learning rate, but the learning rate is set", fix="--lr auto"
        )
    if are_several(recipe.get("trainer", {})):
        raise UsageError(
            "a search runs in one process",
            why="its result is valid for the batches of one process",
            fix="leave out --devices, --num-nodes and --distributed, and start it without torchrun or srun",
        )
    require_data(recipe)
    found = build_parts(recipe).tune(**_pictured(params["picture"]))
    click.echo(json.dumps(_as_json(found)) if params["json"] else str(found))


def _pictured(picture: str | None) -> dict[str, Any]:
    return {"learning_rate": {"picture": picture}} if picture else {}


def _as_json(found: Any) -> dict[str, Any]:
    """One flat object; what was not searched for is not in it."""
    values: dict[str, Any] = {}
    if found.batch_size is not None:
        values |= {"batch_size": found.batch_size.batch_size, "batch_size_bound": found.batch_size.bound}
    if found.learning_rate is not None:
        values |= {"learning_rate": found.learning_rate.suggestion, "learning_rate_clear": found.learning_rate.is_clear}
    return values
