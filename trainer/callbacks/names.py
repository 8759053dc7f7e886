"""Callbacks by name, so that a recipe can hold them: `callbacks: [early_stopping]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.registry import Registry, check_options
from flashtask.trainer.averaging.stochastic_weight_averaging import StochasticWeightAveraging
from flashtask.trainer.averaging.weight_averaging import EMAWeightAveraging, WeightAveraging
from flashtask.trainer.callbacks.accumulation import GradientAccumulationScheduler
from flashtask.trainer.callbacks.base import Callback
from flashtask.trainer.callbacks.early_stopping import EarlyStopping
from flashtask.trainer.callbacks.model_summary import ModelSummary
from flashtask.trainer.callbacks.monitors import DeviceStatsMonitor, GradientNormMonitor, LearningRateMonitor
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.callbacks.timing import Timer
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint

__all__ = ["CALLBACKS", "make_callbacks", "recipe_of_callbacks"]

CALLBACKS: Registry[Any] = Registry("callback")

for _name, _class in {
    "device_stats_monitor": DeviceStatsMonitor,
    "early_stopping": EarlyStopping,
    "ema_weight_averaging": EMAWeightAveraging,
    "gradient_accumulation_scheduler": GradientAccumulationScheduler,
    "gradient_norm_monitor": GradientNormMonitor,
    "learning_rate_monitor": LearningRateMonitor,
    "model_checkpoint": ModelCheckpoint,
    "model_summary": ModelSummary,
    "progress_bar": ProgressBar,
    "stochastic_weight_averaging": StochasticWeightAveraging,
    "timer": Timer,
    "weight_averaging": WeightAveraging,
}.items():
    CALLBACKS.register(_name, _class, provider="flashtask")


def make_callbacks(given: Any) -> list[Callback]:
    """What `Trainer(callbacks=...)` means: one or a list of callbacks, names, or names with options.

    Args:
        given: a `Callback`, a name, a tuple `(name, {options})`, a dictionary `{name: {options}}`, or a list of these.

    Raises:
        UnknownNameError: no callback, or no option of one, has this name.
        UsageError: something else; the class in place of an instance is a common slip.
    """
    return [_named(*one) if isinstance(one, tuple) else one for item in _items(given) for one in _read(item)]


def recipe_of_callbacks(given: Any) -> list[dict[str, Any]] | None:
    """How a recipe writes `Trainer(callbacks=...)`: None if one of them is an object, which no file can hold."""
    read = [one for item in _items(given) for one in _read(item)]
    if any(isinstance(one, Callback) for one in read):
        return None
    return [{name: dict(options)} for name, options in read]


def _items(given: Any) -> list[Any]:
    if given is None:
        return []
    several = isinstance(given, list) or (isinstance(given, tuple) and not _is_named(given))
    return list(given) if several else [given]


def _is_named(item: Any) -> bool:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return False
    return isinstance(item[0], str) and isinstance(item[1], Mapping)


def _read(item: Any) -> list[Any]:
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


def _named(name: str, options: Mapping[str, Any]) -> Callback:
    kind = CALLBACKS.get(name)
    check_options(f"callback {name!r}", kind, options)
    made: Callback = kind(**options)
    return made
