"""Starting the other processes of a machine, hearing of their failures, and leaving none of them behind."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flashtask.core.errors import ProcessLostError, UsageError
from flashtask.trainer.distribution.environment import ProcessInfo, number_in
from flashtask.trainer.distribution.group import close_group, hard_exit, is_of_the_group, listen
from flashtask.trainer.distribution.reports import (
    CONTINUE,
    error_in,
    exit_code_of,
    how_it_ended,
    is_bystander,
    report_of,
)

__all__ = ["Others", "end_data_workers_too", "ending_here", "fork", "is_script", "reporting", "start_again", "started"]

_PR_SET_PDEATHSIG = 1
#: Seconds in which the others can report what happened and end by themselves, once one of them has failed.
_GRACE = 5.0
#: Where a process that was started here leaves what became of it.
_REPORTS = "FLASHTASK_REPORTS"


class Others:
    """The processes that this one has started on its machine.

    Args:
        polls: for each rank, its exit code as subprocess has it, or None as long as it runs.
        pids: of each rank.
        reports: the folder in which they leave what became of them.
    """

    def __init__(self, polls: Mapping[int, Callable[[], int | None]], pids: Mapping[int, int], reports: Path) -> None:
        self._polls, self._pids, self._reports = polls, pids, reports
        self._is_over = False

    def wait(self, seconds: float | None) -> list[tuple[int, int]]:
        """Those that failed, with their codes, in the order of it; waits until all have ended, no longer than that."""
        deadline = None if seconds is None else time.monotonic() + seconds
        found = []
        waiting = set(self._polls)
        while waiting and (deadline is None or time.monotonic() < deadline):
            for rank in sorted(waiting):
                code = self._polls[rank]()
                if code is not None:
                    waiting.discard(rank)
                    found += [(rank, code)] if code else []
            time.sleep(0.02)
        return found

    def ended(self) -> tuple[int, int] | None:
        """One that has ended, with its code, and rather one that failed; None if all run."""
        codes = [(rank, code) for rank, poll in self._polls.items() if (code := poll()) is not None]
        return next((one for one in codes if one[1]), codes[0] if codes else None)

    def finish(self) -> None:
        """At the end of this process: let the others come to theirs, unless this one failed."""
        if self._is_over:
            return
        lost = self.wait(_GRACE if hasattr(sys, "last_value") else None)
        if lost and not hasattr(sys, "last_value"):
            print(f"{how_it_ended(*lost[0])}, after the run", file=sys.stderr)
        self.end()

    def end(self) -> None:
        """End the processes that still run, by SIGKILL."""
        self._is_over = True
        for rank, pid in self._pids.items():
            if self._polls[rank]() is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait(_GRACE)
        shutil.rmtree(self._reports, ignore_errors=True)

    def failure(self, seconds: float | None, where: str = "") -> BaseException | None:
        """What became of them, if one failed: its own report, or how it ended and where in the run."""
        lost = self.wait(seconds)
        reports = [json.loads(file.read_text("utf-8")) for file in sorted(self._reports.glob("*.json"))]
        for report in reports:
            if not report["is_of_the_group"]:
                return error_in(report)
        # Those that only missed another have reported that; it may be on another machine.
        bystanders = {report["rank"] for report in reports}
        first = next((one for one in lost if one[0] not in bystanders), None)
        return None if first is None else ProcessLostError(how_it_ended(*first, where), fix=CONTINUE)


#: those that this process started to go on beside it to its end
_started: Others | None = None


def started() -> Others | None:
    """The processes that an earlier stage has started, and that still go beside this one."""
    return _started


@contextmanager
def reporting(process: ProcessInfo) -> Iterator[None]:
    """In a process that another of its machine started: leave for that one what went wrong, and end without a word."""
    reports = os.environ.get(_REPORTS)
    try:
        yield
    except BaseException as error:
        if not (reports and process.local_rank):
            raise
        partial = Path(reports, f"{process.rank}.partial")
        with suppress(OSError):
            report = report_of(error, process, is_of_the_group=is_of_the_group(error) or is_bystander(error))
            partial.write_text(json.dumps(report), "utf-8")
            partial.rename(partial.with_suffix(".json"))
        # The error is reported once, by the other process: the rest of this script is skipped.
        hard_exit(exit_code_of(error))


def start_again(devices: int, num_nodes: int) -> tuple[ProcessInfo, Others, socket.socket | None]:
    """Start this script once for each further device of this machine, with the same arguments.

    Of several machines each has one process that starts the others on it, with NODE_RANK, MASTER_ADDR, MASTER_PORT.

    Raises:
        UsageError: there is no script, as in a notebook; there are more machines, and it is not known which of them
            this is; MASTER_PORT is taken.
    """
    global _started
    node = 0 if num_nodes == 1 else _node_rank(num_nodes)
    command = _this_command()
    reports = Path(tempfile.mkdtemp(prefix="flashtask-"))
    address, port = os.environ.get("MASTER_ADDR", ""), number_in(os.environ, "MASTER_PORT", 0)
    listening = None
    if num_nodes == 1:
        # Rank 0 listens before the others connect, so that no other program can take the port in between.
        listening = listen(port)
        address, port = "127.0.0.1", listening.getsockname()[1]
    processes = [
        ProcessInfo(node * devices + local, devices * num_nodes, local, devices, address, port, "flashtask")
        for local in range(devices)
    ]
    children = {}
    for process in processes[1:]:
        environment = {**os.environ, **_environment(process), _REPORTS: str(reports)}
        children[process.rank] = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
    os.environ.update({**_environment(processes[0]), _REPORTS: str(reports)})
    _started = Others(
        {rank: one.poll for rank, one in children.items()}, {rank: one.pid for rank, one in children.items()}, reports
    )
    return processes[0], _started, listening


def _node_rank(num_nodes: int) -> int:
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not missing:
        node = number_in(os.environ, "NODE_RANK")
        if 0 <= node < num_nodes:
            return node
        raise UsageError(f"NODE_RANK={node}: there are num_nodes={num_nodes} machines", fix=f"0 to {num_nodes - 1}")
    raise UsageError(
        f"num_nodes={num_nodes}: a process has to be started on each machine",
        why=f"none has: {', '.join(missing)} is not set",
        fix="torchrun --nnodes 2 --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:29400 SCRIPT; "
        "or NODE_RANK=0 (then 1, ...) MASTER_ADDR=HOST MASTER_PORT=29500 python SCRIPT on each",
    )


def _environment(process: ProcessInfo) -> dict[str, str]:
    numbers = {
        "RANK": process.rank,
        "WORLD_SIZE": process.world_size,
        "LOCAL_RANK": process.local_rank,
        "LOCAL_WORLD_SIZE": process.local_world_size,
        "MASTER_PORT": process.port,
    }
    return {"MASTER_ADDR": process.address, **{name: str(number) for name, number in numbers.items()}}


def is_script() -> bool:
    """Whether Python runs a script or a module, which can be started again; not so in a notebook."""
    try:
        _this_command()
    except UsageError:
        return False
    return True


def _this_command() -> list[str]:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if getattr(main, "__file__", None) and os.path.isfile(sys.argv[0]):
        return [sys.executable, *sys.argv]
    raise UsageError(
        'strategy="ddp" starts the script again, and there is none here',
        why="this is a notebook or an interactive session",
        fix='strategy="ddp_spawn"',
    )


def _end_with_parent() -> None:
    """Linux ends this process when the one that started it is gone, however that came."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _DataWorkers:
    """What multiprocessing keeps to call its function in the processes that it forks."""


