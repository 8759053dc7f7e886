"""When validation comes in a fit, by `val_check_interval` and `check_val_every_n_epoch`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashtask.core.errors import UsageError

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["ValidationTimes"]


class ValidationTimes:
    """At which places of a fit validation comes.

    A place is a number of batches: of the epoch, or of the whole run where `check_val_every_n_epoch` is None.

    Args:
        run: whose validation it is.
    """

    def __init__(self, run: FitRun) -> None:
        self._run, self._trainer = run, run.trainer
        #: batches from one validation to the next; None: it comes where an epoch ends
        self.interval: int | None = None
        #: the place of the last one
        self.last = 0

    def set_interval(self, batches: int | None) -> None:
        """Find the interval for epochs of so many batches, None if the loader does not know.

        Raises:
            UsageError: a share of an epoch of unknown length, or more batches than an epoch has.
        """
        given = self._trainer.val_check_interval
        if isinstance(given, float):
            if given != 1.0 and batches is None:
                raise UsageError(
                    f"val_check_interval={given} needs a training loader with a length",
                    fix="a number of batches: val_check_interval=100",
                )
            self.interval = None if given == 1.0 or batches is None else max(1, int(batches * given))
            return
        if batches is not None and given > batches and self._are_in_epochs:
            raise UsageError(
                f"val_check_interval={given}: an epoch has {batches} batches, so validation would never come",
                fix=f"val_check_interval={given}, check_val_every_n_epoch=None counts them across epochs",
            )
        self.interval = given

    @property
    def _are_in_epochs(self) -> bool:
        return self._trainer.check_val_every_n_epoch is not None

    @property
    def here(self) -> int:
        """The place of the run."""
        return self._run.batch_idx if self._are_in_epochs else self._run.batches_seen

    @property
    def is_overdue(self) -> bool:
        """Whether a validation inside an epoch was to come since the last one."""
        return self.interval is not None and self.here // self.interval > self.last // self.interval

    @property
    def is_due(self) -> bool:
        """Whether validation comes here: it is overdue, or the epoch ends where its end is not known before."""
        run = self._run
        if not run.batch_idx or not self._is_in(run.epoch):
            return False
        if self.interval is None or self.is_overdue:
            return True
        return run.ends_unexpectedly and self.here > self.last

    def _is_in(self, epoch: int) -> bool:
        every: int | None = self._trainer.check_val_every_n_epoch
        return every is None or (epoch + 1) % every == 0 or self._run.solving is not None

    @property
    def was_in_epoch(self) -> bool:
        """Whether a validation of this epoch is over."""
        return self.last > self.here - self._run.batch_idx

    @property
    def next_in_epoch(self) -> float:
        """The batch of this epoch before which the next validation inside it comes; infinite without one."""
        if self.interval is None or not self._is_in(self._run.epoch):
            return math.inf
        return (self.last // self.interval + 1) * self.interval - (self.here - self._run.batch_idx)

    def note(self) -> None:
        """A validation is over, or a loop of the user's has left it out."""
        self.last = self.here

    def begin_epoch(self) -> None:
        """Places are counted from the start of an epoch again, unless they are those of the run."""
        self.last = 0 if self._are_in_epochs else self.last

    def go_on(self, last: int, batches_before: int) -> None:
        """Continue from a checkpoint.

        Args:
            last: the place of its last validation.
            batches_before: its batches of the epoch, of which this run may make another number of its own.
        """
        if self._are_in_epochs:
            last = last * self._run.batch_idx // batches_before if batches_before else 0
        self.last = last
