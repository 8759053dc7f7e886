"""Where logged values go. The CSV log is always written: one row an epoch, and one for each logged step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

__all__ = ["CSVLogger", "Logger"]


class Logger:
    """Base of loggers; every method may be left as it is."""

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """A fit begins in a run folder; a resumed one brings the rows and the step it stands at."""

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """The hyper-parameters of module and data."""

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Values of a step, every `log_every_n_steps`."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row of an epoch."""

    def close(self) -> None:
        """The run has ended."""


class CSVLogger(Logger):
    """`metrics.csv` (a row an epoch) and `steps.csv` (values of steps) in the run folder."""

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Begin the files; those of a resumed run are cut back to where it stands."""
        self._epochs = _Table(folder / "metrics.csv", [])
        self._steps = _Table(folder / "steps.csv", _rows_up_to(folder / "steps.csv", step))
        for row in history:
            self._epochs.rows.append(_texts(row))
        self._epochs.rewrite()
        self._steps.rewrite()

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Append a row to `steps.csv`."""
        if values:
            self._steps.append(_texts({"epoch": epoch, "step": step, **values}))

    def log_epoch(self, row: dict[str, float]) -> None:
        """Append a row to `metrics.csv`."""
        self._epochs.append(_texts(row))


class _Table:
    """A CSV file that grows by rows, and is rewritten when a new column appears."""

    def __init__(self, path: Path, rows: list[dict[str, str]]) -> None:
        self.path, self.rows = path, rows
        self.columns: list[str] = []

    def rewrite(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if not self.columns:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def append(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        if any(name not in self.columns for name in row):
            self.rewrite()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


def _texts(row: dict[str, float]) -> dict[str, str]:
    return {name: format(value, ".6g") if isinstance(value, float) else str(value) for name, value in row.items()}


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of a steps file that a resumed run keeps."""
    if not path.exists() or not step:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("step", "").isdigit() and int(row["step"]) <= step]
