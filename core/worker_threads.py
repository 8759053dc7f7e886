"""Worker threads on a CPU: each computes batches of its own, with its share of the cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from flashtask.core.library_internals import forward_hooks

__all__ = ["THREAD_BATCH", "compute_in", "fitting_threads", "in_order", "in_worker_threads"]

#: Samples at a time for a thread: what fits into a core's cache.
THREAD_BATCH = 16
#: Below this number of samples the copy of the network for inference costs more than it saves.
_FEW = 32
#: More threads would wait for Python's lock.
_MOST_THREADS = 8
#: Whose modules keep nothing of one forward pass for another, so that several may run at once.
_LIBRARIES = ("flashtask", "timm", "torch", "torchmetrics", "torchvision")


def fitting_threads(module: nn.Module, num_samples: int, cores: int) -> int:
    """A thread a core, up to eight; 0 where the pass is short or the network may not run in several threads at once.

    Args:
        module: on the device that it is computed on.
        num_samples: of the whole pass.
        cores: that this process may use.
    """
    if num_samples < _FEW or any(parameter.device.type != "cpu" for parameter in module.parameters()):
        return 0
    parts = (*module.modules(), *(hook for part in module.modules() for hook in forward_hooks(part)))
    is_known = all(type(one).__module__.partition(".")[0] in _LIBRARIES for one in parts)
    return min(torch.get_num_threads(), cores, _MOST_THREADS) if is_known else 0


def in_worker_threads(work: Callable[[Any], Any], jobs: Iterable[Any], num_threads: int) -> Iterator[Any]:
    """`work` of one job after the other, in their order, with the threads of torch divided among the worker threads.

    Args:
        work: computes; the contexts that torch keeps for each thread (no gradients, autocast) are its own to enter.
        jobs: what it is given; they are taken in the caller's thread.
        num_threads: worker threads, at least 1.
    """
    threads = torch.get_num_threads()
    try:
        yield from in_order(work, jobs, num_threads, partial(compute_in, max(1, threads // num_threads)))
    finally:
        torch.set_num_threads(threads)  # a setting made in a worker thread would also hold for threads that start later


def compute_in(threads: int) -> None:
    """Let torch compute with so many threads in the calling thread.

    Args:
        threads: at least 1; the setting also holds for threads that start later.
    """
    torch.get_num_threads()  # torch sets up a thread when it is first asked, and would overrule what comes before
    torch.set_num_threads(threads)


def in_order(
    work: Callable[[Any], Any], jobs: Iterable[Any], threads: int, start: Callable[[], object]
) -> Iterator[Any]:
    """`work` of one job after the other, in their order; at most two jobs a thread are under way or waiting.

    Args:
        work: must not draw from global random generators.
        jobs: what it is given.
        threads: of their own, which end with the iterator.
        start: called once in each of them.
    """
    waiting = iter(jobs)
    pool = ThreadPoolExecutor(threads, "flashtask-worker", start)
    try:
        under_way = deque(pool.submit(work, job) for job in islice(waiting, 2 * threads))
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(pool.submit(work, job) for job in islice(waiting, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
