"""`LambdaCallback`: a callback from plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.base import Callback

__all__ = ["LambdaCallback"]

#: every hook that `Callback` has
_HOOKS = tuple(
    name
    for name, member in vars(Callback).items()
    if inspect.isfunction(member) and (name.startswith("on_") or name in ("setup", "teardown"))
)


class LambdaCallback(Callback):
    """Calls functions at moments of a run: `LambdaCallback(on_train_start=lambda trainer, module: print("go"))`.

    Args:
        functions: for each hook of `Callback` by its name, a function with the hook's arguments.

    Raises:
        UnknownNameError: `Callback` has no hook of this name.
        UsageError: something that cannot be called.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            if name not in _HOOKS:
                raise UnknownNameError("hook of a callback", name, _HOOKS)
            if not callable(function):
                raise UsageError(
                    f"LambdaCallback({name}={function!r}): a function is needed",
                    fix=f"{name}=lambda {', '.join(_arguments(name))}: ...",
                )
            setattr(self, name, function)


def _arguments(name: str) -> list[str]:
    _, *arguments = inspect.signature(getattr(Callback, name)).parameters
    return arguments
