"""`save_hyperparameters()`: what a module or data module was made with, kept for logs and checkpoints."""

from __future__ import annotations

import argparse
import copy
import inspect
import types
import warnings
from collections.abc import Mapping
from typing import Any

from flashtask.core.errors import UsageError

__all__ = ["Hyperparameters", "HyperparametersMixin", "hyperparameters_content", "plain_hyperparameters"]


class Hyperparameters(dict[str, Any]):
    """A dictionary whose keys are attributes too: `hparams["lr"]` and `hparams.lr` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {name!r}; there are: {', '.join(self) or 'none'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class HyperparametersMixin:
    """Adds `save_hyperparameters` and `hparams`."""

    _hparams: Any = None
    #: the constructor argument that the whole collection was given as (`Net(hp)`), or None
    _hparams_name: str | None = None

    @property
    def hparams(self) -> Any:
        """The saved hyper-parameters: a dictionary with attributes, or the OmegaConf object that was saved."""
        if self._hparams is None:
            object.__setattr__(self, "_hparams", Hyperparameters())
        return self._hparams

    def save_hyperparameters(self, *args: Any, ignore: Any = (), logger: bool = True) -> None:
        """Keep the arguments of `__init__` (all of them, or those named), or one dict, Namespace or OmegaConf object.

        Args:
            args: names of arguments, or one object that holds the hyper-parameters; nothing means every argument.
            ignore: a name or names to leave out.
            logger: whether loggers show them.

        Raises:
            UsageError: a name that `__init__` does not have.
        """
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        frame = inspect.currentframe()
        arguments = _init_arguments(frame.f_back if frame else None, self)
        object.__setattr__(self, "_log_hyperparameters", logger)
        if len(args) == 1 and not isinstance(args[0], str):
            held, name = args[0], next((n for n, v in arguments.items() if v is args[0]), None)
            object.__setattr__(self, "_hparams_name", name)
            object.__setattr__(self, "_hparams", _as_collection(held, ignored))
            return
        wanted = list(args) or list(arguments)
        for name in wanted:
            if name not in arguments:
                raise UsageError(f"save_hyperparameters({name!r}): __init__ has no argument of that name")
        self.hparams.update({n: copy.copy(arguments[n]) for n in wanted if n not in ignored})


def _as_collection(held: Any, ignored: set[str]) -> Any:
    if isinstance(held, argparse.Namespace):
        held = vars(held)
    if isinstance(held, Mapping) and not type(held).__module__.startswith("omegaconf"):
        return Hyperparameters({k: v for k, v in held.items() if k not in ignored})
    if type(held).__module__.startswith("omegaconf"):
        return copy.deepcopy(held)
    raise UsageError(
        f"save_hyperparameters takes names, or a dict, Namespace or OmegaConf object, not {type(held).__name__}"
    )


def _init_arguments(frame: types.FrameType | None, owner: object) -> dict[str, Any]:
    """The arguments of every `__init__` of `owner` on the stack: those of subclasses win over their parents'."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        info = inspect.getargvalues(frame)
        if not info.args or info.locals.get(info.args[0]) is not owner:
            break
        values = {name: info.locals[name] for name in info.args[1:] if name in info.locals}
        if info.keywords:
            values.update(info.locals.get(info.keywords, {}))
        found.update({k: v for k, v in values.items() if k != "__class__"})
        frame = frame.f_back
    if not found and frame is None:  # pragma: no cover - only without a Python stack
        warnings.warn("save_hyperparameters was called outside __init__", stacklevel=3)
    return found


def hyperparameters_content(module: Any) -> dict[str, Any]:
    """What a checkpoint holds about how a module was made."""
    return {"hyper_parameters": plain_hyperparameters(module)}


def plain_hyperparameters(module: Any) -> dict[str, Any]:
    """Hyper-parameters in a form that JSON holds; what it cannot hold becomes `{"not_saved": "<type>"}`."""
    hparams = module.hparams
    return {str(key): _plain(value) for key, value in dict(hparams).items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        plain = [_plain(part) for part in value]
        return tuple(plain) if isinstance(value, tuple) else plain
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return {"not_saved": type(value).__name__}
