"""Folders that are either whole or not there: written beside the target, synced, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashtask.core.errors import FlashtaskError, OutputError, StorageError

__all__ = ["atomic_folder", "require_replaceable"]


@contextmanager
def atomic_folder(path: str | os.PathLike[str], own_files: Collection[str]) -> Iterator[Path]:
    """Gives a folder to fill; it becomes `path` when the block ends without an error.

    Until then, and after any error or kill, `path` is what it was: not there, empty, or the folder of before. A folder
    that holds nothing but `own_files` is replaced; for that moment it has another, hidden name.

    Args:
        path: the folder; its parents are made.
        own_files: names of files that may be replaced.

    Raises:
        OutputError: there is a file of this name, a folder with other things in it, or no right to write here.
        StorageError: a write failed later.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    require_replaceable(target, own_files)
    partial = target.with_name(f".{target.name[:100]}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(
            f"cannot create {target}: {error.strerror}", fix="choose a folder that you can write to"
        ) from error
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        _put_in_place(partial, target, own_files)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FlashtaskError):
            fix = f"free some space (`df -h {target.parent}`), or choose another folder"
            raise StorageError(f"cannot write {target}: {error.strerror or error}", fix=fix) from error
        raise


def require_replaceable(target: Path, own_files: Collection[str]) -> None:
    """A folder can be written here: nothing is there, or an empty folder, or one with nothing but `own_files`.

    Raises:
        OutputError: something else is there.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"cannot write the folder {target}: there is a file of that name", fix=f"rm {target}")
    others = sorted(name for name in os.listdir(target) if name not in own_files)
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise OutputError(
            f"the folder {target} holds other files and was not changed: {shown}",
            fix="choose a folder that is new, empty, or a pretrained model already",
        )


def _put_in_place(partial: Path, target: Path, own_files: Collection[str]) -> None:
    require_replaceable(target, own_files)  # once more: writing may have taken long
    if not target.is_dir() or not os.listdir(target):
        os.rename(partial, target)  # takes the place of an empty folder too
        return
    before = partial.with_name(f"{partial.name}.before")
    os.rename(target, before)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(before, target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no such operation
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
