"""Work on a CPU in lanes: threads that each compute batches of their own, with their share of the cores."""

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

__all__ = ["LANE_BATCH", "fitting_lanes", "in_lanes", "in_order"]

#: Samples at a time for a lane: what fits into a core's cache.
LANE_BATCH = 16
#: Below this number of samples the copy of the network for inference costs more than it saves.
_FEW = 32
#: With more lanes they would wait for Python's lock.
_MOST_LANES = 8
#: Whose modules keep nothing of one forward pass for another, so that several may run at once.
_LIBRARIES = ("flashtask", "timm", "torch", "torchmetrics", "torchvision")


def fitting_lanes(module: nn.Module, num_samples: int, cores: int) -> int:
    """A lane a core, up to eight; 0 where the pass is short or the network may not run in several threads at once.

    Args:
        module: on the device that it is computed on.
        num_samples: of the whole pass.
        cores: that this process may use.
    """
    if num_samples < _FEW or any(parameter.device.type != "cpu" for parameter in module.parameters()):
        return 0
    parts = (*module.modules(), *(hook for part in module.modules() for hook in forward_hooks(part)))
    is_known = all(type(one).__module__.partition(".")[0] in _LIBRARIES for one in parts)
    return min(torch.get_num_threads(), cores, _MOST_LANES) if is_known else 0


def in_lanes(work: Callable[[Any], Any], jobs: Iterable[Any], lanes: int) -> Iterator[Any]:
    """`work` of one job after the other, in their order, with the threads of torch shared out among the lanes.

    Args:
        work: computes; the contexts that torch keeps for each thread (no gradients, autocast) are its own to enter.
        jobs: what it is given; they are taken in the caller's thread.
        lanes: at least 1.
    """
    threads = torch.get_num_threads()
    try:
        yield from in_order(work, jobs, lanes, partial(_compute_in, max(1, threads // lanes)))
    finally:
        torch.set_num_threads(threads)  # what a lane has set for itself would hold for threads that start later


def _compute_in(threads: int) -> None:
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
    pool = ThreadPoolExecutor(threads, "flashtask-lane", start)
    try:
        under_way = deque(pool.submit(work, job) for job in islice(waiting, 2 * threads))
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(pool.submit(work, job) for job in islice(waiting, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
