"""What was found out about files, remembered by path, size and times, so that a second look reads no file.

Two things are remembered: the hash of a file's content, and what a check, which has a name, found out about it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flashtask.core.cache_folder import cache_folder
from flashtask.core.files import sha256_file

__all__ = ["content_hashes", "known_notes", "remember_notes", "stamps_of"]

# Seconds in which a file may change again within the same tick of its file system's clock: that of the time of
# modification, which programs can also set, and that of the time of change, which the kernel sets.
_SETTLED, _TICK = 2.0, 0.1
_CHUNK = 500
#: Notes of one kind at the most; the oldest are dropped first.
_MOST = 2_000_000

_TABLES = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)",
    "CREATE TABLE IF NOT EXISTS notes (path TEXT, stamp TEXT, name TEXT, note TEXT, PRIMARY KEY (path, name))",
)


def stamps_of(paths: Sequence[str]) -> dict[str, str]:
    """What distinguishes a file from a changed one, by path. Missing: what is not there, or changed a moment ago.

    The time of change (`st_ctime`) is part of it, because `tar`, `cp -a` and `rsync -t` give new content the size and
    the time of modification of the old.
    """
    now, found = time.time(), {}
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            if status.st_mtime < now - _SETTLED and status.st_ctime < now - _TICK:
                found[path] = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
    return found


def content_hashes(paths: Sequence[str]) -> list[str]:
    """The SHA-256 of each file, in the order of the paths; files that are as they were when hashed before are not read.

    Raises:
        OSError: a file cannot be read.
        MissingInputError: a file is not there.
    """
    stamps = stamps_of(paths)  # before reading: a file that changes meanwhile is not taken for known the next time
    with _database() as database:
        rows = _rows(database, "SELECT path, stamp, sha256 FROM files WHERE path IN ({})", list(stamps))
        found = {path: hashed for path, stamp, hashed in rows if stamps[path] == stamp}
        missing = [path for path in dict.fromkeys(paths) if path not in found]
        if missing:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                found |= zip(missing, pool.map(sha256_file, missing), strict=True)
        _write(database, "files", [(path, stamps[path], found[path]) for path in missing if path in stamps])
    return [found[path] for path in paths]


def known_notes(stamps: Mapping[str, str], check: str) -> dict[str, str]:
    """What `remember_notes` was given for the files that have the same stamp, by the same check.

    Args:
        stamps: of `stamps_of`.
        check: what was looked at, and by which versions.
    """
    query = "SELECT path, stamp, note FROM notes WHERE path IN ({}) AND name = ?"
    with _database() as database:
        rows = _rows(database, query, list(stamps), check)
        return {path: note for path, stamp, note in rows if stamps[path] == stamp}


def remember_notes(stamps: Mapping[str, str], check: str, notes: Mapping[str, str]) -> None:
    """Remember what a check found out about files.

    Args:
        stamps: of the files as they were before the check read them; a file without one is not remembered.
        check: as in `known_notes`.
        notes: by path.
    """
    rows = [(path, stamps[path], check, note) for path, note in notes.items() if path in stamps]
    if rows:
        with _database() as database:
            _write(database, "notes", rows)


def _file() -> Path:
    return cache_folder() / "files.sqlite"


@contextmanager
def _database() -> Iterator[sqlite3.Connection | None]:
    """The notes; None where they cannot be kept, which costs time and nothing else."""
    connection = None
    with suppress(OSError, sqlite3.Error):
        _file().parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(_file(), timeout=10)
        for table in _TABLES:
            connection.execute(table)
    if connection is None:
        yield None
        return
    with closing(connection):
        yield connection


def _rows(
    database: sqlite3.Connection | None, query: str, paths: Sequence[str], *further: str
) -> list[tuple[str, ...]]:
    """What a query finds for paths, which replace `{}` in it."""
    rows: list[tuple[str, ...]] = []
    if database is not None:
        with suppress(sqlite3.Error, UnicodeError):  # a name that is no text is not remembered
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                rows += database.execute(query.format(marks), (*chunk, *further)).fetchall()
    return rows


def _write(database: sqlite3.Connection | None, table: str, rows: Sequence[tuple[str, ...]]) -> None:
    if database is not None and rows:
        places = ", ".join("?" * len(rows[0]))
        with suppress(sqlite3.Error, UnicodeError), database:
            database.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)
            database.execute(f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", (_MOST,))
