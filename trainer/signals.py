"""SIGINT and SIGTERM end a run at the next step, after its place has been saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["RunInterruptedError", "stopping_at_the_next_step"]


class RunInterruptedError(Exception):
    """A signal asked the run to stop; its place in the epoch has been kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextmanager
def stopping_at_the_next_step(run: FitRun) -> Iterator[None]:
    """Interrupt the run when a signal asks to stop; a second one stops at once.

    Outside the main thread nothing is installed: Python allows handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if run.interrupted_by is not None:
            raise SystemExit(143) if number == signal.SIGTERM else KeyboardInterrupt
        run.interrupt(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
