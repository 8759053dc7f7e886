"""Which process of how many this one is, from the environment that its launcher has set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from flashtask.core.errors import UsageError

__all__ = ["ProcessInfo", "number_in", "process_info"]


@dataclass(frozen=True)
class ProcessInfo:
    """One of the processes that train together.

    Args:
        rank: which one, from 0.
        world_size: how many there are.
        local_rank: which of those on its machine, from 0.
        local_world_size: how many there are on its machine.
        address: of the machine that rank 0 is on.
        port: on which rank 0 listens.
        launcher: who started it: `torchrun`, `slurm`, `mpi`, `environment` or `flashtask`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    launcher: str

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world_size}"

    @property
    def meeting_point(self) -> str:
        """The address and the port at which rank 0 listens, as `address:port`."""
        return f"{self.address}:{self.port}"


#: launcher -> the variables of (rank, world size, local rank, local world size); the first that is there counts
_VARIABLES = {
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "mpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
_PORTS = 12_000, 20_000


def process_info(environment: Mapping[str, str] = os.environ) -> ProcessInfo | None:
    """The rank and sizes that torchrun, SLURM, MPI or a Kubernetes job gave this process; None without one of them.

    Raises:
        UsageError: some of the variables are there and others are missing, or they contradict each other.
    """
    for launcher, names in _VARIABLES.items():
        if names[0] not in environment:
            continue
        if launcher == "slurm" and int(environment.get("SLURM_NTASKS", "1")) == 1:
            continue  # a job of one task, or an interactive shell
        return _read(launcher, names, environment)
    if {"WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"} <= set(environment):
        return _read("environment", _VARIABLES["environment"], {**environment, "RANK": _rank(environment)})
    if "WORLD_SIZE" in environment:
        raise _missing("RANK", "WORLD_SIZE", environment)
    return None


def _rank(environment: Mapping[str, str]) -> str:
    """The rank of a process that knows only its local rank and the number of its machine."""
    node = number_in(environment, "NODE_RANK")
    if node and "LOCAL_WORLD_SIZE" not in environment:
        raise _missing("LOCAL_WORLD_SIZE", "NODE_RANK", environment)
    return str(
        node * (number_in(environment, "LOCAL_WORLD_SIZE") if node else 0) + number_in(environment, "LOCAL_RANK")
    )


def _read(launcher: str, names: tuple[str, str, str, str], environment: Mapping[str, str]) -> ProcessInfo:
    rank_name, size_name, local_name, local_size_name = names
    if size_name not in environment:
        raise _missing(size_name, rank_name, environment)
    rank, size = number_in(environment, rank_name), number_in(environment, size_name)
    if not 0 <= rank < size:
        raise UsageError(f"{rank_name}={rank}: there are {size_name}={size} processes", fix=f"0 to {size - 1}")
    local = number_in(environment, local_name) if local_name in environment else 0
    text = environment.get(local_size_name, "")
    local_size = (launcher == "slurm" and _tasks_here(environment)) or (int(text) if text.isdigit() else local + 1)
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    if "FLASHTASK_REPORTS" in environment:
        launcher = "flashtask"
    return ProcessInfo(rank, size, local, local_size, *_meeting_point(launcher, environment), launcher)


def _meeting_point(launcher: str, environment: Mapping[str, str]) -> tuple[str, int]:
    address = environment.get("MASTER_ADDR", "")
    if not address and launcher == "slurm":
        address = _first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    if not address:
        raise UsageError(
            "MASTER_ADDR is not set",
            why="the processes have to know on which machine the first of them is",
            fix="MASTER_ADDR=HOST MASTER_PORT=29500, or start them by torchrun",
        )
    if "MASTER_PORT" in environment:
        return address, number_in(environment, "MASTER_PORT")
    first, last = _PORTS
    job = environment.get("SLURM_JOB_ID", "")
    return address, first + int(job) % (last - first) if job.isdigit() else 29_500


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """How many tasks of SLURM's step this machine has: the second of `4(x2),3` has 4. None if SLURM does not set it."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = number_in(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None


def _first_host(nodes: str) -> str:
    """The first machine of SLURM's list: `gpu[07-09,12]` begins with gpu07."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def number_in(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The whole number that a variable holds.

    Raises:
        UsageError: it holds something else.
    """
    if default is not None and not environment.get(name):
        return default
    try:
        return int(environment[name])
    except ValueError:
        raise UsageError(f"{name}={environment[name]!r} is no whole number") from None


def _missing(name: str, other: str, environment: Mapping[str, str]) -> UsageError:
    return UsageError(
        f"{other}={environment[other]} is set, and {name} is not",
        why="this process is one of several, and cannot know which",
        fix=f"start it by torchrun, set {name} too, or unset {other}",
    )
