"""Where logged values go: the base of all loggers, and the CSV log."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from flashtask.core.files import atomic_write, storage_error
from flashtask.trainer.by_name import NamedPart

__all__ = ["CSVLogger", "Logger"]


class Logger(NamedPart):
    """Base of loggers; every method may be left as it is."""

    @property
    def name(self) -> str:
        """What messages call it: `csv` for a `CSVLogger`."""
        return type(self).__name__.removesuffix("Logger").lower() or "logger"

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """A fit begins in a run folder; a resumed one has rows already, and the step that it continues from."""

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """The hyper-parameters of module and data, once at the start of a fit."""

    def draw_together(self, chart: str) -> None:
        """Values whose names begin with `<chart>/` are series of one chart."""

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Values of a step by name; called every `log_every_n_steps` steps."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row of an epoch; `epoch` and `step` are among its names."""

    def flush(self) -> None:
        """Write down everything that was logged so far, so that a kill after this loses none of it."""

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended, well or with an error; it may never have started."""


class SilentLogger(Logger):
    """What a module finds as its logger where nothing is to be written: any call on it does nothing.

    `self.logger.experiment.add_image(...)` of a module goes on working with `fast_dev_run`.
    """

    def __getattr__(self, name: str) -> SilentLogger:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> SilentLogger:
        return self


class CSVLogger(Logger):
    """`metrics.csv` (a row an epoch) and `steps.csv` (values of steps) in the run folder.

    Rows of epochs are written at once, those of steps when the log is flushed.
    """

    _epochs: _Table | None = None
    _steps: _Table | None = None

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Begin the files; those of a resumed run are cut back to where it stands."""
        self._waiting: list[dict[str, str]] = []
        self._epochs, self._steps = _Table(folder / "metrics.csv"), _Table(folder / "steps.csv")
        self._epochs.replace(_columns_of(rows := [_texts(row) for row in history]), rows)
        self._steps.cut_back(step)

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

    def flush(self) -> None:
        """Append the rows that are kept to `steps.csv`."""
        if self._steps is not None and self._waiting:
            self._steps.append(self._waiting)
            self._waiting = []

    def close(self, error: BaseException | None = None) -> None:
        """Write what is still kept, and let the files go."""
        self.flush()
        self._epochs = self._steps = None


#: rows of steps that are kept at the most, even if nobody asks for a flush
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
