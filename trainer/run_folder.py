"""The folder of a run: claimed before the first step, never overwritten."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from flashtask.core.errors import OutputError, StorageError
from flashtask.core.files import atomic_write_text, remove_partials
from flashtask.core.plain_json import number_or_null
from flashtask.trainer.distribution.heartbeat import start_of

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "files_of_a_run", "owner_of", "remove_remains", "require_no_run", "was_begun_by_us"]

#: the file that names the torchrun job that writes a folder: a script that it restarts continues there
_MARK = ".attempt"
_RUN_FILES = (
    *("recipe.yaml", "metrics.csv", "steps.csv", "split.csv", "best.ckpt", "last.ckpt", "summary.json"),
    "report.html",
)


def files_of_a_run(folder: Path) -> list[str]:
    """The files of a run that are in a folder; any of them, or a link of that name to nothing, makes it taken."""
    checkpoints = sorted(path.name for path in folder.glob("*.ckpt")) if folder.is_dir() else []
    return list(dict.fromkeys([*(name for name in _RUN_FILES if os.path.lexists(folder / name)), *checkpoints]))


def require_no_run(folder: Path) -> None:
    """The folder holds no run; whether it can be made is not asked.

    Raises:
        OutputError: it is taken, or a run is going on in it.
    """
    if found := files_of_a_run(folder):
        if owner := _owner(folder):
            raise _in_use(folder, owner)
        has_checkpoint = any(name.endswith(".ckpt") for name in found)
        continuing = 'continue that run: ckpt_path="last" (--resume)'
        removing = f"remove it, since it was stopped before its first checkpoint: rm -r {folder}"
        raise OutputError(
            f"the run folder {str(folder)!r} is taken: it already holds a run ({', '.join(found)})",
            why="a run is never overwritten",
            fix=f"choose another output_dir (--output-dir), or {continuing if has_checkpoint else removing}",
        )


def owner_of(folder: Path) -> str:
    """The process that is running in a folder, as `process 123 on machine`; empty if there is none."""
    try:
        with (folder / ".lock").open() as lock:
            if fcntl is None:
                return ""
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except OSError:
        pass
    return ""


class RunFolder:
    """A folder that belongs to one run at a time.

    Args:
        path: of the folder; it is made if it does not exist.
        resume: it may already hold a run's files.
        made: the folders that were made for this run already.

    Raises:
        OutputError: it cannot be made or written, is taken, or another process is running in it.
    """

    def __init__(self, path: Path, *, resume: bool = False, made: list[Path] | None = None) -> None:
        self.path = path.absolute()
        if not resume:
            require_no_run(path)
        self._lock: IO[str] | None = None
        self._made = made or _missing(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._holds_our_lock():
                raise BlockingIOError  # the owner before removed the file that was locked here
        except BlockingIOError:
            self._refuse_second_owner()
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}", fix="choose another --output-dir") from error
        assert self._lock is not None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock.flush()
        remove_partials(self.path)
        _leave_mark(self.path)
        self._links_before = self._links()

    @classmethod
    def next_free(cls, root: Path) -> RunFolder:
        """`root/runs/NNN`, the first free number."""
        runs = root / "runs"
        made = _missing(runs)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            numbers = [int(entry.name) for entry in runs.iterdir() if entry.name.isdigit()]
            number = max(numbers, default=-1) + 1
            while True:
                try:
                    (runs / f"{number:03d}").mkdir()
                    break
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise OutputError(
                f"cannot make a run folder in {runs}: {error.strerror}",
                fix="Trainer(default_root_dir=...), or --output-dir on the command line",
            ) from error
        path = (runs / f"{number:03d}").absolute()
        return cls(path, made=[path, *made])

    def _refuse_second_owner(self) -> None:
        assert self._lock is not None
        self._lock.close()
        raise _in_use(self.path, (self.path / ".lock").read_text().strip())

    def require_unchanged(self) -> None:
        """The folder is still the one that was claimed, and its files are no links to files elsewhere.

        Raises:
            StorageError: it was removed or replaced, or a file of the run has become a link.
        """
        if not self._holds_our_lock():
            raise StorageError(
                f"the run folder {self.path} was removed or replaced while the run was going on",
                fix="begin the run again, and leave its folder in place until it ends",
            )
        if linked := self._links() - self._links_before:
            names = ", ".join(sorted(linked))
            raise StorageError(
                f"{names} in {self.path} became a link while the run was going on",
                why="what the link points to would be replaced",
                fix=f"remove the link and continue: --resume --output-dir {self.path}",
            )

    def _holds_our_lock(self) -> bool:
        if self._lock is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / ".lock").stat())
        except OSError:
            return False

    def _links(self) -> set[str]:
        return {name for name in files_of_a_run(self.path) if (self.path / name).is_symlink()}

    def write_recipe(self, recipe: dict[str, Any] | None) -> None:
        """Write `recipe.yaml`, if the run can be described by names and numbers."""
        if recipe is not None:
            atomic_write_text(self.path / "recipe.yaml", yaml.safe_dump(_lists(recipe), sort_keys=False))

    def write_split(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write the part and the name of each sample to `split.csv`, if there are any."""
        content = io.StringIO()
        table = csv.writer(content, lineterminator="\n")
        table.writerow(("part", "name"))
        empty = content.tell()
        table.writerows(rows)
        if content.tell() > empty:
            atomic_write_text(self.path / "split.csv", content.getvalue())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write how the run ended to `summary.json`."""
        summary["best"] = {name: number_or_null(value) for name, value in summary["best"].items()}
        atomic_write_text(self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def release(self) -> None:
        """Let another run continue here; folders that were made for it and hold nothing go again."""
        if self._lock is not None:
            if self._holds_our_lock():  # else it is that of another run
                (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
            _wipe_mark(self.path)
        for folder in self._made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def remove_remains(folder: Path) -> None:
    """Take away what a run wrote before its first checkpoint.

    Raises:
        OutputError: it is still going on.
    """
    claimed = RunFolder(folder, resume=True)
    try:
        for name in files_of_a_run(folder):
            (folder / name).unlink()
    finally:
        claimed.release()


def _owner(folder: Path) -> str:
    """The process whose run is going on in a folder; empty if there is none, or if that cannot be known."""
    if fcntl is None:
        return ""
    with suppress(OSError), (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip() or "another process"
    return ""


def _in_use(folder: Path, owner: str) -> OutputError:
    return OutputError(f"{folder} is in use by {owner or 'another process'}", fix="wait for it, or stop it")


def _missing(path: Path) -> list[Path]:
    """The folders that have to be made for a path, the innermost first."""
    return [folder for folder in (path.absolute(), *path.absolute().parents) if not folder.exists()]


def _lists(value: Any) -> Any:
    """Tuples as lists: YAML's safe form has no tuples."""
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


# ---- which folder an earlier attempt of the same torchrun wrote


def _leave_mark(folder: Path) -> None:
    """Under torchrun: note in a run folder that this job writes it."""
    if (job := _torchrun_job()) is not None:
        with suppress(OSError):
            (folder / _MARK).write_text(job, "utf-8")


def _wipe_mark(folder: Path) -> None:
    """Take the note away, if the folder holds nothing else."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_MARK]:
            (folder / _MARK).unlink()


def was_begun_by_us(folder: Path) -> bool:
    """Whether torchrun has started this process again, and an earlier attempt wrote this run folder."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (folder / _MARK).read_text("utf-8") == _torchrun_job()
    except OSError:
        return False


def _torchrun_job() -> str | None:
    """A name for this torchrun: the id that the user or torchrun gave it, else its agent's process."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":
        return job
    agent = os.getppid()
    return f"agent {agent} of {start_of(agent)} on {platform.node()}"
