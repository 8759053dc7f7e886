"""Where output goes, looked at before anything expensive: can it be created, and is the run folder taken?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from flashtask.core.errors import OutputError
from flashtask.trainer.run_folder import require_no_run

__all__ = ["require_creatable", "require_free", "require_writable_file"]


def require_free(folder: Path) -> None:
    """A run can be written here: the folder can be made or is there, and holds no run.

    Raises:
        OutputError: it is taken, a file, below a file, read-only, or no possible name.
    """
    require_creatable(folder)
    require_no_run(folder)


def require_writable_file(path: Path) -> None:
    """A file can be written here, in a folder that is there; a file of that name will be replaced.

    Raises:
        OutputError: the folder is not there or read-only, or the path is a folder.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a folder", fix=f"--output {path / 'predictions.csv'}")
    if not path.absolute().parent.exists():
        raise OutputError(f"cannot write {str(path)!r}: there is no such folder", fix=f"mkdir -p {path.parent}")
    require_creatable(path.absolute().parent)


def require_creatable(folder: Path) -> None:
    """The folder is there and can be written to, or can be made.

    Raises:
        OutputError: with what stands in the way.
    """
    for place in (folder, *folder.parents):
        try:
            mode = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise _in_the_way(folder, f"{str(place)!r} is a broken link") from None
            continue
        except OSError as error:
            raise _in_the_way(folder, error.strerror or str(error)) from error
        if not stat.S_ISDIR(mode):
            raise _in_the_way(folder, f"{str(place)!r} is a file")
        if not os.access(place, os.W_OK | os.X_OK):
            raise _in_the_way(folder, f"{str(place)!r} is not writable")
        return


def _in_the_way(folder: Path, why: str) -> OutputError:
    return OutputError(f"cannot create output in {str(folder)!r}", why=why, fix="choose a folder that you can write to")
