"""When a `ModelCheckpoint` looks at a run, and whether an error left the run where it can be continued."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from flashtask.trainer.callbacks.timing import read_duration

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["Frequency", "RestingPlace", "is_last_epoch"]


class Frequency:
    """How often a run is looked at: each of these by itself, and after every epoch if none is given.

    Args:
        steps: after every so many optimizer steps.
        interval: at the first step after so much time, as `read_duration` takes it.
        epochs: after every so many epochs.
        only_validated: of the epochs, only those that were validated.

    Raises:
        UsageError: the interval is no length of time.
    """

    def __init__(self, steps: int | None, interval: Any, epochs: int | None, only_validated: bool) -> None:
        self.steps, self.interval = steps, None if interval is None else read_duration(interval)
        self.epochs = 1 if (steps, interval, epochs) == (None, None, None) else epochs
        self._only_validated = only_validated
        self._looked_at = 0.0

    def __str__(self) -> str:
        given = {"every_n_train_steps": self.steps, "train_time_interval": self.interval, "every_n_epochs": self.epochs}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    def start(self) -> None:
        """The clock of the interval starts."""
        self._looked_at = time.monotonic()

    def is_due_after_step(self, run: FitRun) -> bool:
        """Whether the step that was just taken is looked at."""
        by_time = self.interval is not None and time.monotonic() - self._looked_at >= self.interval.total_seconds()
        if by_time:
            self.start()
        return by_time or (self.steps is not None and run.global_step % self.steps == 0)

    def is_due_after_epoch(self, run: FitRun) -> bool:
        """Whether the epoch that is over is looked at."""
        if self._only_validated and (run.validation is None or not run.validates):
            return False
        return self.epochs is not None and (run.epoch + 1) % self.epochs == 0


class RestingPlace:
    """Where a run last stood between two steps, with everybody told: what an error behind it does not touch."""

    def __init__(self) -> None:
        self._place: tuple[int, int, int] | None = None

    def note(self, run: FitRun) -> None:
        """The run stands here, unless it is in the middle of an accumulation group."""
        if not run.group_is_open:
            self._place = self._place_of(run)

    def leave(self) -> None:
        """Something begins that must not be done by half."""
        self._place = None

    def is_here(self, run: FitRun) -> bool:
        """Whether the run has not gone on since; at the end of an epoch some may have been told of it, others not."""
        is_between = not run.group_is_open and run.moment != "train_epoch_end"
        return is_between and self._place == self._place_of(run)

    def _place_of(self, run: FitRun) -> tuple[int, int, int]:
        return run.epoch, run.batch_idx, run.global_step


def is_last_epoch(run: FitRun) -> bool:
    """Whether no epoch follows the one that is over."""
    stops = run.is_leaving or (bool(run.stop_reason) and run.may_stop_after(run.epoch))
    return stops or run.out_of_steps or run.epoch + 1 >= (run.max_epochs or math.inf)
