"""The keys that a recipe leaves open: `learning_rate: {log: [1e-4, 1e-1]}`, `strategy: {choose: [a, b]}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashtask.cli.recipe import Recipe
from flashtask.core.errors import UsageError

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Dimension", "search_space"]

_KINDS = ("choose", "uniform", "log", "integer")
_FIX = "choose: [a, b], uniform: [0, 0.5], log: [1e-4, 1e-1] or integer: [1, 8]"


@dataclass(frozen=True)
class Dimension:
    """One key that is searched.

    Args:
        key: dotted, of the recipe.
        kind: `choose`, `uniform`, `log` or `integer`.
        values: what is chosen from, or the two ends.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: Trial) -> Any:
        """The value that a trial tries."""
        if self.kind == "choose":
            # Optuna chooses among numbers and texts; a value may be a list or a mapping.
            return self.values[int(trial.suggest_categorical(self.key, tuple(range(len(self.values)))))]
        low, high = self.values
        if self.kind == "integer":
            return trial.suggest_int(self.key, low, high)
        return trial.suggest_float(self.key, low, high, log=self.kind == "log")

    def value_of(self, parameter: Any) -> Any:
        """The value that a stored parameter stands for."""
        return self.values[int(parameter)] if self.kind == "choose" else parameter


def search_space(recipe: Recipe) -> list[Dimension]:
    """The keys of a recipe that are searched, in its order.

    Raises:
        UsageError: values that are no space, or none at all.
    """
    found = [
        _dimension(key, *next(iter(value.items())), recipe.source_of(key))
        for key, value in recipe.leaves()
        if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in _KINDS
    ]
    if not found:
        raise UsageError(
            "the recipe leaves nothing open", fix="model: {learning_rate: {log: [1e-4, 1e-1]}, ...} in the recipe"
        )
    return found


def _dimension(key: str, kind: str, given: Any, source: str) -> Dimension:
    values = tuple(given) if isinstance(given, list) else ()
    if kind == "choose":
        if len(values) < 2:
            raise UsageError(f"{source}: {key}: choose needs two values or more, not {given!r}", fix=_FIX)
        return Dimension(key, kind, values)
    try:
        ends = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        ends = ()
    is_right = len(ends) == 2 and all(map(math.isfinite, ends)) and ends[0] < ends[1]
    if not is_right or (kind == "log" and ends[0] <= 0) or (kind == "integer" and any(end % 1 for end in ends)):
        above = " above 0" if kind == "log" else ""
        raise UsageError(f"{source}: {key}: {kind} needs two numbers{above}, the smaller one first", fix=_FIX)
    return Dimension(key, kind, tuple(map(int, ends)) if kind == "integer" else ends)
