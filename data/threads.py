"""The threads of this process that decode: one for each core, started when first needed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.utils.data

from flashtask.core.machine import num_cores
from flashtask.data.images import prepare_decoders

__all__ = ["in_threads", "num_cores"]


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
