"""The CSV log, in the run folder or in another one."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import yaml

from flashtask.core.files import PathLike, atomic_write, atomic_write_text, storage_error
from flashtask.trainer.loggers.libraries import plain_value
from flashtask.trainer.loggers.logger import FolderLogger, SilentLogger

__all__ = ["CSVLogger"]


class CSVLogger(FolderLogger):
    """`metrics.csv` (a row an epoch), `steps.csv` (values of steps), `evaluations.csv` (of `validate` and `test`).

    Rows of epochs are written at once, those of steps when the log is flushed.

    Args:
        save_dir: write a log besides that in the run folder, to `<save_dir>/<name>/<version>`, with the
            hyper-parameters in `hparams.yaml`; None means the one in the run folder.
        name: of the folder of all versions; none if not given.
        version: of the run: a text, or a number for `version_<number>`; the run folder's name if not given.

    Raises:
        UsageError: a name or version without `save_dir`.
    """

    instead = {
        "prefix": 'self.log("prefix/loss", ...)',
        "flush_logs_every_n_steps": "Trainer(flush_logs_every_n_steps=...)",
    }
    _epochs: _Table | None = None
    _steps: _Table | None = None

    def __init__(
        self, save_dir: PathLike | None = None, name: str | None = None, version: int | str | None = None
    ) -> None:
        super().__init__(save_dir, name, version)
        self._waiting: list[dict[str, str]] = []

    @property
    def experiment(self) -> CSVLogger:
        """The logger itself, ready for `log_metrics`; nothing in processes other than the first."""
        if not self._is_written_here():
            return cast("CSVLogger", SilentLogger(self))
        self.open_outside_of_a_fit()
        return self

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Begin the files; those of a resumed run are cut back to its checkpoint."""
        is_begun = self._is_begun_in(folder, step)
        if not is_begun:
            self._open(folder)
        assert self._epochs is not None
        assert self._steps is not None
        if self.folder is not None and not step and self._epochs.path.exists():
            warnings.warn(f"the log of an earlier run in {self._here} is replaced", stacklevel=2)
        self._epochs.replace(_columns_of(rows := [_texts(row) for row in history]), rows)
        if not is_begun:
            self._steps.cut_back(step)

    def start_again(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Append to the files that are there."""
        self._open(folder)

    def _open(self, folder: Path) -> None:
        self.close()
        self._here, self._waiting = self._place(folder), []
        self._here.mkdir(parents=True, exist_ok=True)
        self._mark(True)
        self._epochs, self._steps = _Table(self._here / "metrics.csv"), _Table(self._here / "steps.csv")

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """Write `hparams.yaml`; what is in the run folder has `recipe.yaml` for that."""
        if self.folder is not None and values:
            assert self._here is not None, "hyper-parameters come after start"
            path = self._here / "hparams.yaml"
            known = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
            atomic_write_text(path, yaml.safe_dump({**known, **plain_value(values)}, sort_keys=False))

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Keep a row for `steps.csv`."""
        if not values:
            return
        self._waiting.append(_texts({"epoch": epoch, "step": step, **values}))
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()

    def log_epoch(self, row: dict[str, float]) -> None:
        """Append a row to `metrics.csv`."""
        assert self._epochs is not None, "log_epoch comes after start"
        self._epochs.append([_texts(row)])

    def log_evaluation(self, stage: str, values: dict[str, float], step: int, epoch: int) -> None:
        """Append a row to `evaluations.csv`."""
        assert self._here is not None, "log_evaluation comes after start"
        row = {"stage": stage, **_texts({"epoch": epoch, "step": step, **values})}
        _Table(self._here / "evaluations.csv").append([row])

    def flush(self) -> None:
        """Append the rows that are kept to `steps.csv`."""
        if self._steps is not None and self._waiting:
            self._steps.append(self._waiting)
            self._waiting = []

    def close(self, error: BaseException | None = None) -> None:
        """Write what is still kept, and let the files go."""
        self.flush()
        self._epochs = self._steps = None
        self._mark(False)


#: rows of steps that are kept at the most, even without a flush
_MOST_WAITING = 1000


class _Table:
    """A CSV file that grows by rows. They are in the file alone: when a new column appears, it is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []

    def replace(self, columns: list[str], rows: Iterable[dict[str, str]]) -> None:
        """Replace the file; without columns it is removed."""
        self.columns = columns
        if not columns:
            self.path.unlink(missing_ok=True)
            return
        with atomic_write(self.path) as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8", newline="")
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
            file.detach()  # closing is for the one who opened it

    def cut_back(self, step: int) -> None:
        """Keep the rows up to a step, for a resumed run; a file without rows is removed."""

        def is_kept(row: dict[str, str]) -> bool:
            return (row.get("step") or "").isdigit() and int(row["step"]) <= step

        first = next(filter(is_kept, self._rows()), None) if step and self.path.exists() else None
        self.replace(list(first or ()), filter(is_kept, self._rows()))

    def append(self, rows: list[dict[str, str]]) -> None:
        """Add rows at the end; new columns, or a file that was removed, have it written again."""
        if not self.columns and self.path.exists():
            self.columns = list(next(self._rows(), ()))
        columns, exists = _columns_of([dict.fromkeys(self.columns, ""), *rows]), self.path.exists()
        if columns != self.columns or not exists:
            self.replace(columns, chain(self._rows() if self.columns and exists else (), rows))
            return
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns, restval="").writerows(rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _rows(self) -> Iterator[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            # The last line may be one that a killed process did not finish.
            yield from csv.DictReader(line for line in file if line.endswith("\n"))


def _texts(row: dict[str, float]) -> dict[str, str]:
    return {name: format(value, ".6g") if isinstance(value, float) else str(value) for name, value in row.items()}


def _columns_of(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
