"""What is written down of where a task's weights were read from: a commit on the hub, or a file and its digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS

__all__ = ["as_begun_from", "recipe_keys"]


def recipe_keys(origin: Mapping[str, str]) -> dict[str, str]:
    """The keys of a recipe's `model` section that mean an origin, pinned: `from`, and `from_sha256` for a file."""
    if "repository" in origin:
        return {"from": f"hf://{origin['repository']}@{origin['commit']}"}
    return {"from": origin["path"], "from_sha256": origin["sha256"]}


def as_begun_from(origin: Mapping[str, str], arguments: Mapping[str, Any], *, has_new_head: bool) -> dict[str, Any]:
    """The `model` section of a recipe for a task that was read from somewhere: `from`, and how it is trained further.

    Args:
        origin: what `pretrained_from` is.
        arguments: of the task.
        has_new_head: the head is not the one that was read.
    """
    left_out = OF_THE_WEIGHTS if has_new_head else (*OF_THE_WEIGHTS, *OF_THE_HEAD)
    return {**recipe_keys(origin), **{name: value for name, value in arguments.items() if name not in left_out}}