_data_workers: _DataWorkers | None = None


def end_data_workers_too() -> None:
    """Let processes that load data end with this one, also where it is killed; torch's own look takes 5 seconds."""
    global _data_workers
    if _data_workers is None:
        _data_workers = _DataWorkers()
        multiprocessing.util.register_after_fork(_data_workers, lambda _: _end_with_parent())


def fork(devices: int, device: torch.device) -> tuple[ProcessInfo, Others | None, socket.socket | None]:
    """Fork a process for each further device; rank 0 also gets the others and a listening socket.

    Raises:
        UsageError: CUDA is in use already, and does not outlive a fork.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UsageError(
            'strategy="ddp_spawn" forks, and CUDA has been used already',
            why="CUDA does not work in a forked process",
            fix='strategy="ddp", or call nothing of CUDA before the Trainer',
        )
    listening, parent, reports = listen(0), os.getpid(), Path(tempfile.mkdtemp(prefix="flashtask-"))
    port = listening.getsockname()[1]
    pids: dict[int, int] = {}
    for rank in range(1, devices):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _end_with_parent()
            if os.getppid() != parent:
                os._exit(1)
            listening.close()
            os.environ[_REPORTS] = str(reports)
            # A group of an earlier run that is not gone yet can only be ended where its threads are.
            gc.freeze()
            torch.set_num_threads(1)  # OpenMP's threads did not come along
            return ProcessInfo(rank, devices, rank, devices, "127.0.0.1", port, "flashtask"), None, None
        pids[rank] = pid
    others = Others({rank: _poll(pid) for rank, pid in pids.items()}, pids, reports)
    return ProcessInfo(0, devices, 0, devices, "127.0.0.1", port, "flashtask"), others, listening


def _poll(pid: int) -> Callable[[], int | None]:
    ended: list[int] = []
    one_at_a_time = threading.Lock()

    def poll() -> int | None:
        with one_at_a_time:
            if not ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended.append(os.waitstatus_to_exitcode(status))
        return ended[0] if ended else None

    return poll


@contextmanager
def ending_here() -> Iterator[None]:
    """Around what a forked process does: it never goes back to where it came from."""
    code = 1
    try:
        yield
        code = 0
    finally:
        with suppress(Exception):
            close_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
