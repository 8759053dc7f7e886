"""How the processes of a run communicate: torch.distributed, opened once in a process."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

from flashtask.core.errors import UsageError
from flashtask.core.machine import share_machine, stop_sharing
from flashtask.trainer.distribution.environment import ProcessInfo

try:
    import fcntl
except ImportError:  # Windows: gloo is left to find its interface
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "abandon_group",
    "agree_on",
    "close_group",
    "cores_of",
    "gathered",
    "hard_exit",
    "interface_towards",
    "interfaces",
    "is_of_the_group",
    "is_open",
    "listen",
    "open_group",
    "reduced",
]

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_PORT_FIX = "another port: MASTER_PORT=29501; and look whether every process was started"

#: of this process: the run failed, so that the others may never take part in what still waits for them
_is_abandoned = False
_code_of_exit: int | None = None


def listen(port: int) -> socket.socket:
    """A socket on this machine for the others to call; port 0 leaves the choice to the system.

    Raises:
        UsageError: the port is taken.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
    except OSError as error:
        found.close()
        why = f"the port is taken: {error.strerror}"
        raise UsageError(f"MASTER_PORT={port} cannot be used", why=why, fix="another MASTER_PORT, or none") from None
    found.listen(512)
    return found


def open_group(
    process: ProcessInfo,
    device: torch.device,
    timeout: float,
    listening: socket.socket | None = None,
    look: Callable[[], None] = lambda: None,
) -> Any:
    """Meet the other processes; gloo for what is on CPUs, NCCL for CUDA.

    Args:
        process: this one.
        device: that it computes on.
        timeout: seconds that one waits for another, here and in every exchange later.
        listening: a socket on the port of `process`, if there is one already.
        look: called again and again while others are missing; it raises if they cannot come.

    Returns:
        The store through which they met; None if they had met before.

    Raises:
        UsageError: the port is taken, or the others did not come.
    """
    global _is_abandoned
    if dist.is_initialized():
        return None
    # Its functions take the group that is open when it is imported as a default, and would keep it, and its threads,
    # to the end of Python. Threads of the group that still run then abort the process.
    import torch.distributed.nn.functional  # noqa: F401

    atexit.unregister(_leave)
    atexit.register(_leave)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if process.launcher == "torchrun" else "0"
    if process.world_size > process.local_world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(process.address)
        os.environ.update({} if name is None else {"GLOO_SOCKET_IFNAME": name})
    try:
        store = _store(process, wait, listening)
        names = PrefixStore(f"flashtask/{attempt}", store)
        _wait_for_all(names, process, timeout, look)
        group = PrefixStore("group", names)
        dist.init_process_group(backend, store=group, rank=process.rank, world_size=process.world_size, timeout=wait)
    except RuntimeError as error:
        if "connectFullMesh" in str(error):
            raise _unreachable(process, error) from error
        if not isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
            raise
        raise UsageError(
            f"{process} could not meet the others at {process.meeting_point}",
            why=_first_line(error),
            fix=_PORT_FIX,
        ) from error
    _is_abandoned = False
    share_machine(process.local_world_size, partial(cores_of, process))
    return names


def _unreachable(process: ProcessInfo, error: RuntimeError) -> UsageError:
    here = ", ".join(f"{name} ({address})" for name, address in interfaces().items()) or "none"
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "that of the host name")
    return UsageError(
        f"{process} cannot reach the others",
        why=f"{str(error).strip().splitlines()[0].rpartition('] ')[2]}; the interface here is {chosen}",
        fix=f"GLOO_SOCKET_IFNAME=NAME on every machine, with the interface that joins them; here are: {here}",
    )


def _store(process: ProcessInfo, wait: timedelta, listening: socket.socket | None) -> TCPStore:
    """The first process serves it, unless torchrun's agent does."""
    by_agent = process.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = process.rank == 0 and not by_agent
    options: dict[str, Any] = {"is_master": serves, "timeout": wait, "wait_for_workers": False}
    if listening is not None:
        options["master_listen_fd"] = listening.detach()
    return TCPStore(process.address, process.port, **options)


