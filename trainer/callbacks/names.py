"""Callbacks by name, so that a recipe can hold them: `callbacks: [early_stopping]`."""

from __future__ import annotations

from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.registry import Registry
from flashtask.trainer.by_name import make_parts
from flashtask.trainer.callbacks.accumulation import GradientAccumulationScheduler
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.callbacks.early_stopping import EarlyStopping
from flashtask.trainer.callbacks.model_summary import ModelSummary
from flashtask.trainer.callbacks.monitors import DeviceStatsMonitor, GradientNormMonitor, LearningRateMonitor
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from flashtask.trainer.callbacks.timing import Timer
from flashtask.trainer.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint

__all__ = ["CALLBACKS", "make_callbacks"]

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
    needed = UsageError(
        f"Trainer(callbacks={given!r}): a Callback, a name or a list of them is needed",
        fix='class Mine(flashtask.Callback), or callbacks=["early_stopping"]',
    )
    return make_parts(given, CALLBACKS, Callback, "callbacks", needed)
