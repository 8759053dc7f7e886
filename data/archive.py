"""Unpacking zip and tar files so that a hostile or damaged one can do nothing: no links, no escape, no bombs.

Members are written into a hidden staging folder next to where they belong and take their names only when all
of them are there, so a refusal, a full disk or a kill leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

from flashtask.core.errors import FlashtaskError, MissingInputError, OutputError, StorageError
from flashtask.data.archive_limits import ArchiveLimits, Budget, Member
from flashtask.data.archive_names import HIDDEN, Names, name_taken
from flashtask.data.archive_tar import DECOMPRESSORS, tar_members
from flashtask.data.archive_zip import zip_members

__all__ = ["ArchiveLimits", "extract_archive", "is_archive", "place", "staging_for", "unpack"]

_STAGING = f"{HIDDEN}extracting-"
_SUFFIXES = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)


def extract_archive(path: str | Path, folder: str | Path, limits: ArchiveLimits | None = None) -> tuple[str, ...]:
    """Unpack a zip, tar, tar.gz, tar.bz2 or tar.xz file into a folder, all of it or nothing.

    Only regular files and folders are taken. Links, devices, paths that are absolute or hold `..`, a
    backslash or NUL, duplicate names and names that differ only in case are refused. Files get mode
    0644 or 0755. A folder that exists keeps what it holds; none of the archive's top-level names may be
    among it.

    Args:
        path: the archive; its content says which format it is.
        folder: where to unpack; made if it does not exist.
        limits: sizes, counts and time; `ArchiveLimits()` if not given.

    Returns:
        The names at the top level of the archive, sorted.

    Raises:
        MissingInputError: there is no such archive.
        IntegrityError: the archive is damaged, hostile or beyond the limits.
        OutputError: the folder cannot be made, or a name is taken.
        StorageError: writing failed, for instance because the disk is full.
    """
    folder = Path(os.path.abspath(folder))
    with staging_for(folder) as staging:
        names = unpack(Path(path), staging, limits or ArchiveLimits(), taken=_names_in(folder))
        place(staging, folder)
    return names


def is_archive(path: Path, name: str) -> bool:
    """Whether to unpack a file: its name says so, or without a suffix its first bytes."""
    if _SUFFIXES.search(name):
        return True
    return not Path(name).suffix and _members_reader(path) is not None


@contextlib.contextmanager
def staging_for(folder: Path) -> Iterator[Path]:
    """An empty hidden folder on the file system of `folder`, gone at the end with all it still holds.

    It lies inside `folder` if that exists (it may be a mount point), else beside it.
    """
    home = folder if folder.is_dir() else folder.parent
    made = _make_folders(home)
    try:
        _remove_abandoned(home)
        staging = home / f"{_STAGING}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            staging.mkdir(mode=0o755)
        except OSError as error:
            raise _cannot(f"write to {home}", error) from error
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        _remove_if_empty(made)


def unpack(
    path: Path, staging: Path, limits: ArchiveLimits, *, taken: Collection[str] = (), called: str = ""
) -> tuple[str, ...]:
    """Write the members of an archive into an empty folder and give their top-level names.

    Args:
        path: the archive.
        staging: an empty folder of our own.
        limits: how much it may be.
        taken: names that may not appear at the top level; said before the work, not after it.
        called: the archive's name for messages, if not that of its file.
    """
    if not path.is_file():
        raise MissingInputError(f"no archive at {path}", fix="check the path")
    budget = Budget(path, limits, called or path.name)
    reader = _members_reader(path)
    if reader is None:
        raise budget.refuse(f"it is neither zip nor tar; it starts with {_first_bytes(path)[:16]!r}")
    names = Names(budget, taken)
    try:
        with contextlib.closing(reader(path, budget)) as members:
            for member in members:
                _write(member, names, staging)
    except FlashtaskError:
        raise
    except OSError as error:
        free = shutil.disk_usage(staging).free
        raise StorageError(
            f"unpacking {budget.name} into {staging.parent} failed",
            why=f"{error.strerror or error}; {budget.bytes:,} bytes unpacked so far, {free:,} bytes free",
            fix="free some space or choose a folder on another disk, then run it again",
        ) from error
    return tuple(sorted(os.listdir(staging)))


def place(staging: Path, folder: Path, *, last: str | None = None) -> None:
    """Give what is in staging its final names: one rename if `folder` is not there, else one for each entry.

    Args:
        staging: the complete content.
        folder: the target.
        last: an entry that goes last and may replace an older one (a marker).
    """
    try:
        if not os.path.lexists(folder):
            os.rename(staging, folder)
            return
        names = sorted(os.listdir(staging), key=lambda name: (name == last, name))
        for name in names:
            if name != last and os.path.lexists(folder / name):
                raise name_taken(str(folder / name))
        _move_all(names, staging, folder)
    except FlashtaskError:
        raise
    except OSError as error:
        raise _cannot(f"move the files into {folder}", error) from error


def _write(member: Member, names: Names, staging: Path) -> None:
    parts = names.accept(member.name, member.is_folder)
    target = staging.joinpath(*parts)
    if member.is_folder:
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        for _ in member.chunks:  # the reader's own checks still run
            pass
        return
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(target, flags, 0o755 if member.executable else 0o644), "wb") as file:
        for chunk in member.chunks:
            file.write(chunk)


def _members_reader(path: Path) -> Callable[[Path, Budget], Generator[Member, None, None]] | None:
    start = _first_bytes(path)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return zip_members
    if start.startswith(tuple(DECOMPRESSORS)) or start[257:262] == b"ustar":
        return tar_members
    return None


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _move_all(names: list[str], staging: Path, folder: Path) -> None:
    moved: list[str] = []
    try:
        for name in names:
            os.replace(staging / name, folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(folder / name, staging / name)
        raise


def _cannot(what: str, error: OSError) -> OutputError:
    return OutputError(f"cannot {what}", why=str(error), fix="choose another folder")


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents and say which are new, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_if_empty(missing)
        raise _cannot(f"make the folder {folder}", error) from error
    return missing


def _remove_if_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "", socket.gethostname())[:64] or "host"


def _remove_abandoned(home: Path) -> None:
    """Clear staging folders of processes that were killed on this machine."""
    mine = re.compile(re.escape(f"{_STAGING}{_host()}-") + r"([0-9]{1,9})-[0-9a-f]{8}")
    for entry in os.scandir(home):
        found = mine.fullmatch(entry.name)
        if found and os.name == "posix" and not _is_alive(int(found[1])):
            shutil.rmtree(entry.path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
