"""Files whose bytes were compared with the hub's hash: once in full, afterwards by size and time alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import FlashtaskError
from flashtask.core.files import atomic_write, atomic_write_text
from flashtask.core.hub.listing import Entry
from flashtask.core.plain_json import canonical_json, read_json

__all__ = ["place", "wrong_with"]

_BLOCK = 2**20


def wrong_with(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file's bytes, in words; None if they are the promised ones.

    A file that was compared before, and has the same size and time of change since, is not read again.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    real = Path(os.path.realpath(path))
    before = os.stat(real)
    if not stat.S_ISREG(before.st_mode):
        return "it is not a regular file"
    if before.st_size != entry.size:
        return f"it has {before.st_size:,} bytes, the hub promised {entry.size:,}"
    if _is_remembered(real, before, entry):
        return None
    found = _digest(real, entry)
    if found != entry.digest:
        return f"its {entry.method} hash is {found}, the hub promised {entry.digest}"
    after = os.stat(real)
    if (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
        _remember(real, after, entry)
    return None


def place(file: Path, target: Path) -> None:
    """Put a compared file under its own name into the folder that is handed out: a link, where links can be had.

    Raises:
        StorageError, OSError: the folder cannot be written.
    """
    real = os.path.realpath(file)
    if os.path.realpath(target) == real:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}.link")
    beside.unlink(missing_ok=True)
    for link in (os.symlink, os.link):
        try:
            link(real, beside)
        except OSError:
            continue  # Windows without the right to make links, or another disk
        os.replace(beside, target)
        return
    with open(real, "rb") as source, atomic_write(target) as copy:
        shutil.copyfileobj(source, copy, _BLOCK)


def _digest(path: Path, entry: Entry) -> str:
    hasher = hashlib.sha256() if entry.method == "sha256" else hashlib.sha1(usedforsecurity=False)
    if entry.method == "git":
        hasher.update(b"blob %d\0" % entry.size)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _note(path: Path) -> Path:
    return cache_folder() / "hub" / "checked" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:40]}.json"


def _stamp(status: os.stat_result, entry: Entry) -> str:
    return canonical_json({"hash": entry.key, "size": status.st_size, "time": status.st_mtime_ns})


def _is_remembered(path: Path, status: os.stat_result, entry: Entry) -> bool:
    with suppress(OSError, FlashtaskError):
        return canonical_json(read_json(_note(path))) == _stamp(status, entry)
    return False


def _remember(path: Path, status: os.stat_result, entry: Entry) -> None:
    note = _note(path)
    with suppress(OSError):  # a cache that cannot be written only costs time
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(note, _stamp(status, entry))
