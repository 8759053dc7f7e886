"""SIGINT and SIGTERM end a run at the next step, after its place has been saved."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["ReceivedSignals", "RunInterruptedError", "stopping_at_the_next_step"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)
#: whether the wakeup descriptor of this process is one of `ReceivedSignals`
_is_installed = False


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

    before = {number: signal.signal(number, on_signal) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ReceivedSignals:
    """The signals that asked this process to stop, as the system delivered them, for another thread to look at.

    Python calls a handler between two instructions of the main thread, which may take half an hour to come where that
    waits for another process. Only its wakeup descriptor gets the number of a signal at once.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._reads: socket.socket | None = None
        self._before = -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around what a signal is to end. Outside the main thread or in another such block, nothing is done."""
        global _is_installed
        if threading.current_thread() is not threading.main_thread() or self._reads is not None:
            yield
            return
        self._numbers, (self._reads, writes) = [], socket.socketpair()
        for end in (self._reads, writes):
            end.setblocking(False)
        self._before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        _is_installed = True
        try:
            yield
        finally:
            _is_installed = False
            signal.set_wakeup_fd(self._before)
            reads, self._reads = self._reads, None
            reads.close()
            writes.close()

    def numbers(self) -> list[int]:
        """The signals since the block began, in their order. What another library listens for is passed on to it."""
        with suppress(OSError, AttributeError):  # there is no more, or the block has ended
            while received := self._reads.recv(256):  # type: ignore[union-attr]
                self._numbers += [number for number in received if number in _STOPPING]
                if self._before >= 0:
                    os.write(self._before, received)
        return self._numbers


def _leave_to_the_parent() -> None:
    """A forked data worker has the descriptor too, and a signal to it does not concern the process it came from."""
    global _is_installed
    if _is_installed:
        _is_installed = False
        with suppress(ValueError):  # forked from a thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_the_parent)
