"""The same model in every process, each with its share of a batch: `ddp`, `ddp_spawn`, `ddp_find_unused_parameters`."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from flashtask.core.errors import ProcessLostError, UnknownNameError, UsageError
from flashtask.trainer.distribution.agreement import facts_at_start, require_the_same
from flashtask.trainer.distribution.environment import ProcessInfo, process_info
from flashtask.trainer.distribution.group import (
    abandon_group,
    agree_on,
    close_group,
    cores_of,
    gathered,
    is_of_the_group,
    is_open,
    open_group,
    reduced,
)
from flashtask.trainer.distribution.launching import (
    Others,
    end_data_workers_too,
    ending_here,
    fork,
    reporting,
    start_again,
    started,
)
from flashtask.trainer.distribution.process_strategies import REDUCTIONS, Strategy
from flashtask.trainer.distribution.reports import (
    CONTINUE,
    error_in,
    exit_code_of,
    is_bystander,
    mute,
    of_a_bystander,
    report_of,
)
from flashtask.trainer.distribution.shared_step import SharedStep
from flashtask.trainer.distribution.watchdog import Watchdog

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run

__all__ = ["DataParallel", "DataParallelWithUnused", "ForkedDataParallel"]

T = TypeVar("T")

#: Seconds that one process waits for another.
TIMEOUT = 1800.0
#: Seconds without a heartbeat after which a process counts as frozen.
FROZEN_AFTER = 120.0
#: Seconds in which another process may report why it failed.
_GRACE = 5.0

#: of this process, as long as its group is open
_watchdog: Watchdog | None = None


class DataParallel(Strategy):
    """A process for each device, which all have the model and add up their gradients.

    Where torchrun, SLURM or MPI started this process, it joins the others. Else the script is started again, with the
    same arguments, once for each further device; what precedes the call runs in all of them.

    Args:
        find_unused_parameters: some parameters may have no part in a loss; looking for them costs time.
        timeout: seconds that one process waits for another.
        frozen_after: seconds without a heartbeat after which a process counts as frozen and all are ended; a thread
            gives them each second, so a long step is no silence. At least 1.
        options: accelerator and precision, as `Strategy` takes them.
    """

    name = "ddp"
    most_devices = None

    def __init__(
        self,
        find_unused_parameters: bool = False,
        timeout: float = TIMEOUT,
        frozen_after: float = FROZEN_AFTER,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value in (("timeout", timeout), ("frozen_after", frozen_after)):
            if not value >= 1:
                raise UsageError(f"{name}={value!r}: it is in seconds, and at least 1", fix=f"{name}=120")
        self.find_unused_parameters, self.timeout, self.frozen_after = find_unused_parameters, timeout, frozen_after
        self.process = process_info()
        self._others: Others | None = started()
        self._listening: socket.socket | None = None
        self._run: Any = None
        self._steps: list[SharedStep] = []

    def plan(self, device: torch.device, devices: int, num_nodes: int) -> None:
        """Take the number of processes; where others started them, their number must agree with it."""
        self._device, self._devices, self._num_nodes = device, devices, num_nodes
        process = self.process
        if process is None or self._others is not None:
            return
        if process.launcher == "torchrun" and devices != process.local_world_size:
            raise UsageError(
                f"devices={devices}, and torchrun has started {process.local_world_size} processes on this machine",
                fix=f"devices={process.local_world_size}, or leave devices out; or torchrun --nproc-per-node {devices}",
            )
        if num_nodes > 1 and devices * num_nodes != process.world_size:
            raise UsageError(
                f"num_nodes={num_nodes} with devices={devices}, and {process.launcher} has started "
                f"{process.world_size} processes",
                fix="leave num_nodes and devices out: what starts the processes decides how many there are",
            )

    @property
    def local_world_size(self) -> int | None:  # type: ignore[override]
        """The number of processes that were started on this machine from outside, None if none were."""
        return None if self.process is None else self.process.local_world_size

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """How many processes there are."""
        return 1 if self.process is None else self.process.world_size

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        """Which of all processes this is."""
        return 0 if self.process is None else self.process.rank

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        """Which of the processes on this machine this is."""
        return 0 if self.process is None else self.process.local_rank

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Start the others, unless they are there, and meet them; where one fails, none continues."""
        if self.process is None and self._devices * self._num_nodes > 1:
            self.process, self._others, self._listening = self._start()
        if self.process is None:
            yield
            return
        # A stage can run inside of another, as in a hook: what is the outer one's stays.
        outer, kept = self._run, len(self._steps)
        with reporting(self.process):
            try:
                self._meet()
                assert _watchdog is not None
                with _watchdog.watching():
                    yield
            except BaseException as error:
                abandon_group(exit_code_of(error) if isinstance(error, SystemExit) else None)
                if (seen := self._cause(error)) is error:
                    raise
                raise seen from None
            finally:
                self._run = outer
                while len(self._steps) > kept:
                    self._steps.pop().close()

    def _start(self) -> tuple[ProcessInfo, Others | None, socket.socket | None]:
        return start_again(self._devices, self._num_nodes)

    def _meet(self) -> None:
        global _watchdog
        assert self.process is not None
        if "OMP_NUM_THREADS" not in os.environ and not is_open():
            torch.set_num_threads(cores_of(self.process, torch.get_num_threads()))
        # Said of channels-last weights and of dimensions of one, where it means nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        listening, self._listening = self._listening, None
        store = open_group(self.process, self._device, self.timeout, listening, self._look_at_the_others)
        if store is None:
            if _watchdog is not None:
                _watchdog.where = self._where
            return
        end_data_workers_too()
        others = self._others
        _watchdog = Watchdog(self.process, store, self.frozen_after, self._where, others)
        atexit.unregister(_part)
        atexit.register(_part)
        if others is not None and others is started():
            atexit.register(_let_finish, others)

    def _look_at_the_others(self) -> None:
        """While others are missing: one that has ended will not come any more."""
        if self._others is not None and self._others.ended() is not None:
            raise self._others.failure(_GRACE, "before it met the others") or ProcessLostError(
                "a process ended before it met the others", why="it did not come to the stage that this one is in"
            )

    def begin(self, run: Run) -> None:
        """All processes are in the same stage, with the same arguments, or none begins."""
        self._run = run
        self.agree(lambda: facts_at_start(run))

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Compare the facts of every process with those of the first; none continues if one differs."""
        if self.world_size == 1:
            return
        try:
            require_the_same(gathered(dict(facts())))
        except UsageError as error:
            raise (mute(error) if self.global_rank else error) from None

    def _where(self) -> tuple[int, Path | None]:
        run = self._run
        return (0, None) if run is None else (run.trainer.global_step, run.trainer.claimed_folder)

    def _cause(self, error: BaseException) -> BaseException:
        """What another process failed of, where that is why this one did; the others are ended."""
        if _watchdog is not None and _watchdog.has_found.is_set():
            time.sleep(60)  # it is saying so, and ends this process
        if self._others is None:
            return error if self.process is None or _watchdog is None else self._cause_from_afar(error, _watchdog)
        found = self._cause_beside(error, self._others)
        self._others.end()
        return found

    def _cause_beside(self, error: BaseException, others: Others) -> BaseException:
        """The same where this process started the others of its machine, which may be one of several."""
        assert self.process is not None
        if is_bystander(error):
            return error
        found = others.failure(_GRACE, f"at step {self._where()[0]}") if is_of_the_group(error) else error
        if _watchdog is None:
            return found or self._broken(error)
        if found is not None:
            _watchdog.report_failure(report_of(found, self.process, is_of_the_group=False))
            return found
        if (report := _watchdog.reported_failure()) is not None:
            return error_in(report)
        lost = _watchdog.lost()
        return self._broken(error) if lost is None else of_a_bystander(ProcessLostError(lost[1], fix=CONTINUE))

    def _cause_from_afar(self, error: BaseException, watchdog: Watchdog) -> BaseException:
        """The same where a launcher started the processes: one of them prints the message, each of them ends."""
        assert self.process is not None
        if is_bystander(error):
            return error
        if not is_of_the_group(error):
            watchdog.report_failure(report_of(error, self.process, is_of_the_group=False))
            return error
        with _ignoring_sigterm():
            return self._of_another(watchdog) or self._broken(error)

    def _of_another(self, watchdog: Watchdog) -> BaseException | None:
        if (report := watchdog.reported_failure()) is not None:
            return mute(error_in(report))
        if (lost := watchdog.lost()) is None:
            return None
        if (report := watchdog.reported_failure()) is not None:
            return mute(error_in(report))
        rank, how = lost
        found = of_a_bystander(ProcessLostError(how, fix=CONTINUE))
        prints = self.global_rank == (1 if rank == 0 else 0)
        return found if prints else mute(found)

    def _broken(self, error: BaseException) -> BaseException:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"the processes lost each other at step {self._where()[0]}"
        return of_a_bystander(ProcessLostError(what, why=lines[0]))

    def setup(self, module: Module) -> None:
        """Weights and buffers are those of rank 0: a model may have been drawn at random, in each process another."""
        if self.world_size > 1:
            agree_on((*module.parameters(), *module.buffers()))

    def begin_evaluation(self, module: nn.Module) -> None:
        """The statistics of BatchNorm are those of the first process; after a step each has its own."""
        if self.world_size > 1:
            agree_on(module.buffers())

    def average_gradients(self, parameters: Iterable[nn.Parameter], samples: int) -> None:
        """The mean over the samples of all processes; a parameter that no process has a gradient of is left alone."""
        if self.world_size == 1:
            return
        known = list(parameters)
        counts = torch.tensor([samples, *(one.grad is not None for one in known)], dtype=torch.int64)
        total, *present = reduced(counts.to(self._device), "sum").tolist()
        for one in (one for one, processes in zip(known, present, strict=True) if processes):
            own = torch.zeros_like(one) if one.grad is None else one.grad
            one.grad = reduced(own * (samples / total), "sum")

    def wrap_step(self, module: Module, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step as torch's DistributedDataParallel calls it."""
        if self.world_size == 1:
            return step
        self._steps.append(SharedStep(module, step, self.find_unused_parameters))
        return self._steps[-1]

    def reduce(self, value: T, how: str = "mean") -> T:
        """A number or tensor over all processes; a number is exchanged in float64.

        Raises:
            UnknownNameError: another way than `mean`, `sum`, `max` and `min`.
        """
        if how not in REDUCTIONS:
            raise UnknownNameError("way to reduce", how, REDUCTIONS)
        found: T = value if self.world_size == 1 else reduced(value, how)
        return found

    def gather(self, value: T) -> list[T]:
        """What every process has, in the order of their ranks."""
        return [value] if self.world_size == 1 else gathered(value)

    def barrier(self, name: str = "") -> None:
        """Wait until every process has called this; a mismatch of names is a bug."""
        if self.world_size > 1:
            places = gathered(name)
            assert len(set(places)) == 1, f"processes wait at different places: {places}"


