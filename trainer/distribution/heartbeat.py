"""Heartbeats that the processes of a group send each other, and how the processes of this machine ended."""

from __future__ import annotations

import functools
import json
import os
import platform
import select
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Endings", "Heartbeat", "is_gone", "read_heartbeat", "start_of", "this_machine"]

_GONE = ("Z", "X", "x")


@dataclass(frozen=True)
class Heartbeat:
    """A heartbeat of a process.

    Args:
        count: of the heartbeats of this process.
        step: of the run at that time.
        pid: of the process.
        started: when, in the system's own ticks; with the pid it names the process for good.
        host: its machine's name, for people.
        machine: as `this_machine` gives it.
        is_last: it has parted from the others.
    """

    count: int
    step: int
    pid: int
    started: int
    host: str
    machine: str
    is_last: bool = False


@functools.cache
def this_machine() -> str:
    """Equal for processes that mean the same by a pid: those of one boot and one namespace of pids.

    Names of machines are not enough: containers share them or each have their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


class Endings:
    """How processes of this machine ended, seen as they end.

    Only who started a process may ask how it ended. Everybody can read it from /proc until that has been done, and
    torchrun's agent does it every tenth of a second. So a thread waits for the end itself (pidfd_open, Linux 5.3).
    """

    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}
        self._watched: dict[int, threading.Event] = {}
        self._over, self._waker = os.pipe()

    def watch(self, rank: int, heartbeat: Heartbeat) -> None:
        """Wait for the end of a process, if it runs here; once for each."""
        if rank in self._watched or heartbeat.machine != this_machine():
            return
        self._watched[rank] = threading.Event()
        with suppress(AttributeError, OSError):  # another system, or the process is gone
            process = os.pidfd_open(heartbeat.pid)
            arguments = (rank, heartbeat, process, os.dup(self._over))
            threading.Thread(target=self._wait, args=arguments, name="flashtask-end", daemon=True).start()

    def _wait(self, rank: int, heartbeat: Heartbeat, process: int, over: int) -> None:
        waiting = select.poll()
        for descriptor in (process, over):
            waiting.register(descriptor, select.POLLIN)
        if process in [descriptor for descriptor, _ in waiting.poll()]:
            self._codes[rank] = _exit_code(heartbeat)
            self._watched[rank].set()
        os.close(process)
        os.close(over)

    def code(self, rank: int, heartbeat: Heartbeat) -> int | None:
        """How a process ended that is gone: as subprocess has it, negative for a signal; None if it is not known."""
        code = _exit_code(heartbeat)
        if code is None and rank in self._watched:
            self._watched[rank].wait(0.5)  # the thread may be about to
            code = self._codes.get(rank)
        return code

    def close(self) -> None:
        """Wake what waits for the end, and close both ends of the pipe."""
        os.write(self._waker, b"over")  # to close it would not do: forked data workers have it too
        os.close(self._waker)
        os.close(self._over)


def read_heartbeat(store: Any, rank: int) -> Heartbeat | None:
    """The last heartbeat of a process, if there is one."""
    key = f"heartbeat/{rank}"
    return Heartbeat(**json.loads(store.get(key))) if store.check([key]) else None


def start_of(pid: int) -> int:
    """When a process started, in the system's ticks; 0 if it is not known."""
    stat = _stat(pid)
    return stat[1] if stat else 0


def is_gone(heartbeat: Heartbeat) -> bool:
    """Whether a process of this machine has ended; of others nothing is known."""
    if heartbeat.machine != this_machine() or not heartbeat.started:
        return False
    stat = _stat(heartbeat.pid)
    return stat is None or stat[1] != heartbeat.started or stat[0] in _GONE


def _exit_code(heartbeat: Heartbeat) -> int | None:
    stat = _stat(heartbeat.pid)
    if stat is None or stat[1] != heartbeat.started or stat[0] not in _GONE:
        return None
    return os.waitstatus_to_exitcode(stat[2])


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, start and exit code of a process as Linux has them; None if it is gone, or this is no Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19]), int(fields[49])
    except (OSError, IndexError, ValueError):
        return None
