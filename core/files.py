"""Files that are either whole or not there: written beside the target, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from flashtask.core.errors import FlashtaskError, IntegrityError, MissingInputError, StorageError, did_you_mean

__all__ = [
    "PathLike",
    "atomic_write",
    "atomic_write_text",
    "missing_file",
    "open_regular",
    "remove_partials",
    "sha256_file",
    "staging_folder",
    "storage_error",
]

PathLike = str | os.PathLike[str]

_PARTIAL = re.compile(r"\..*\.partial-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}", re.DOTALL)
#: Files in a folder that was given in the place of a file.
_FILES_OF_OURS = (".ckpt", ".safetensors", ".yaml", ".yml", ".json")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# Containers restart with the same pid, so "the pid is alive" is no proof when it is our own: this set is.
_being_written: set[str] = set()


@contextmanager
def atomic_write(path: PathLike, *, size: int | None = None) -> Iterator[BinaryIO]:
    """Gives a binary file whose content replaces `path` in one step when the block ends without an error.

    Until then, and after any error or kill, `path` is what it was. A symlink is followed: the file it
    points at is replaced, the link stays. Permissions of a replaced file are kept. The folder must exist.

    Args:
        path: the file to write.
        size: bytes that will be written, if known; only used in the message of a failure.

    Raises:
        StorageError: the file cannot be written, synced or renamed (disk full, read-only, a folder is there).
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(_partial_name(target.name))
    file: BinaryIO | None = None
    _being_written.add(partial.name)
    try:
        file = _create(partial, target)
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(partial, target)
        _sync_folder(target.parent)
    except BaseException as error:
        written = _discard(file, partial)
        if _is_about(error, partial, target):
            raise storage_error(error, target, size if size is not None else written) from error
        raise
    finally:
        _being_written.discard(partial.name)


def atomic_write_text(path: PathLike, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) in one step; errors as `atomic_write`."""
    data = text.encode(errors="surrogateescape")  # a file name that is not UTF-8 keeps its bytes
    with atomic_write(path, size=len(data)) as file:
        file.write(data)


@contextmanager
def staging_folder(home: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Gives an empty hidden folder in `home`, gone at the end with all that is still in it.

    Args:
        home: a folder; what killed processes left in it is removed first.
        name: start of the new folder's name, after a dot.
    """
    remove_partials(home)
    staging = Path(home, _partial_name(name))
    _being_written.add(staging.name)
    try:
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _being_written.discard(staging.name)


def remove_partials(folder: str | os.PathLike[str]) -> list[Path]:
    """Removes what killed processes of this machine left behind while writing, and gives those paths.

    Files and folders that a living process may still be writing, or that another machine wrote, are left alone.

    Raises:
        StorageError: a leftover cannot be removed.
    """
    folder = Path(folder)
    removed = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        match = _PARTIAL.fullmatch(name)
        if not match or match["host"] != _HOST or _may_be_written(name, int(match["pid"])):
            continue
        try:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove the leftover {folder / name}: {error.strerror}", fix=f"rm -r {folder / name}"
            ) from error
        removed.append(folder / name)
    return removed


