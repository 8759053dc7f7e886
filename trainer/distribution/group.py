"""How the processes of a run speak with each other: torch.distributed, opened once in a process."""

from __future__ import annotations

import atexit
import gc
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flashtask.core.errors import UsageError
from flashtask.trainer.distribution.environment import Place
from flashtask.trainer.distribution.interfaces import interface_towards, interfaces

__all__ = [
    "agree_on",
    "close_group",
    "free_port",
    "gathered",
    "is_of_the_group",
    "is_open",
    "open_group",
    "processes_here",
    "reduced",
]

#: The place of this process, while it is in touch with the others.
_met: list[Place] = []
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def open_group(place: Place, device: torch.device, timeout: float) -> None:
    """Meet the other processes; gloo for what is on CPUs, NCCL for CUDA.

    Args:
        place: of this process.
        device: that it computes on.
        timeout: seconds that one waits for another, here and in every exchange later.

    Raises:
        UsageError: the port is taken, or the others did not come.
    """
    if dist.is_initialized():
        return
    # Threads of the group that still run when Python ends can abort the process.
    atexit.register(close_group)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = f"tcp://{place.address}:{place.port}"
    if place.launcher == "torchrun":
        where = "env://"  # its agent keeps the store
    if place.world_size > place.local_world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(place.address)
        os.environ.update({} if name is None else {"GLOO_SOCKET_IFNAME": name})
    try:
        dist.init_process_group(
            backend,
            init_method=where,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        if "connectFullMesh" in str(error):
            raise _unreachable(place, error) from error
        if not isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
            raise
        raise UsageError(
            f"process {place.rank} of {place.world_size} could not meet the others at {place.address}:{place.port}",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="another port: MASTER_PORT=29501; and look whether every process was started",
        ) from error
    _met[:] = [place]


def _unreachable(place: Place, error: RuntimeError) -> UsageError:
    here = ", ".join(f"{name} ({address})" for name, address in interfaces().items()) or "none"
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "that of the host name")
    return UsageError(
        f"process {place.rank} of {place.world_size} cannot reach the others",
        why=f"{str(error).strip().splitlines()[0].rpartition('] ')[2]}; the interface here is {chosen}",
        fix=f"GLOO_SOCKET_IFNAME=NAME on every machine, with the interface that joins them; here are: {here}",
    )


def is_open() -> bool:
    """Whether this process has met the others."""
    return dist.is_initialized()


def processes_here() -> int:
    """How many processes share this machine's cores and memory for a run; 1 as long as this one has met no others."""
    return _met[0].local_world_size if _met else 1


def close_group() -> None:
    """Part from the others."""
    _met.clear()
    if dist.is_initialized():
        gc.collect()  # modules that were wrapped hold the group, in cycles
        dist.destroy_process_group()


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
    """Whether an error only says that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "by peer"))


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