def _wait_for_all(store: PrefixStore, process: ProcessInfo, timeout: float, look: Callable[[], None]) -> None:
    start, pause, is_printed = time.monotonic(), 0.01, False
    store.set(f"here/{process.rank}", str(os.getpid()))
    keys = [f"here/{rank}" for rank in range(process.world_size)]
    while not store.check(keys):
        look()
        waited = time.monotonic() - start
        missing = ", ".join(str(rank) for rank, key in enumerate(keys) if waited > 10 and not store.check([key]))
        if missing and not (is_printed or process.rank):
            is_printed = True
            print(f"process 0 waits at {process.meeting_point} for: {missing}", file=sys.stderr, flush=True)
        if waited > timeout:
            raise UsageError(
                f"{process} waited {timeout:.0f} s at {process.meeting_point}",
                why=f"these did not come: {missing}",
                fix=_PORT_FIX,
            )
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_open() -> bool:
    """Whether this process has met the others."""
    return dist.is_initialized()


def cores_of(process: ProcessInfo, cores: int) -> int:
    """Of the cores that a process may use, its own: SLURM gives each task some; else those of a machine share them.

    Args:
        process: this one.
        cores: those that it may use.
    """
    own = os.environ.get("SLURM_CPUS_PER_TASK", "") if process.launcher == "slurm" else ""
    return min(cores, int(own)) if own.isdigit() and int(own) else max(1, cores // process.local_world_size)


def close_group() -> None:
    """Close the group of processes, if one is open."""
    global _is_abandoned
    stop_sharing()
    if dist.is_initialized():
        gc.collect()  # modules that were wrapped hold the group, in cycles
        dist.destroy_process_group()
        gc.collect()
    _is_abandoned = False


def abandon_group(code: int | None = None) -> None:
    """The run failed here: at the end of this process nothing is waited for any more.

    Args:
        code: what the process is to end with; None if the exception that ends Python decides it.
    """
    global _is_abandoned, _code_of_exit
    _is_abandoned, _code_of_exit = dist.is_initialized(), code


def _leave() -> None:
    """At the end of Python, where threads of the group must be gone.

    Closing would wait for exchanges that the others never take part in.
    """
    if not _is_abandoned:
        close_group()
    elif (error := getattr(sys, "last_value", None)) is not None:
        hard_exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    elif _code_of_exit is not None:
        hard_exit(_code_of_exit)


def hard_exit(code: int, *, if_abandoned: bool = False) -> None:
    """End this process at once, with what was printed so far.

    Args:
        code: its exit code.
        if_abandoned: only if the group was, so that an ordinary end could wait for ever.
    """
    if if_abandoned and not _is_abandoned:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def reduced(value: Any, how: str) -> Any:
    """A number or tensor over all processes; a number is exchanged in float64, a whole one stays whole."""
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor:
        held = value.detach().clone()
    else:
        held = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) and how != "mean" else torch.float64)
    dist.all_reduce(held, _OPERATIONS["sum" if how == "mean" else how])
    if how == "mean":
        held = held / dist.get_world_size()
    return held if is_tensor else held.item()


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@torch.no_grad()
def agree_on(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process what rank 0 has, in place; all have as many tensors, of the same shapes and formats."""
    for tensor in tensors:
        if not tensor.numel():
            continue
        # As bytes: the backends know neither every number format nor other layouts than the plain one.
        held = tensor.detach().contiguous()
        dist.broadcast(held.flatten().view(torch.uint8), 0)
        if dist.get_rank():
            tensor.copy_(held)


def is_of_the_group(error: BaseException) -> bool:
    """Whether an error only reports that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "by peer"))


# ---- the network interface that leads to the other machines: gloo takes that of the host name, often the wrong one

_GET_ADDRESS = 0x8915
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
#: An address for documentation: nothing is sent there, the system only answers by which interface it would go.
_ELSEWHERE = "192.0.2.1"


def interfaces() -> dict[str, str]:
    """The interfaces that have an IPv4 address, with that; without those of this machine alone."""
    found = {}
    if fcntl is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has none
                    answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                    found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def interface_towards(address: str) -> str | None:
    """The interface by which this machine reaches another, or by which that one reaches this.

    Args:
        address: of the machine that rank 0 is on. On that machine its own name may mean 127.0.1.1 (so on Debian), which
            no other machine reaches: then it is the interface of the default route, or the only one.

    Returns:
        None if the address means this machine to every process, or if the interface is not known.
    """
    if address in _THIS_MACHINE:
        return None
    here = interfaces()
    for way in (_source_towards(address), _source_towards(_ELSEWHERE)):
        for name, own in here.items():
            if own == way:
                return name
    return next(iter(here)) if len(here) == 1 else None


def _source_towards(address: str) -> str | None:
    """The own address that packets to another would carry."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own: str = probe.getsockname()[0]
        return own
    return None
