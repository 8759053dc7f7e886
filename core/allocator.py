"""Memory that was freed is kept for the next step, where the C library would hand it back and fetch it anew."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory in this process, once; returns whether that was possible.

    It maps every large block on its own and unmaps it when it is freed, so that each activation of a network on the
    CPU is made of new pages, which the system fills with zeros one by one. On EfficientNet-Lite0 with batches of 32
    that is half of the time. The price: memory stays at the process's peak. A user's own setting (`MALLOC_...`,
    `GLIBC_TUNABLES`) and another allocator (`LD_PRELOAD`) are left alone, and so is every system but Linux with glibc.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if own or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER))
