"""The threads of this process that decode: one for each core, started when first needed."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch.utils.data

from flashtask.core.machine import cores_here
from flashtask.data.images import prepare_decoders

__all__ = ["in_order", "in_threads", "num_cores"]


def num_cores() -> int:
    """The cores that this process may use; several processes of a run share those of their machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores_here(cores)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    prepare_decoders()
    return ThreadPoolExecutor(threads, thread_name_prefix="flashtask-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`work` of every item, in their order; one after the other in a worker process, which has a core of its own.

    The work must not draw from global random generators, nor call this again.
    """
    if len(items) < 2 or num_cores() == 1 or torch.utils.data.get_worker_info() is not None:
        return [work(item) for item in items]
    return list(_pool(num_cores()).map(work, items))


def in_order(
    work: Callable[[Any], Any], jobs: Iterable[Any], threads: int, start: Callable[[], object]
) -> Iterator[Any]:
    """`work` of one job after the other, in their order; at most two jobs a thread are under way or waiting.

    Args:
        work: as for `in_threads`.
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
