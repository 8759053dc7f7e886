"""A choice by name, with or without arguments: the forms in which Python and recipes give it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flashtask.core.errors import UnknownNameError

__all__ = ["Choice", "check_arguments", "name_and_arguments"]

#: `"focal"`, `("focal", {"gamma": 3})` or `{"focal": {"gamma": 3}}`.
Choice = str | tuple[str, Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


def name_and_arguments(given: object) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments of a choice; None for anything that is not one.

    Args:
        given: a name; a name and a mapping in a tuple or list, as recipes hold it; or a mapping with one name.
    """
    if isinstance(given, str):
        return given, {}
    if isinstance(given, (tuple, list)) and len(given) == 2:
        name, arguments = given
    elif isinstance(given, Mapping) and len(given) == 1:
        ((name, arguments),) = given.items()
        arguments = {} if arguments is None else arguments
    else:
        return None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    return name, dict(arguments)


def check_arguments(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse an argument that is not one of a function's keyword-only parameters.

    Args:
        what: what messages call it: `loss 'focal'`.
        function: that the arguments are for.
        arguments: by name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in arguments:
        if name not in known:
            error = UnknownNameError(f"argument of the {what}", name, known)
            if not known:
                error.fix = f"leave it out: the {what} takes no arguments"
            raise error
