"""A loader that starts its processes again when one of them is killed."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from torch.utils.data import DataLoader

from flashtask.core.errors import ProcessLostError
from flashtask.core.failures import lost_worker
from flashtask.core.library_internals import let_workers_go

__all__ = ["Order", "RestartingLoader"]

#: How often in a row the processes may die before they have given the next batch.
_MOST_DEATHS = 3
_MOST_SHOWN = 8


class Order(Protocol):
    """An order of batches that can be entered anywhere: what `OrderedBatches` is."""

    epoch: int
    start: int
    frozen: bool

    def __iter__(self) -> Iterator[list[Any]]: ...

    def set_position(self, epoch: int, *, start: int = 0, frozen: bool = False) -> None:
        """Where the next iterator begins: the epoch, and the sample in it."""

    def share(self, start: int) -> tuple[int, int]:
        """Samples of the batch that begins at a sample: those of this process, and of all of them."""


class RestartingLoader(DataLoader[Any]):
    """A DataLoader over an `Order`: where a process that loads data is killed, others go on with the same batches.

    Which samples a batch has, and their seeds, follow from its place in the epoch. The last of three tries is made by
    one process that loads one batch ahead: if it dies too, the batch that cannot be loaded is known.
    """

    #: called with a sentence for each death
    say: Callable[[str], Any] = staticmethod(warnings.warn)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order: Order = self.batch_sampler  # type: ignore[assignment]
        place = order.epoch, order.start, order.frozen
        return self._go_through(self._begin(order, *place), order, *place) if self.num_workers else super().__iter__()

    def _begin(self, order: Order, epoch: int, start: int, frozen: bool) -> Any:
        """An iterator from a place in the epoch on; it asks its processes for the first batches at once."""
        with _at(order, epoch, start, frozen):
            try:
                return super().__iter__()
            except Exception as error:
                if lost_worker(error) is None:
                    raise
            let_workers_go(self)  # persistent ones, which died since they were last asked for something
            return super().__iter__()

    def _go_through(self, batches: Any, order: Order, epoch: int, place: int, frozen: bool) -> Iterator[Any]:
        deaths, processes = 0, (self.num_workers, self.prefetch_factor)
        _deaths.listen()
        try:
            while True:
                try:
                    batch = _deaths.next(batches)
                except StopIteration:
                    return
                except Exception as error:
                    lost = lost_worker(error)
                    if lost is None:
                        raise
                    deaths += 1
                    if deaths == _MOST_DEATHS:
                        with _at(order, epoch, place, frozen):
                            raise _given_up(lost, epoch, next(iter(order))) from error
                else:
                    deaths = 0
                    place += order.share(place)[1]
                    yield batch
                    continue
                let_workers_go(self, batches)
                self.say(f"{lost.what}; others are started ({deaths} of {_MOST_DEATHS - 1} times) for the same batch")
                if deaths == _MOST_DEATHS - 1:
                    self.num_workers, self.prefetch_factor = 1, 1
                batches = self._begin(order, epoch, place, frozen)
        finally:
            if (self.num_workers, self.prefetch_factor) != processes:
                self.num_workers, self.prefetch_factor = processes
                let_workers_go(self)


@contextmanager
def _at(order: Order, epoch: int, start: int, frozen: bool) -> Iterator[None]:
    """Inside, an order begins at a place; after it, where it was set to before."""
    before = order.epoch, order.start, order.frozen
    order.set_position(epoch, start=start, frozen=frozen)
    try:
        yield
    finally:
        order.set_position(before[0], start=before[1], frozen=before[2])


def _given_up(lost: ProcessLostError, epoch: int, keys: list[Any]) -> ProcessLostError:
    samples = [getattr(key, "index", key) for key in keys]
    shown = ", ".join(map(str, samples[:_MOST_SHOWN])) + (", ..." if len(samples) > _MOST_SHOWN else "")
    return ProcessLostError(
        f"{lost.what}, and so did those that were started in its place, at the samples {shown} of epoch {epoch}",
        why=lost.why or "one of these samples may take too much memory to load",
        fix=lost.fix,
    )


class _Deaths:
    """Lets the death of a process be an error where a batch is waited for, and never in the middle of a step.

    torch raises it in the handler of SIGCHLD, which Python runs between any two instructions of the main thread. A
    loader of the user's own misses nothing: while it waits it looks every 5 s whether its processes are there.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._is_waiting = self._is_due = False

    def listen(self) -> None:
        """A loader has started processes, and with them torch's handler."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._on_death:
            self._handle = handler
            signal.signal(signal.SIGCHLD, self._on_death)

    def _on_death(self, number: int, frame: FrameType | None) -> None:
        if self._is_waiting:
            self._handle(number, frame)
        else:
            self._is_due = True

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the error that torch raises for a process that has died since the last one."""
        self._is_waiting = True
        try:
            if self._is_due:
                self._is_due = False
                self._handle(signal.SIGCHLD, None)
            return next(batches)
        finally:
            self._is_waiting = False


_deaths = _Deaths()
