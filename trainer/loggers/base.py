"""Where logged values go: the base of all loggers, the CSV log, and what `Trainer(logger=...)` means."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.files import atomic_write, storage_error
from flashtask.core.registry import Registry, RegistryEntry
from flashtask.trainer.by_name import NamedPart, make_parts

__all__ = ["LOGGERS", "CSVLogger", "Logger", "library", "make_loggers", "no_run_yet", "require_library"]


class Logger(NamedPart):
    """Base of loggers; every method may be left as it is."""

    @property
    def name(self) -> str:
        """What messages call it: `csv` for a `CSVLogger`."""
        return type(self).__name__.removesuffix("Logger").lower() or "logger"

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """A fit begins in a run folder; a resumed one brings the rows and the step it stands at."""

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """The hyper-parameters of module and data."""

    def draw_together(self, chart: str) -> None:
        """Values whose names begin with `<chart>/` are series of one chart."""

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Values of a step, every `log_every_n_steps`."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row of an epoch; `epoch` and `step` are among its names."""

    def flush(self) -> None:
        """Everything told so far is on disk when this returns, where that is in the logger's power."""

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
        """Write the file anew; without columns there is none."""
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
        """Keep the rows up to a step, for a resumed run; without any there is no file."""

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
            # A line that a killed process did not finish is no row.
            yield from csv.DictReader(line for line in file if line.endswith("\n"))


def _texts(row: dict[str, float]) -> dict[str, str]:
    return {name: format(value, ".6g") if isinstance(value, float) else str(value) for name, value in row.items()}


def _columns_of(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


# ---- loggers by name


class _Shipped:
    """The loggers of this package; each is imported when it is asked for."""

    entries = {
        "csv": ("base", "CSVLogger", "metrics.csv and steps.csv in the run folder"),
        "tensorboard": ("tensorboard_logger", "TensorBoardLogger", "TensorBoard's event files in the run folder"),
        "wandb": ("wandb_logger", "WandbLogger", "Weights & Biases, online or offline"),
        "mlflow": ("mlflow_logger", "MLFlowLogger", "MLflow, on a server or in the run folder"),
    }

    def names(self) -> Iterable[str]:
        return self.entries

    def spellings(self) -> Iterable[str]:
        return self.entries

    def find(self, name: str) -> RegistryEntry | None:
        if name not in self.entries:
            return None
        module, attribute, description = self.entries[name]
        metadata = {"provider": "flashtask", "description": description}
        return RegistryEntry(
            name, "logger", metadata, partial(_imported, f"flashtask.trainer.loggers.{module}", attribute)
        )


def _imported(module: str, attribute: str) -> Any:
    return getattr(import_module(module), attribute)


LOGGERS: Registry[type[Logger]] = Registry("logger")
LOGGERS.add_source(_Shipped())


def make_loggers(given: Any) -> list[Logger]:
    """The loggers that `Trainer(logger=...)` means; the CSV log is always among them, unless it is False.

    Args:
        given: True or None (the CSV log, and TensorBoard's where it is installed), False, a name, a name with options
            (`("wandb", {"offline": True})` or `{"wandb": {"offline": True}}`), a `Logger`, or a list of these.

    Raises:
        UnknownNameError: no logger has this name, or the logger no such option.
        UsageError: something else was given, a class in place of an object, one logger twice, or a logger whose
            library is not installed.
    """
    if given is False:
        return []
    if given is True or given is None:
        # These stand on this module, so they are imported late.
        from flashtask.trainer.loggers.tensorboard_logger import TensorBoardLogger, is_available

        return [CSVLogger(), *([TensorBoardLogger()] if is_available() else [])]
    needed = UsageError(
        f"Trainer(logger={given!r}): True, False, a Logger, a name, or a list of loggers and names is needed",
        fix='logger="wandb", logger=("wandb", {"offline": True}), or class Mine(flashtask.Logger)',
    )
    made: list[Logger] = make_parts(given, LOGGERS, Logger, "logger", needed)
    csv_logs = sum(isinstance(one, CSVLogger) for one in made)
    names = [one for one in given if isinstance(one, str)] if isinstance(given, (list, tuple)) else []
    if csv_logs > 1 or len({id(one) for one in made}) < len(made) or len({*names}) < len(names):
        raise UsageError(
            f"Trainer(logger=...): one logger is given twice in {', '.join(one.name for one in made)}",
            why="it would write each value twice",
            fix="name it once; the CSV log need not be named",
        )
    return made if csv_logs else [CSVLogger(), *made]


def no_run_yet(logger: Logger) -> UsageError:
    """The error for asking a logger for what it has only while a run is going on."""
    kind = type(logger).__name__
    return UsageError(
        f"{kind}.experiment is there only while a run is going on",
        fix=f"use it in a hook: logger = {kind}(), and logger.experiment in on_train_start",
    )


# ---- libraries that not everybody has


def require_library(name: str, wanted_by: str, command: str) -> None:
    """Look whether a library is there, without importing it.

    Args:
        name: what is imported.
        wanted_by: which logger needs it.
        command: what installs it.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec(name) is None:
        raise UsageError(f"{wanted_by} needs {name}, which is not installed", fix=command)


def library(name: str, wanted_by: str, command: str) -> Any:
    """Import a library, or a module of one, that not everybody has; arguments as for `require_library`.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    require_library(name.partition(".")[0], wanted_by, command)
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{wanted_by} needs {name}, which cannot be imported", why=str(error), fix=f"{command} --upgrade"
        ) from error
