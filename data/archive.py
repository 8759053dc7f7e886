"""Unpacking zip and tar files so that a hostile or damaged one can do nothing: no links, no escape, no bombs.

Members are written into a hidden staging folder next to where they belong and take their names only when all
of them are there, so a refusal, a full disk or a kill leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from flashtask.core.errors import FlashtaskError, IntegrityError, MissingInputError, OutputError, StorageError
from flashtask.core.files import staging_folder
from flashtask.data.archive_members import (
    CHUNK,
    DAMAGE,
    HIDDEN,
    ArchiveLimits,
    Listing,
    Member,
    RefusedError,
    is_known,
    name_taken,
    read_members,
)

__all__ = ["HIDDEN", "ArchiveLimits", "extract_archive", "is_archive", "name_taken", "names_in", "place", "staging_for"]
__all__ += ["unpack"]

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
        names = unpack(Path(path), staging, limits or ArchiveLimits(), taken=names_in(folder))
        place(staging, folder)
    return names


def names_in(folder: Path) -> frozenset[str]:
    """What a folder holds; nothing if it does not exist."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def is_archive(path: Path, name: str) -> bool:
    """Whether to unpack a file: its name says so, or without a suffix its first bytes."""
    if _SUFFIXES.search(name):
        return True
    if Path(name).suffix:
        return False
    with path.open("rb") as file:
        return is_known(file.read(512))


@contextlib.contextmanager
def staging_for(folder: Path) -> Iterator[Path]:
    """An empty hidden folder on the file system of `folder`, gone at the end with all it still holds.

    It lies inside `folder` if that exists (it may be a mount point), else beside it.
    """
    home = folder if folder.is_dir() else folder.parent
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, [path for path in (home, *home.parents) if not path.is_dir()])
        try:
            home.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(staging_folder(home, f"{HIDDEN}extracting"[1:]))
        except OSError as error:
            raise OutputError(f"cannot write to {home}", why=str(error), fix="choose another folder") from error
        yield staging


def _remove_if_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def unpack(
    path: Path, staging: Path, limits: ArchiveLimits, *, taken: Collection[str] = (), called: str = ""
) -> tuple[str, ...]:
    """Write the members of an archive into an empty folder and give their top-level names.

    The archive is read twice: nothing is written before all its headers were checked, and each is checked again
    when its file is written.

    Args:
        path: the archive.
        staging: an empty folder of our own.
        limits: how much it may be.
        taken: names that may not appear at the top level.
        called: the archive's name for messages, if not that of its file.
    """
    if not path.is_file():
        raise MissingInputError(f"no archive at {path}", fix="check the path")
    name, started, member = called or path.name, time.monotonic(), None
    try:
        for is_written in (False, True):
            with path.open("rb") as file:
                listing = Listing(os.fstat(file.fileno()).st_size, limits, taken, started)
                with contextlib.closing(read_members(file, listing)) as members:
                    for member in members:
                        parts = listing.add(member)
                        if is_written:
                            _write(member, staging.joinpath(*parts), listing)
            member = None
    except FlashtaskError:
        raise
    except RefusedError as error:
        raise _refusal(name, error.reason, error.member) from error
    except (*DAMAGE, OSError) as error:
        # The errors of decompressors have no number; an offset that is nonsense gives EINVAL.
        if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
            reason = f"it is damaged, cut short or followed by garbage ({error})"
            raise _refusal(name, reason, member.name if member else None) from error
        raise StorageError(
            f"unpacking {name} into {staging.parent} failed",
            why=f"{error.strerror or error}; {shutil.disk_usage(staging).free:,} bytes free",
            fix="free some space or choose a folder on another disk, then run it again",
        ) from error
    return tuple(sorted(os.listdir(staging)))


def _write(member: Member, target: Path, listing: Listing) -> None:
    folder = target if member.is_folder else target.parent
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if member.is_folder:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    mode = 0o755 if member.is_executable else 0o644
    with os.fdopen(os.open(target, flags, mode), "wb") as file, member.open() as content:
        while chunk := content.read(CHUNK):
            listing.check()
            file.write(chunk)
        if file.tell() != member.size:
            raise RefusedError(f"{file.tell():,} bytes where its header says {member.size:,}", member.name)


def _refusal(archive: str, reason: str, member: str | None) -> IntegrityError:
    where = f", member {member!a}" if member is not None else ""
    return IntegrityError(
        f"refused to unpack {archive}{where}: {reason}",
        why="nothing was unpacked: an archive is unpacked completely or not at all",
        fix="get an intact copy from its owner; if it is merely too large, pass limits=ArchiveLimits(...)",
    )


def place(staging: Path, folder: Path, *, last: str | None = None) -> None:
    """Give what is in staging its final names: one rename if `folder` is not there, else one for each entry.

    Args:
        staging: the complete content.
        folder: the target.
        last: an entry that goes last and may replace an older one (a marker).
    """
    moved: list[str] = []
    try:
        if not os.path.lexists(folder):
            os.rename(staging, folder)
            return
        for name in sorted(os.listdir(staging), key=lambda name: name == last):
            if name != last and os.path.lexists(folder / name):
                raise name_taken(str(folder / name))
            os.replace(staging / name, folder / name)
            moved.append(name)
    except BaseException as error:
        for name in moved:
            os.replace(folder / name, staging / name)
        if isinstance(error, OSError) and not isinstance(error, FlashtaskError):
            why, fix = str(error), "choose another folder"
            raise OutputError(f"cannot move the files into {folder}", why=why, fix=fix) from error
        raise
