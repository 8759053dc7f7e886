"""Where logged values go: the base of all loggers, of those that write files, and what writes nothing."""

from __future__ import annotations

import atexit
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.files import PathLike
from flashtask.trainer.by_name import NamedPart

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["FolderLogger", "Logger", "SilentLogger"]


class Logger(NamedPart):
    """Base of loggers; every method may be left as it is.

    The engine calls the methods of the first group. A logger that has Lightning's methods (`log_metrics`,
    `log_hyperparams`, `save`, `finalize`) in their place works as well, whatever class it has.
    """

    #: the trainer whose run it logs, or has logged last
    trainer: Trainer | None = None
    #: arguments that Lightning's logger has and this one has not: what to write in their place
    instead: Mapping[str, str] = {}
    #: arguments with which it can be used before a fit
    _alone = 'save_dir="logs"'
    _is_open = False

    # ---- what the engine calls

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """A fit begins in a run folder; a resumed one has rows already, and the step that it continues from."""

    def start_again(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Log more after a fit, or without one: the values of `validate` and `test`, or what a script logs itself."""
        self.start(folder, history, step)

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """The hyper-parameters of module and data, once at the start of a fit."""

    def draw_together(self, chart: str) -> None:
        """Values whose names begin with `<chart>/` are series of one chart."""

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Values of a step by name; called every `log_every_n_steps` steps."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row of an epoch; `epoch` and `step` are among its names."""

    def log_evaluation(self, stage: str, values: dict[str, float], step: int, epoch: int) -> None:
        """The values of `trainer.validate` or `trainer.test`, at the step that the fit has reached."""
        self.log_step(values, step, epoch)

    def flush(self) -> None:
        """Write down everything that was logged so far, so that a kill after this loses none of it."""

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended, well or with an error; it may never have started."""

    # ---- how the engine keeps track of it

    @property
    def is_open(self) -> bool:
        """Whether it was started, and not closed since."""
        return self._is_open

    def attach(self, trainer: Trainer) -> None:
        """A run of a trainer begins; in the middle of another trainer's run it goes on logging that one."""
        if self.trainer is None or self.trainer.active_run is None:
            self.trainer = trainer

    def begin(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Start, and note it."""
        self.start(folder, history, step)
        self._mark(True)

    def end(self, error: BaseException | None = None) -> None:
        """Close, and note it."""
        self._mark(False)
        self.close(error)

    def _mark(self, is_open: bool) -> None:
        self._is_open = is_open

    # ---- what modules and scripts call, by Lightning's names

    @property
    def name(self) -> str:
        """What messages call it: `csv` for a `CSVLogger`."""
        return type(self).__name__.removesuffix("Logger").lower() or "logger"

    @property
    def version(self) -> int | str | None:
        """What distinguishes this run from others of the same name; None if there is nothing like it."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The folder that it was given, else the run folder; None before there is one."""
        folder = None if self.trainer is None else self.trainer.claimed_folder
        return None if folder is None else str(folder)

    @property
    def log_dir(self) -> str | None:
        """The folder of this run's files; None before there is one."""
        return self.save_dir

    @property
    def root_dir(self) -> str | None:
        """The folder that holds the folders of all versions."""
        return self.save_dir

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values besides those of `Module.log`.

        Args:
            metrics: numbers or scalar tensors by name; one called `epoch` is their epoch.
            step: that they belong to; the fit's optimizer step if not given.
        """
        if not self._is_written_here():
            return
        values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        trainer = self.trainer
        epoch = values.pop("epoch", 0 if trainer is None else trainer.current_epoch)
        if step is None:
            step = values.pop("step", 0 if trainer is None else trainer.global_step)
        self.open_outside_of_a_fit()
        self.log_step(values, int(step), int(epoch))

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Log hyper-parameters besides those of module and data."""
        if self._is_written_here():
            self.open_outside_of_a_fit()
            self.log_hyperparameters(vars(params) if isinstance(params, Namespace) else dict(params))

    def save(self) -> None:
        """Write down everything that was logged so far."""
        self.flush()

    def finalize(self, status: str = "success") -> None:
        """Close it; only a script that logs outside of runs needs to."""
        self.end()

    def open_outside_of_a_fit(self) -> None:
        """Start, unless a run has started it: in the folder of the last fit, or in a place of its own.

        Raises:
            UsageError: it would write to the run folder, and there is none, or its fit is not ready yet.
        """
        if self.is_open:
            return
        trainer = self.trainer
        fit = None if trainer is None else trainer.fit_run
        if trainer is None or fit is None or trainer.run_folder is None:
            self._start_alone()
        elif fit.is_prepared or fit.resume_from is None:
            self.start_again(trainer.run_folder.path, fit.rows, fit.global_step)
        else:
            raise self._too_early()
        self._mark(True)
        if trainer is None or trainer.active_run is None:  # a run closes what was opened in it
            atexit.register(self.close)

    @property
    def needs_run_folder(self) -> bool:
        """Whether the values of an evaluation without a fit, which has no run folder, are not for it."""
        return False

    def _start_alone(self) -> None:
        """Start where no fit has made a run folder."""
        if self.trainer is None:
            raise self._too_early()
        self.start(self.trainer.default_root_dir, [], 0)

    def _too_early(self) -> UsageError:
        kind = type(self).__name__
        return UsageError(
            f"{kind} has no place to write to before a fit has begun",
            fix=f"{kind}({self._alone}), or use it in a hook: self.logger.experiment in on_train_start",
        )

    def _is_written_here(self) -> bool:
        """Whether this process writes logs; of several, the first one does."""
        return self.trainer is None or self.trainer.is_global_zero


class SilentLogger(Logger):
    """What a module finds as its logger where nothing is to be written: any call on it does nothing.

    `self.logger.experiment.add_image(...)` of a module goes on working with `fast_dev_run`, and in all processes.

    Args:
        real: the logger that the first process writes to, whose name and folder are the same everywhere.
    """

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> SilentLogger:
        """Nothing happens."""
        return self

    @property
    def name(self) -> str:
        """The name of the logger that it replaces."""
        return str(getattr(self._real, "name", "silent"))

    @property
    def version(self) -> int | str | None:
        """The version of the logger that it replaces."""
        return getattr(self._real, "version", None)

    @property
    def save_dir(self) -> str | None:
        """The folder of the logger that it replaces."""
        return getattr(self._real, "save_dir", None)

    @property
    def root_dir(self) -> str | None:
        """The folder of all versions of the logger that it replaces."""
        return getattr(self._real, "root_dir", None)

    @property
    def log_dir(self) -> str | None:
        """The folder of the run of the logger that it replaces."""
        return getattr(self._real, "log_dir", None)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing is logged."""

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Nothing is logged."""


class FolderLogger(Logger):
    """Base of loggers that write files: to `<save_dir>/<name>/<version>`, or without a `save_dir` to the run folder.

    Without a version, that is the name of the run folder, so that a resumed run finds its files. It is the next free
    `version_0`, `version_1`, ... if the logger is used, or asked for its version, before a fit.
    """

    def __init__(self, save_dir: PathLike | None, name: str | None, version: int | str | None) -> None:
        self.folder = None if save_dir is None else Path(save_dir)
        self._name, self._version = name, version
        if self.folder is None and (name is not None or version is not None):
            kind = type(self).__name__
            raise UsageError(
                f"{kind}(name=..., version=...) without save_dir writes to the run folder, which has its own name",
                fix=f'{kind}("logs", name="mine"), or Trainer(output_dir=...) for another run folder',
            )
        #: the folder of this run's files, once that is known
        self._here: Path | None = None

    @property
    def name(self) -> str:
        """The name that it was given, else that of its kind: `csv`."""
        return self._name or super().name

    @property
    def save_dir(self) -> str | None:
        """The folder that it was given, else the run folder; None before there is one."""
        return super().save_dir if self.folder is None else str(self.folder)

    @property
    def root_dir(self) -> str | None:
        """The folder that holds the folders of all versions."""
        return self.save_dir if self.folder is None else str(self.folder / (self._name or ""))

    @property
    def version(self) -> int | str | None:
        """The version that it was given, else the name of the run folder, else the next free number."""
        if self._version is not None or self.folder is None:
            return self._version
        if self.trainer is not None and self.trainer.claimed_folder is not None:
            return self.trainer.claimed_folder.name
        root = self.folder / (self._name or "")
        names = [path.name.removeprefix("version_") for path in root.glob("version_*")]
        self._version = max((int(name) for name in names if name.isdigit()), default=-1) + 1
        return self._version

    @property
    def log_dir(self) -> str | None:
        """The folder of this run's files; None before there is one."""
        if self._here is not None:
            return str(self._here)
        if self.folder is None:
            return None if self.save_dir is None else str(self._place(Path(self.save_dir)))
        return str(self._place(Path(str(self.version))))

    @property
    def needs_run_folder(self) -> bool:
        """Whether it was given no folder."""
        return self.folder is None

    def _place(self, folder: Path) -> Path:
        """The folder of the files of the run in a run folder."""
        if self.folder is None:
            return folder
        version = folder.name if self._version is None else self._version
        return self.folder / (self._name or "") / (f"version_{version}" if isinstance(version, int) else version)

    def _is_begun_in(self, folder: Path, step: int) -> bool:
        """Whether a script has opened it before the fit, in the same place, and the fit continues none."""
        return self.is_open and not step and self._here == self._place(folder)

    def _start_alone(self) -> None:
        if self.folder is not None:
            self.start_again(Path(str(self.version)), [], 0)  # an earlier run's files may be there
        elif self.trainer is not None and self.trainer.active_run is not None:
            self.start(self.trainer.folder_for_evaluation(), [], 0)
        else:
            raise self._too_early()
