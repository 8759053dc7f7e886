"""The share of a machine that this process has, where several processes of a run are on it."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["cores_here", "num_cores", "processes_here", "share_machine", "stop_sharing"]

#: (processes on this machine, cores of one of them), while this process is in touch with the others
_shared: list[tuple[int, Callable[[int], int]]] = []


def share_machine(processes: int, cores_of_one: Callable[[int], int]) -> None:
    """This process has met the others of its run.

    Args:
        processes: how many of them are on this machine, with this one.
        cores_of_one: of the cores that a process may use, how many it takes.
    """
    _shared[:] = [(processes, cores_of_one)]


def stop_sharing() -> None:
    """This process has parted from the others."""
    _shared.clear()


def processes_here() -> int:
    """How many processes share this machine's memory for a run; 1 as long as this one has met no others."""
    return _shared[0][0] if _shared else 1


def cores_here(cores: int) -> int:
    """Of the cores that this process may use, those that a run in it takes; all as long as it has met no others."""
    return _shared[0][1](cores) if _shared else cores


def num_cores() -> int:
    """The cores that this process may use; several processes of a run share those of their machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores_here(cores)
