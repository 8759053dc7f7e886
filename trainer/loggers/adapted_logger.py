"""Loggers with the methods of Lightning's, as the engine calls them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flashtask.trainer.loggers.logger import Logger

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["TakesMetrics", "as_called"]


@runtime_checkable
class TakesMetrics(Protocol):
    """What makes an object a logger: Lightning's method."""

    def log_metrics(self, metrics: Any, step: Any = None) -> Any:
        """Values by name, with the step that they belong to."""
        ...


class AdaptedLogger(Logger):
    """A logger that has Lightning's methods, as the engine calls it.

    Args:
        given: any object with `log_metrics(metrics, step)`; `log_hyperparams(params)`, `save()` and `finalize(status)`
            are called where it has them, and the engine's own methods in place of those where it has written these.
    """

    def __init__(self, given: Any) -> None:
        self.given = given

    @property
    def is_open(self) -> bool:
        """Whether it was started, and not closed since."""
        return self.given.is_open if isinstance(self.given, Logger) else self._is_open

    @property
    def needs_run_folder(self) -> bool:
        """Whether it can only log beside a fit."""
        return isinstance(self.given, Logger) and self.given.needs_run_folder

    def open_outside_of_a_fit(self) -> None:
        """Start, unless a run has started it."""
        if isinstance(self.given, Logger):
            self.given.open_outside_of_a_fit()
        self._mark(True)

    def attach(self, trainer: Trainer) -> None:
        """A run of a trainer begins."""
        super().attach(trainer)
        if isinstance(self.given, Logger):
            self.given.attach(trainer)

    def _mark(self, is_open: bool) -> None:
        super()._mark(is_open)
        if isinstance(self.given, Logger):
            self.given._mark(is_open)

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Its own `start`, if it has one of a flashtask logger."""
        if isinstance(self.given, Logger):
            self.given.start(folder, history, step)

    def start_again(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Its own `start_again`, if it has one of a flashtask logger."""
        if isinstance(self.given, Logger):
            self.given.start_again(folder, history, step)

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """`log_hyperparams(params)`."""
        self._call("log_hyperparameters", "log_hyperparams", (values,), values)

    def draw_together(self, chart: str) -> None:
        """Lightning has no such method."""
        if isinstance(self.given, Logger):
            self.given.draw_together(chart)

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """`log_metrics(metrics, step)`, with the epoch among the values."""
        self._call("log_step", "log_metrics", (values, step, epoch), {**values, "epoch": epoch}, step)

    def log_epoch(self, row: dict[str, float]) -> None:
        """`log_metrics(metrics, step)`."""
        values = {name: value for name, value in row.items() if name != "step"}
        self._call("log_epoch", "log_metrics", (row,), values, int(row["step"]))

    def log_evaluation(self, stage: str, values: dict[str, float], step: int, epoch: int) -> None:
        """`log_metrics(metrics, step)`, with the epoch among the values."""
        own = (stage, values, step, epoch)
        self._call("log_evaluation", "log_metrics", own, {**values, "epoch": epoch}, step)

    def flush(self) -> None:
        """`save()`."""
        self._call("flush", "save", ())

    def close(self, error: BaseException | None = None) -> None:
        """`finalize("success")` or `finalize("failed")`."""
        self._call("close", "finalize", (error,), "success" if error is None else "failed")

    def _call(self, name: str, lightnings: str, arguments: tuple[Any, ...], *lightnings_arguments: Any) -> None:
        """Call whichever of two methods a derived class has written; where both are of one class, the engine's."""
        if not isinstance(self.given, Logger) or _is_lightnings(type(self.given), name, lightnings):
            if callable(call := getattr(self.given, lightnings, None)):
                call(*lightnings_arguments)
        else:
            getattr(self.given, name)(*arguments)


def _is_lightnings(kind: type[Logger], name: str, lightnings: str) -> bool:
    """Whether a class has Lightning's method in place of the engine's: written in a class derived from the other's."""
    ours, theirs = (next(n for n, one in enumerate(kind.__mro__) if m in vars(one)) for m in (name, lightnings))
    return theirs < ours


def as_called(logger: Logger | TakesMetrics) -> Logger:
    """A logger as the engine calls it: itself, or an adapter if its class has methods of Lightning's."""
    if isinstance(logger, Logger) and not any(_is_lightnings(type(logger), *pair) for pair in _PAIRS.items()):
        return logger
    return AdaptedLogger(logger)


#: a method that the engine calls, and Lightning's in its place
_PAIRS = {"log_step": "log_metrics", "log_hyperparameters": "log_hyperparams", "flush": "save", "close": "finalize"}
