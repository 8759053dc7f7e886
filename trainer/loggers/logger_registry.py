"""Loggers by name, and what `Trainer(logger=...)` means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.registry import LazySource, Registry
from flashtask.trainer.by_name import Named, make_parts
from flashtask.trainer.loggers.adapted_logger import TakesMetrics
from flashtask.trainer.loggers.csv_logger import CSVLogger
from flashtask.trainer.loggers.logger import Logger
from flashtask.trainer.loggers.tensorboard_logger import TensorBoardLogger, is_available

__all__ = ["LOGGERS", "LoggerLike", "make_loggers"]

#: What `Trainer(logger=...)` takes, alone or in a list.
LoggerLike = bool | Logger | TakesMetrics | Named

LOGGERS: Registry[type[Logger]] = Registry("logger")
LOGGERS.add_source(
    LazySource(
        "logger",
        "flashtask.trainer",
        {
            "csv": ("loggers.csv_logger:CSVLogger", "metrics.csv and steps.csv in the run folder, or in another one"),
            "tensorboard": (
                "loggers.tensorboard_logger:TensorBoardLogger",
                "TensorBoard's event files in the run folder",
            ),
            "wandb": ("loggers.wandb_logger:WandbLogger", "Weights & Biases, online or offline"),
            "mlflow": ("loggers.mlflow_logger:MLFlowLogger", "MLflow, on a server or in the run folder"),
        },
    )
)


def make_loggers(given: LoggerLike | Sequence[Logger | TakesMetrics | Named] | None) -> list[Logger | TakesMetrics]:
    """The loggers that `Trainer(logger=...)` means; the run folder's CSV log is among them, unless it is False.

    Args:
        given: True or None (the CSV log, and TensorBoard's where it is installed), False, a name, a name with options
            (`("wandb", {"offline": True})` or `{"wandb": {"offline": True}}`), a `Logger`, any object with Lightning's
            `log_metrics(metrics, step)`, or a list of these.

    Raises:
        UnknownNameError: no logger has this name, or the logger no such option.
        UsageError: something else was given, a class in place of an object, one logger twice, or a logger whose
            library is not installed.
    """
    if given is False:
        return []
    if given is True or given is None:
        return [CSVLogger(), *([TensorBoardLogger()] if is_available() else [])]
    needed = UsageError(
        f"Trainer(logger={given!r}): True, False, a Logger, a name, or a list of loggers and names is needed",
        fix='logger="wandb", logger=("wandb", {"offline": True}), or class Mine(flashtask.Logger)',
    )
    made: list[Any] = make_parts(given, LOGGERS, TakesMetrics, "logger", needed)
    csv_logs = sum(isinstance(one, CSVLogger) and one.needs_run_folder for one in made)
    names = [one for one in given if isinstance(one, str)] if isinstance(given, (list, tuple)) else []
    if csv_logs > 1 or len({id(one) for one in made}) < len(made) or len({*names}) < len(names):
        raise UsageError(
            f"Trainer(logger=...): one logger is given twice in {', '.join(type(one).__name__ for one in made)}",
            why="it would write each value twice",
            fix="name it once; the CSV log need not be named",
        )
    return made if csv_logs else [CSVLogger(), *made]
