"""Content of files by hash, remembered by path, size and time of change, so that a second look reads no file."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flashtask.core.cache import cache_folder
from flashtask.core.files import sha256_file

__all__ = ["content_hashes", "forget_hashes"]

# A file that changed a moment ago may change again within the same tick of its file system's clock.
_SETTLED = 2.0
_CHUNK = 500


def content_hashes(paths: Sequence[str]) -> list[str]:
    """The SHA-256 of each file, in the order of the paths; files that are as they were when hashed before are not read.

    Raises:
        OSError: a file cannot be read.
    """
    stamps = [_stamp(path) for path in paths]
    with _database() as database:
        known = _look_up(database, paths)
        missing = [n for n, path in enumerate(paths) if known.get(path, ("", ""))[0] != stamps[n]]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            found = dict(zip(missing, pool.map(sha256_file, (paths[n] for n in missing)), strict=True))
        settled = time.time() - _SETTLED
        rows = [(paths[n], stamps[n], hashed) for n, hashed in found.items() if os.stat(paths[n]).st_mtime < settled]
        _remember(database, rows)
    return [found[n] if n in found else known[path][1] for n, path in enumerate(paths)]


def forget_hashes() -> None:
    """Forget every hash."""
    for name in ("", "-wal", "-shm"):
        Path(f"{_file()}{name}").unlink(missing_ok=True)


def _stamp(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _file() -> Path:
    return cache_folder() / "files.sqlite"


@contextmanager
def _database() -> Iterator[sqlite3.Connection | None]:
    """The notes; None where they cannot be kept, which costs time and nothing else."""
    connection = None
    with suppress(OSError, sqlite3.Error):
        _file().parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(_file(), timeout=10)
        connection.execute("CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)")
    if connection is None:
        yield None
        return
    with closing(connection):
        yield connection


def _look_up(database: sqlite3.Connection | None, paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    known: dict[str, tuple[str, str]] = {}
    if database is None:
        return known
    with suppress(sqlite3.Error):
        for start in range(0, len(paths), _CHUNK):
            chunk = list(paths[start : start + _CHUNK])
            marks = ",".join("?" * len(chunk))
            query = f"SELECT path, stamp, sha256 FROM files WHERE path IN ({marks})"
            known |= {path: (stamp, hashed) for path, stamp, hashed in database.execute(query, chunk)}
    return known


def _remember(database: sqlite3.Connection | None, rows: list[tuple[str, str, str]]) -> None:
    if database is not None and rows:
        with suppress(sqlite3.Error), database:
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
