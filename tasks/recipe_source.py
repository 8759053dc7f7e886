"""What is written down of where a task's weights were read from: a commit on the hub, or a file and its digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS

__all__ = ["recipe_arguments", "recipe_keys"]


def recipe_keys(source: Mapping[str, str]) -> dict[str, str]:
    """The keys of a recipe's `model` section that name a source, pinned: `from`, and `from_sha256` for a file."""
    if "repository" in source:
        return {"from": f"hf://{source['repository']}@{source['commit']}"}
    return {"from": source["path"], "from_sha256": source["sha256"]}


def recipe_arguments(source: Mapping[str, str], arguments: Mapping[str, Any], *, has_new_head: bool) -> dict[str, Any]:
    """The `model` section of a recipe for a task that was read from somewhere: `from`, and how it is trained further.

    Args:
        source: the value of `pretrained_from`.
        arguments: of the task.
        has_new_head: the head is not the one that was read.
    """
    left_out = OF_THE_WEIGHTS if has_new_head else (*OF_THE_WEIGHTS, *OF_THE_HEAD)
    return {**recipe_keys(source), **{name: value for name, value in arguments.items() if name not in left_out}}
