"""Mistyped names of arguments: told with the nearest right one, as every other name is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from flashtask.core.errors import UnknownNameError

__all__ = ["named_arguments"]

F = TypeVar("F", bound=Callable[..., Any])


def named_arguments(function: F) -> F:
    """Let a function or constructor answer a name that none of its arguments has with near matches.

    What a `**options` of its own takes is passed through.

    Raises:
        UnknownNameError: when it is called with such a name.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function
    known = [name for name in names if name != "self"]

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                raise UnknownNameError(f"argument of {_called(function, arguments)}", name, known)
        return function(*arguments, **options)

    return checked  # type: ignore[return-value]


def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """What a user wrote: the class of the object that is made, or the method."""
    if function.__name__ == "__init__" and arguments:
        return type(arguments[0]).__name__
    return f"{function.__name__}()"
