"""Callbacks by name, so that a recipe can hold them: `callbacks: [early_stopping]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.registry import LazySource, Registry
from flashtask.trainer.by_name import Named, make_parts
from flashtask.trainer.callbacks.callback import Callback

__all__ = ["CALLBACKS", "make_callbacks"]

CALLBACKS: Registry[Any] = Registry("callback")
# By name alone: the record of a run reads this registry, and a checkpoint, which ModelCheckpoint writes, the record.
CALLBACKS.add_source(
    LazySource(
        "callback",
        "flashtask.trainer",
        {
            "device_stats_monitor": ("callbacks.monitors:DeviceStatsMonitor", "logs memory and load of the device"),
            "early_stopping": ("callbacks.early_stopping:EarlyStopping", "ends a fit when a metric stops improving"),
            "ema_weight_averaging": (
                "callbacks.weight_averaging:EMAWeightAveraging",
                "an exponential moving average of the weights",
            ),
            "gradient_accumulation_scheduler": (
                "callbacks.accumulation:GradientAccumulationScheduler",
                "changes the number of batches per optimizer step by epoch",
            ),
            "gradient_norm_monitor": ("callbacks.monitors:GradientNormMonitor", "logs the norm of all gradients"),
            "learning_rate_monitor": (
                "callbacks.monitors:LearningRateMonitor",
                "logs the learning rates of all optimizers",
            ),
            "model_checkpoint": (
                "checkpoints.model_checkpoint:ModelCheckpoint",
                "writes last.ckpt and the best checkpoints",
            ),
            "model_summary": ("callbacks.model_summary:ModelSummary", "prints the layers, and which of them train"),
            "progress_bar": ("callbacks.progress:ProgressBar", "a line that shows epoch, batches, time and metrics"),
            "rich_progress_bar": ("callbacks.progress_libraries:RichProgressBar", "a progress bar of rich"),
            "stochastic_weight_averaging": (
                "callbacks.stochastic_weight_averaging:StochasticWeightAveraging",
                "averages the weights at the ends of the last epochs",
            ),
            "timer": ("callbacks.timing:Timer", "measures the parts of a run, and ends it when its time is up"),
            "tqdm_progress_bar": ("callbacks.progress_libraries:TQDMProgressBar", "a progress bar of tqdm"),
            "weight_averaging": (
                "callbacks.weight_averaging:WeightAveraging",
                "averages the weights over optimizer steps",
            ),
        },
    )
)


def make_callbacks(given: Callback | Named | Sequence[Callback | Named] | None) -> list[Callback]:
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