class DataParallelWithUnused(DataParallel):
    """As `ddp`, where not every parameter has a part in every loss."""

    name = "ddp_find_unused_parameters"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"find_unused_parameters": True, **options})


class ForkedDataParallel(DataParallel):
    """As `ddp`, by processes that are forked where the method is called, and end with it; this one is rank 0.

    On CPUs the others compute on one thread each: OpenMP's threads do not survive a fork.
    """

    name = "ddp_spawn"

    def plan(self, device: torch.device, devices: int, num_nodes: int) -> None:
        """As `ddp`, but all processes are on this machine."""
        if num_nodes > 1 and self.process is None:
            raise UsageError(f"{self.name} forks on one machine, and num_nodes={num_nodes}", fix='strategy="ddp"')
        super().plan(device, devices, num_nodes)

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Fork the others; what they have at the end is gone, and this process has the same."""
        if self.process is not None or self._devices * self._num_nodes == 1:
            with super().launch():
                yield
            return
        threads = torch.get_num_threads()
        self.process, others, self._listening = fork(self._devices, self._device)
        if others is None:
            with ending_here(), super().launch():
                yield
            return
        self._others = others
        try:
            with super().launch():
                yield
            with _watching():
                lost = others.failure(None)
            if lost is not None:
                raise lost
        except BaseException:
            others.end()  # what still waits for them breaks, and the group can be closed
            raise
        finally:
            _part()
            close_group()
            others.end()
            self.process = self._others = None
            torch.set_num_threads(threads)


def _part() -> None:
    """Nobody is watched any more."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
        _watchdog = None


def _let_finish(others: Others) -> None:
    """At the end of the first process: the others come to theirs, and are watched until then."""
    with _watching():
        others.finish()


def _watching() -> AbstractContextManager[None]:
    return nullcontext() if _watchdog is None else _watchdog.watching()


@contextmanager
def _ignoring_sigterm() -> Iterator[None]:
    """Torchrun ends all processes a moment after it lost one; until then this one is to find out which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