def sha256_file(path: PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        MissingInputError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise missing_file(path) from error


def open_regular(path: PathLike) -> BufferedReader:
    """Opens a file for reading if it is an ordinary one: a pipe or a device could block, or never end.

    Links are followed.

    Raises:
        MissingInputError: there is no such file, or it is a folder.
        IntegrityError: it is a pipe, a socket or a device.
        OSError: the system does not let it be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing_file(path) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise missing_file(path)
        raise IntegrityError(
            f"{os.fspath(path)} is a pipe or a device, not a file",
            fix=f"give the path of a regular file, which `ls -l {os.fspath(path)}` is not",
        )
    return os.fdopen(descriptor, "rb")


def missing_file(path: PathLike) -> MissingInputError:
    """The error for a file that was asked for and is not there; it names the nearest file that is."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in _FILES_OF_OURS and entry.is_file())
        inside.sort(key=lambda name: (name != "best.ckpt", not name.endswith(".ckpt")))
        fix = f"did you mean {str(path / inside[0])!r}?" if inside else ""
        return MissingInputError(f"{path} is a folder, not a file", fix=fix)
    if path.exists() and not path.is_file():
        return MissingInputError(f"{path} is a pipe or a device, not a file")
    folder = path.parent
    if not folder.is_dir():
        return MissingInputError(f"no file {path}", why=f"there is no folder {folder}")
    close = did_you_mean(path.name, os.listdir(folder))
    return MissingInputError(f"no file {path}", fix=close or f"see what is there: `ls {folder}`")


def _partial_name(name: str) -> str:
    # A name may have 255 bytes; the tail added here needs about 45 of them.
    short = os.fsencode(name)[:200].decode(errors="ignore")
    return f".{short}.partial-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _create(partial: Path, target: Path) -> BinaryIO:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        # Renaming over a folder fails late, over a device or a loop of links it succeeds and does harm.
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ELOOP if stat.S_ISLNK(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code), str(target))
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(partial, flags, 0o666), "wb")
    if mode is not None:
        os.chmod(partial, stat.S_IMODE(mode))
    return file


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder; its rename is journaled.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system has no such operation
            raise
    finally:
        os.close(descriptor)


def _discard(file: BinaryIO | None, partial: Path) -> int:
    """Closes and removes the partial file, and counts the bytes that it was given."""
    written = 0
    if file is not None and not file.closed:
        with suppress(OSError):
            written = file.tell()
        with suppress(OSError):  # closing flushes once more, into the same full disk
            file.close()
    with suppress(OSError):
        partial.unlink(missing_ok=True)
    return written


def _may_be_written(name: str, pid: int) -> bool:
    if pid == os.getpid():
        return name in _being_written
    if os.name == "nt":
        return True  # os.kill(pid, 0) would end the process there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_about(error: BaseException, partial: Path, target: Path) -> bool:
    """Whether an error is of this write, and not of another file that the block touched."""
    ours = (None, str(partial), str(target), str(target.parent))
    is_os_error = isinstance(error, OSError) and not isinstance(error, FlashtaskError)
    return is_os_error and getattr(error, "filename", None) in {*ours, *map(Path, filter(None, ours))}


def storage_error(error: BaseException, target: Path, needed: int = 0) -> StorageError:
    """The error for a write that failed, with the file and what can be done.

    Args:
        error: of the system.
        target: the file that was written.
        needed: bytes that were to be written, if known.
    """
    code = getattr(error, "errno", None) or errno.EIO
    free = f"{_free_bytes(target.parent)} are free in {target.parent}"
    why = f"{needed:,} bytes are needed, {free}" if needed else f"{free.replace(' are', ' bytes are', 1)}"
    return StorageError(f"cannot write {target}: {os.strerror(code)}", why=why, fix=_fix(code, target))


def _free_bytes(folder: Path) -> str:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _fix(code: int, target: Path) -> str:
    folder = target.parent
    fixes = {
        errno.ENOSPC: f"free some space (`df -h {folder}`) or write to another disk",
        errno.EDQUOT: "free some of your quota (`quota -s`) or write to another disk",
        errno.EFBIG: "raise the limit for the size of a file: `ulimit -f unlimited`",
        errno.EROFS: "write to a folder that is not on a read-only disk",
        errno.EACCES: f"choose a folder you may write to (`ls -ld {folder}`)",
        errno.EPERM: f"choose a folder you may write to (`ls -ld {folder}`)",
        errno.ENOENT: f"mkdir -p {folder}",
        errno.ENOTDIR: f"a file is in the way of the folder: `ls -ld {folder}`",
        errno.EISDIR: f"give a file name, for example {target / 'model.ckpt'}",
        errno.EINVAL: f"give the path of a regular file, which `ls -l {target}` is not",
        errno.ELOOP: f"remove the link that points at itself: `rm {target}`",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    return fixes.get(code, f"check the disk (`df -h {folder}`, `dmesg | tail`) or write to another one")
