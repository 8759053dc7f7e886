"""The hooks of a run, and who implements them.

The loop yields the names of hooks; for each one the callbacks' and the module's `on_<hook>` are called, in that
order. Only methods that are overridden are called: a hook that nothing implements costs one look-up.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import nearest

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = [
    "HOOKS",
    "LEVELS",
    "arguments_taken",
    "is_written",
    "listeners",
    "report_misspelled_data_methods",
    "report_misspelled_methods",
]

_EVALUATION = tuple(
    f"{word}_{hook}"
    for word in ("validation", "test", "predict")
    for hook in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
)

#: Every hook of the loop, in the order of a run.
HOOKS = (
    "fit_start",
    "sanity_check_start",
    "sanity_check_end",
    "train_start",
    "train_epoch_start",
    "train_batch_start",
    "before_backward",
    "after_backward",
    "before_optimizer_step",
    "before_zero_grad",
    "train_batch_end",
    *_EVALUATION,
    "validated",
    "train_epoch_end",
    "epoch_end",
    "train_end",
    "fit_end",
    "exception",
)

#: Methods of a module that get the outputs of a whole epoch; they have no `on_` before their names.
_OUTPUT_HOOKS = {
    "training_outputs": "training_epoch_end",
    "validation_outputs": "validation_epoch_end",
    "test_outputs": "test_epoch_end",
    "predict_outputs": "predict_epoch_end",
}

#: Hooks that are given one argument more than those of the base classes have, which older modules and callbacks take:
#: the number of the optimizer, and all predictions.
_WITH_MORE = ("on_before_optimizer_step", "on_predict_epoch_end")

#: Hooks that are called with something to change or by their own rules, not by the loop.
_OTHER_HOOKS = (
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
)

_STEP = (True, False)
_EPOCH = (False, True)

#: hook -> (on_step, on_epoch): how `log` keeps a value by default.
LEVELS: dict[str, tuple[bool, bool]] = {
    **dict.fromkeys(("train_start", "train_epoch_start", "train_epoch_end"), _EPOCH),
    **dict.fromkeys(("train_batch_start", "training_step", "training_step_end", "train_batch_end"), _STEP),
    **dict.fromkeys(("before_zero_grad", "before_backward", "after_backward", "before_optimizer_step"), _STEP),
    **{m: _EPOCH for m in _EVALUATION if not m.startswith("predict") and m not in ("validation_end", "test_end")},
    **dict.fromkeys(("validation_step", "validation_step_end", "validation_outputs"), _EPOCH),
    **dict.fromkeys(("test_step", "test_step_end", "test_outputs", "training_outputs"), _EPOCH),
}


def listeners(
    trainer: Trainer,
    module: Module,
    callbacks: Iterable[Any],
    module_base: type,
    callback_base: type,
    engine: Mapping[str, Callable[..., Any]],
) -> dict[str, tuple[Callable[..., Any], ...]]:
    """The hooks that are overridden: hook -> the bound methods.

    Callbacks come before the module; then the engine's own part, which writes down what they logged; and those that
    write checkpoints last, so that nothing changes behind them.

    A method named almost like a hook is reported with the name of that hook.
    """
    callbacks = list(callbacks)

    def call_of(callback: Any, name: str) -> Callable[..., Any]:
        return partial(_as_it_takes(callback, name, callback_base), trainer, module)

    for owner, base in [(module, module_base), *((callback, callback_base) for callback in callbacks)]:
        _report_misspelled(owner, base, trainer.older_hooks)
    report_misspelled_methods(module, module_base, _METHODS, depth=5)
    found: dict[str, tuple[Callable[..., Any], ...]] = {}
    for hook in HOOKS:
        name = f"on_{hook}"
        written = [one for one in callbacks if is_written(one, name, callback_base)]
        calls: list[Callable[..., Any]] = [call_of(one, name) for one in written if not one.comes_last]
        if is_written(module, name, module_base):
            calls.append(_as_it_takes(module, name, module_base))
        if hook in engine:
            calls.append(engine[hook])
        calls += [call_of(one, name) for one in written if one.comes_last]
        if calls:
            found[hook] = tuple(calls)
    for hook, name in _OUTPUT_HOOKS.items():
        if is_written(module, name, module_base):
            found[hook] = (getattr(module, name),)
    return found


def is_written(owner: object, name: str, base: type) -> bool:
    """Whether an object has a method of this name that is not the one of its base class, which does nothing."""
    method = getattr(owner, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, name, None)


def _as_it_takes(owner: object, name: str, base: type) -> Callable[..., Any]:
    """A hook as the loop calls it: one that takes fewer arguments than there are is given the first of them."""
    method: Callable[..., Any] = getattr(owner, name)
    most = len(inspect.signature(getattr(base, name)).parameters) - 1
    taken = arguments_taken(method)
    taken = most if taken is None else taken
    if taken == most and name not in _WITH_MORE:
        return method

    @wraps(method)
    def call(*arguments: Any) -> Any:
        return method(*arguments[:taken])

    call.__self__ = getattr(method, "__self__", None)  # type: ignore[attr-defined]
    return call


def arguments_taken(method: Callable[..., Any]) -> int | None:
    """How many arguments a function takes by position; None for any number."""
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


#: What a module may write beside hooks.
_METHODS = (
    "configure_optimizers",
    *(
        f"{word}_{method}"
        for word in ("training", "validation", "test", "predict")
        for method in ("step", "step_end", "epoch_end")
    ),
    *(f"{word}_dataloader" for word in ("train", "val", "test", "predict")),
)


#: What a data module may write.
_DATA_METHODS = (
    "prepare_data",
    "setup",
    "teardown",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    *(name for name in _METHODS if name.endswith("_dataloader")),
)


def report_misspelled_data_methods(data: object, base: type) -> None:
    """Methods of a data module that are named almost like one that a trainer calls are reported with that name."""
    report_misspelled_methods(data, base, _DATA_METHODS, depth=6)


def report_misspelled_methods(owner: object, base: type, methods: Iterable[str], *, depth: int) -> None:
    """A method that is named almost like one that a trainer calls, while that one is not written, is reported.

    Args:
        owner: a module or data module.
        base: its base class, whose own methods are known.
        methods: what a trainer calls.
        depth: frames from here to the caller whose line the warning names.
    """
    written = {name for kind in type(owner).__mro__ if kind not in base.__mro__ for name in vars(kind)}
    open_names = [name for name in methods if name not in written]
    for name in sorted(written - {*methods, *dir(base)}):
        close = get_close_matches(name, open_names, n=1, cutoff=0.9)
        if close and name.startswith("on_") == close[0].startswith("on_"):
            message = f"{type(owner).__name__}.{name} is never called by a trainer; did you mean {close[0]}?"
            warnings.warn(message, stacklevel=depth)


def _report_misspelled(owner: Any, base: type, older: Mapping[str, str]) -> None:
    known = {f"on_{hook}" for hook in HOOKS} | set(_OTHER_HOOKS)
    for name in dir(type(owner)):
        if name in older:
            message = f"{type(owner).__name__}.{name} is never called: did you mean {older[name]}?"
            warnings.warn(message, stacklevel=4)
        elif name.startswith("on_") and name not in known and not hasattr(base, name):
            close = nearest(name, known, most=1)
            if close:
                warnings.warn(
                    f"{type(owner).__name__}.{name} is never called: no hook has this name; did you mean {close[0]}?",
                    stacklevel=4,
                )
