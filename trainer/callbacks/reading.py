"""What a user wrote for callbacks: objects, names, names with options. Nothing is made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.base import Callback

__all__ = ["items_of", "read_item", "recipe_of_callbacks"]


def recipe_of_callbacks(given: Any) -> list[dict[str, Any]] | None:
    """How a recipe writes `Trainer(callbacks=...)`: None if one of them is an object, which no file can hold."""
    read = [one for item in items_of(given) for one in read_item(item)]
    if any(isinstance(one, Callback) for one in read):
        return None
    return [{name: dict(options)} for name, options in read]


def items_of(given: Any) -> list[Any]:
    """One or several callbacks as a list."""
    if given is None:
        return []
    several = isinstance(given, list) or (isinstance(given, tuple) and not _is_named(given))
    return list(given) if several else [given]


def _is_named(item: Any) -> bool:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return False
    return isinstance(item[0], str) and isinstance(item[1], Mapping)


def read_item(item: Any) -> list[Any]:
    """A callback, or names with their options."""
    if isinstance(item, Callback):
        return [item]
    if isinstance(item, str):
        return [(item, {})]
    if _is_named(item):
        return [(item[0], item[1])]
    if isinstance(item, Mapping):
        return [(name, options or {}) for name, options in item.items()]
    if isinstance(item, type) and issubclass(item, Callback):
        raise UsageError(f"Trainer(callbacks=...): {item.__name__} is a class", fix=f"callbacks=[{item.__name__}()]")
    raise UsageError(
        f"Trainer(callbacks={item!r}): a Callback, a name or a list of them is needed",
        fix='class Mine(flashtask.Callback), or callbacks=["early_stopping"]',
    )
