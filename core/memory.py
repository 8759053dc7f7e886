"""How much memory this process used at its peak, and how much more it may use; read from Linux's /proc and /sys."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

__all__ = ["MemoryLimit", "MemoryWatch", "give_back_memory", "memory_in_use", "memory_limits"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

#: What version 1 of cgroups writes for "no limit" is near 2**63; no machine has a petabyte.
_NO_LIMIT = 2**50

#: Between two looks at the memory of the process, where its peak cannot be reset.
_SECONDS = 0.002


class MemoryLimit(NamedTuple):
    """What bounds the memory of this process.

    Args:
        name: what a user calls it.
        free: bytes that it leaves to be used, on top of those in use now.
    """

    name: str
    free: int


class MemoryWatch:
    """The peak of this process's memory while a `with` block runs: `watch.peak`, in bytes.

    Linux keeps the peak and lets a process reset it (/proc/self/clear_refs); where that is not allowed, a thread looks
    at the memory in use every 2 ms.
    """

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self.peak = 0
        self._over = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self._reset():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._sampler is None:
            self.peak = _of_status("VmHWM", self._proc)
            return
        self._over.set()
        self._sampler.join()

    def _reset(self) -> bool:
        try:
            (self._proc / "self" / "clear_refs").write_text("5")
        except OSError:
            return False
        # Some sandboxes take the 5 and do nothing.
        return _of_status("VmHWM", self._proc) - memory_in_use(self._proc) < 2**24

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, memory_in_use(self._proc))
            if self._over.wait(_SECONDS):
                return


def memory_in_use(proc: Path = _PROC) -> int:
    """Bytes of memory that this process holds now.

    Raises:
        OSError: the system has no /proc.
    """
    return _of_status("VmRSS", proc)


def give_back_memory() -> None:
    """Free what nothing refers to, and let the C library hand it back to the system where it can."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def memory_limits(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> list[MemoryLimit]:
    """Everything that bounds the memory of this process: the machine, control groups, `ulimit -v`.

    Raises:
        OSError: the system has no /proc.
    """
    limits = [MemoryLimit("this machine's memory", _kilobytes(proc / "meminfo", "MemAvailable"))]
    limits += _cgroup_limits(proc, cgroups)
    address_space = _address_space(proc)
    if address_space is not None:
        # What a process ever reserved is not given back reliably, so its peak counts.
        limits.append(MemoryLimit("`ulimit -v`", max(0, address_space - _of_status("VmPeak", proc))))
    return limits


def _address_space(proc: Path) -> int | None:
    for line in (proc / "self" / "limits").read_text().splitlines():
        if line.startswith("Max address space"):
            soft = line.removeprefix("Max address space").split()[0]
            return None if soft == "unlimited" else int(soft)
    return None


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[MemoryLimit]:
    """Of the group of this process and of every group around it, in both versions of control groups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        return  # a kernel without control groups
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            roots, read = [cgroups / "memory"], _version_1
        elif not controllers:
            roots, read = [cgroups, cgroups / "unified"], _version_2
        else:
            continue
        for group in (group for root in roots for group in _around(root, path)):
            free = read(group)
            if free is not None:
                yield MemoryLimit(f"the control group {group}", max(0, free))


def _around(root: Path, path: str) -> Iterator[Path]:
    """A group and those around it. In a container the path may be the host's, of which only the root is seen."""
    group = root / path.lstrip("/")
    yield from (place for place in (group, *group.parents) if place == root or root in place.parents)


def _version_1(group: Path) -> int | None:
    try:
        limit = int((group / "memory.limit_in_bytes").read_text())
        used = int((group / "memory.usage_in_bytes").read_text())
    except OSError:
        return None
    return None if limit > _NO_LIMIT else limit - used + _reclaimable(group, "total_inactive_file")


def _version_2(group: Path) -> int | None:
    limits = []
    for name in ("memory.max", "memory.high"):
        with suppress(OSError):  # the root group has neither
            text = (group / name).read_text().strip()
            limits += [] if text == "max" else [int(text)]
    if not limits:
        return None
    used = int((group / "memory.current").read_text())
    return min(limits) - used + _reclaimable(group, "inactive_file")


def _reclaimable(group: Path, name: str) -> int:
    """Bytes of files in memory that the system drops when it needs room."""
    with suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _of_status(name: str, proc: Path) -> int:
    return _kilobytes(proc / "self" / "status", name)


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"{file} has no {name}")
