"""How much an archive may unpack to, and the running count that stops it while it is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashtask.core.errors import IntegrityError

__all__ = ["ArchiveLimits", "Budget", "Member"]

CHUNK = 64 * 1024
#: Below this many bytes the ratio says nothing: a small file of zeros is no bomb.
RATIO_FREE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may unpack to before it is refused.

    Args:
        max_bytes: bytes unpacked in total.
        max_ratio: bytes unpacked per byte of the archive; counted above 1 MiB.
        max_entries: files and folders, folders that are only implied by a path included.
        max_depth: parts of a path.
        max_name_bytes: bytes of a whole path; a part never has more than 255.
        max_seconds: wall time of the extraction.
    """

    max_bytes: int = 256 * 2**30
    max_ratio: float = 200.0
    max_entries: int = 1_000_000
    max_depth: int = 32
    max_name_bytes: int = 1024
    max_seconds: float = 6 * 3600.0


@dataclass(frozen=True)
class Member:
    """One file or folder of an archive; the `chunks` of a file have to be read before the next member."""

    name: str
    is_folder: bool
    executable: bool
    chunks: Iterator[bytes]


class Budget:
    """What one extraction has used of its limits; the one place where a refusal is worded.

    Args:
        archive: the archive that is read.
        limits: how far it may go.
        name: what messages call it.
    """

    def __init__(self, archive: Path, limits: ArchiveLimits, name: str) -> None:
        self.name, self.limits = name, limits
        self.archive_bytes = archive.stat().st_size
        self.max_bytes = min(limits.max_bytes, max(RATIO_FREE_BYTES, int(limits.max_ratio * self.archive_bytes)))
        self.bytes = self.entries = 0
        self._end = time.monotonic() + limits.max_seconds

    def spend(self, num_bytes: int, member: str | None = None) -> None:
        """Count unpacked bytes and look at the clock; IntegrityError beyond a limit."""
        self.bytes += num_bytes
        if self.bytes > self.max_bytes:
            raise self.refuse(f"it unpacks to more than {self.max_bytes:,} bytes, the most allowed here", member)
        if time.monotonic() > self._end:
            raise self.refuse(f"it takes longer than {self.limits.max_seconds:g} s", member)

    def count_entry(self, member: str) -> None:
        """Count one file or folder; IntegrityError beyond the limit."""
        self.entries += 1
        if self.entries > self.limits.max_entries:
            raise self.refuse(f"it holds more than {self.limits.max_entries:,} files and folders", member)

    def refuse(self, reason: str, member: str | None = None) -> IntegrityError:
        """The error that names archive and member; nothing of the archive is kept."""
        where = f", member {member!a}" if member is not None else ""
        return IntegrityError(
            f"refused to unpack {self.name}{where}: {reason}",
            why="nothing was unpacked: an archive is unpacked completely or not at all",
            fix="get an intact copy from its owner; if it is merely too large, pass limits=ArchiveLimits(...)",
        )
