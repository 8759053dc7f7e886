"""Phases from what a recipe holds; an error names the key that is wrong by its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning.phase import UNTIL, Phase
from flashtask.trainer.finetuning.phases import Finetuning, Stage
from flashtask.trainer.finetuning.selection import check_keys

__all__ = ["read_mapping"]

_KEYS = [*(field.name for field in fields(Phase)), "until"]
_EXAMPLE = "phases: [{train: head, epochs: 2}, {train: all}]"


def read_mapping(value: Mapping[str, Any]) -> Finetuning:
    """The strategy that a mapping with `phases`, or with `stages`, means.

    Raises:
        UsageError: a key or value that cannot be meant, with its path.
    """
    known = ["phases", "stages"]
    check_keys(value, known, "strategy")
    if len(value) != 1:
        raise UsageError("strategy: `phases` is needed", fix=_EXAMPLE)
    ((key, items),) = value.items()
    if isinstance(items, str) or not isinstance(items, Sequence) or not items:
        raise UsageError(f"strategy.{key}: a list is needed, not {items!r}", fix=_EXAMPLE)
    if key == "stages":
        return Finetuning([_read_stage(item, f"strategy.stages[{n}]") for n, item in enumerate(items)])
    return Finetuning([_read_phase(item, f"strategy.phases[{n}]") for n, item in enumerate(items)])


def _read_stage(item: Any, where: str) -> Stage:
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise UsageError(f"{where}: an epoch and a number of layers are needed, not {item!r}", fix="stages: [[0, 0]]")
    return Stage(*item)


def _read_phase(item: Any, where: str) -> Phase:
    if isinstance(item, Phase):
        return item
    if not isinstance(item, Mapping):
        raise UsageError(f"{where}: a phase has keys of its own, and this is {item!r}", fix=_EXAMPLE)
    check_keys(item, _KEYS, where)
    if "train" not in item:
        raise UsageError(f"{where}: it does not say what trains", fix="train: head")
    arguments = {key: value for key, value in item.items() if key != "until" and value is not None}
    until = item.get("until")
    inside: dict[str, str] = {}
    if until is not None:
        if not isinstance(until, Mapping):
            raise UsageError(f"{where}.until: keys of its own are needed, not {until!r}", fix="until: {epoch: 5}")
        check_keys(until, [*UNTIL], f"{where}.until")
        if twice := [key for key in until if key in arguments]:
            raise UsageError(f"{where}.until.{twice[0]}: it stands in the phase already", fix="drop one of them")
        arguments |= until
        inside = dict.fromkeys(until, "until.")
    try:
        return Phase(**arguments)
    except UsageError as error:
        first = error.what.split(":")[0].split(".")[0].split("[")[0]
        error.what = f"{where}.{inside.get(first, '')}{error.what}"
        raise
