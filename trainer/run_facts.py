"""Properties of a trainer that look into its runs: position, metrics, data, optimizers, files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.optim import Optimizer

from flashtask.core.errors import UsageError
from flashtask.core.files import PathLike
from flashtask.core.metric_value import metric_values
from flashtask.core.model_path import model_path, refuse_address
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.callbacks.early_stopping import EarlyStopping
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.data_loaders import length_of
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.devices.precision import Precision
from flashtask.trainer.distribution.process_strategies import Strategy
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.loggers.adapted_logger import TakesMetrics, as_called
from flashtask.trainer.loggers.csv_logger import CSVLogger
from flashtask.trainer.loggers.logger import Logger, SilentLogger
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import ScheduledRate
from flashtask.trainer.run import EvaluationRun, Run, at_most
from flashtask.trainer.run_folder import RunFolder
from flashtask.trainer.run_preparation import device_plan_of, limit_of

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["RunFacts"]


class RunFacts:
    """Base of `Trainer`: properties that look into its runs."""

    #: the last fit, running or over: the one of `callback_metrics`, `save_checkpoint` and `ckpt_path="best"`
    fit_run: FitRun | None = None
    #: the run that is worked on now
    active_run: Run | None = None
    run_folder: RunFolder | None = None
    strategy: Strategy
    callbacks: list[Callback]
    default_root_dir: Path
    enable_checkpointing: bool
    fast_dev_run: bool | int
    _given_output_dir: Path | None
    _claimed_folder: Path | None
    #: as they were given, in every process
    given_loggers: list[Logger | TakesMetrics]
    #: the same, with the methods that the engine calls
    called_loggers: list[Logger]
    num_sanity_val_steps: int
    #: the checkpoint that the stage that runs, or ran last, was given; None without one
    ckpt_path: Path | None = None
    #: of the evaluation that came after the last fit: what callbacks and what loggers are given
    _last_metrics: dict[str, float]
    _last_logged: dict[str, float]
    #: stage -> the loaders of its last run
    _loaders: dict[str, list[Any]]

    def __init__(self) -> None:
        self._last_metrics, self._last_logged, self._loaders = {}, {}, {}

    @property
    def current_fit(self) -> FitRun:
        """The fit that is running, else the last one.

        Raises:
            UsageError: there was none.
        """
        if self.fit_run is None:
            raise UsageError("this trainer has fitted nothing yet", fix="trainer.fit(model, datamodule=data)")
        return self.fit_run

    @property
    def current_run(self) -> Run:
        """The run that is worked on now.

        Raises:
            UsageError: nothing is running.
        """
        if self.active_run is None:
            raise UsageError("this trainer is running nothing now", fix="call this in a hook or a step")
        return self.active_run

    @property
    def current_epoch(self) -> int:
        """The epoch of the fit run, counted from 0."""
        return self.fit_run.epoch if self.fit_run is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps that the fit run has taken."""
        return self.fit_run.global_step if self.fit_run is not None else 0

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The last values of all metrics: of the fit run, and of the evaluation that runs now or came after it.

        They are `MetricValue`s: numbers that also have the methods of a tensor. Once `finetune` has put the best
        epoch's weights back, the values are that epoch's. In a training step they include what was logged in it.
        """
        fit, active = self.fit_run, self.active_run
        values = dict(fit.metrics if fit is not None else {})
        return metric_values(values | (self._last_metrics if active is None else active.live_metrics))

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole run; infinite if it has no known end."""
        total = self.fit_run.total_steps if self.fit_run is not None else None
        return float("inf") if total is None else total

    @property
    def sanity_checking(self) -> bool:
        """Whether the few validation batches before training run now."""
        return isinstance(self.active_run, EvaluationRun) and self.active_run.is_sanity_check

    @property
    def should_stop(self) -> bool:
        """Whether the fit ends after this step, or when `min_epochs` and `min_steps` allow it; set it to end one."""
        return self.fit_run is not None and bool(self.fit_run.stop_reason)

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if self.fit_run is not None:
            self.fit_run.stop("trainer.should_stop was set") if value else self.fit_run.go_on()

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and prints."""
        return self.strategy.is_global_zero

    @property
    def global_rank(self) -> int:
        """The number of this process, counted from 0."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, counted from 0."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The number of the machine, counted from 0."""
        return self.global_rank // self.num_devices

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.strategy.world_size

    @property
    def device_ids(self) -> list[int]:
        """The numbers of the devices of this machine that runs use, one for each process."""
        return list(device_plan_of(cast("Trainer", self)).devices)

    @property
    def num_devices(self) -> int:
        """How many devices of this machine runs use."""
        return len(self.device_ids)

    @property
    def precision_plugin(self) -> Precision:
        """The number format of the run that is worked on, else of the last fit, else of runs to come."""
        run = self.active_run or self.fit_run
        return run.precision if run is not None else device_plan_of(cast("Trainer", self)).precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler of `16-mixed`; None in other formats."""
        return getattr(self.precision_plugin, "scaler", None)

    # ---- what is done now

    @property
    def training(self) -> bool:
        """Whether a fit is in its training steps, and not in validation."""
        return isinstance(self.active_run, FitRun)

    @property
    def validating(self) -> bool:
        """Whether validation runs, during a fit too, but for its sanity check."""
        return self._evaluates("validate") and not self.sanity_checking

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self._evaluates("test")

    @property
    def predicting(self) -> bool:
        """Whether a prediction runs."""
        return self._evaluates("predict")

    @property
    def evaluating(self) -> bool:
        """Whether validation or a test runs."""
        return self.validating or self.testing

    def _evaluates(self, stage: str) -> bool:
        return isinstance(self.active_run, EvaluationRun) and self.active_run.stage == stage

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C or a signal has ended the last fit."""
        return self.fit_run is not None and self.fit_run.interrupted_by is not None

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch that is trained on is the last of its epoch; False if the loader does not know."""
        run = self.fit_run
        return run is not None and run.batch_idx == run.batches_in_epoch

    # ---- files, module, data

    @property
    def output_dir(self) -> Path:
        """The run folder.

        Raises:
            UsageError: there is none yet.
        """
        if self.run_folder is None and self._claimed_folder is not None and not self.is_global_zero:
            return self._claimed_folder
        if self.run_folder is None:
            raise UsageError("there is no run folder yet", fix="it is made when a fit starts")
        return self.run_folder.path

    @property
    def claimed_folder(self) -> Path | None:
        """The run folder as every process knows it; None before there is one, or where nothing is written."""
        return self._claimed_folder

    @property
    def module(self) -> Module | None:
        """The module of the run that is worked on, else of the last fit; also `model`."""
        run = self.active_run or self.fit_run
        return run.module if run is not None else None

    model = module

    @property
    def datamodule(self) -> DataModule | None:
        """The data module of the run that is worked on, else of the last fit."""
        run = self.active_run or self.fit_run
        return run.data if run is not None else None

    @property
    def train_dataloader(self) -> Any:
        """The loader that the fit trains on."""
        return self.fit_run.loader if self.fit_run is not None else None

    @property
    def val_dataloaders(self) -> list[Any]:
        """The loaders that the fit validates on."""
        run = self.fit_run
        return run.validation.loaders if run is not None and run.validation is not None else []

    @property
    def test_dataloaders(self) -> list[Any]:
        """The loaders of the test that runs, else of the last one."""
        return self._loaders_of("test")

    @property
    def predict_dataloaders(self) -> list[Any]:
        """The loaders of the prediction that runs, else of the last one."""
        return self._loaders_of("predict")

    def _loaders_of(self, stage: str) -> list[Any]:
        run = self.active_run
        return run.loaders if isinstance(run, EvaluationRun) and run.stage == stage else self._loaders.get(stage, [])

    def _batches_of(self, stage: str, loaders: list[Any]) -> list[int | float]:
        limits = [limit_of(getattr(self, f"limit_{stage}_batches"), loader) for loader in loaders]
        found = [at_most(length_of(loader), limit) for loader, limit in zip(loaders, limits, strict=True)]
        return [float("inf") if one is None else one for one in found]

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches in a pass over each loader of validation; infinite if the loader does not know."""
        return self._batches_of("val", self.val_dataloaders)

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches that the sanity check takes from each loader of validation."""
        steps = self.num_sanity_val_steps
        return [one if steps < 0 else min(steps, one) for one in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Batches in a test, for each loader; infinite if the loader does not know."""
        return self._batches_of("test", self.test_dataloaders)

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches in a prediction, for each loader; infinite if the loader does not know."""
        return self._batches_of("predict", self.predict_dataloaders)

    @property
    def num_training_batches(self) -> int | float:
        """Batches in an epoch of the fit; infinite if the loader does not know."""
        batches = self.fit_run.batches_in_epoch if self.fit_run is not None else None
        return float("inf") if batches is None else batches

    @property
    def log_dir(self) -> str:
        """The run folder, as text; before there is one the folder that was given for it, else `default_root_dir`."""
        known = self.claimed_folder if self.run_folder is None else self.run_folder.path
        return str(known or self._given_output_dir or self.default_root_dir)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """All callbacks that stop a fit by a metric."""
        return [one for one in self._known_callbacks if isinstance(one, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first callback that stops a fit by a metric; None without one."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, of the user or of the run that is worked on."""
        return next((one for one in self._known_callbacks if isinstance(one, ProgressBar)), None)

    @property
    def _known_callbacks(self) -> list[Callback]:
        run = self.active_run or self.fit_run
        return self.callbacks if run is None or not run.callbacks else run.callbacks

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """All checkpoint callbacks of the fit."""
        run = self.fit_run
        return [one for one in run.callbacks if isinstance(one, ModelCheckpoint)] if run is not None else []

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first of them: the one whose best weights `finetune` puts back."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the fit."""
        return self.fit_run.optimizers if self.fit_run is not None else []

    @property
    def lr_scheduler_configs(self) -> list[ScheduledRate]:
        """The schedulers of the fit with their settings."""
        return self.fit_run.schedulers if self.fit_run is not None else []

    @property
    def loggers(self) -> list[Any]:
        """All loggers; in processes other than the first, stand-ins on which every call does nothing."""
        return [*self.given_loggers] if self.is_global_zero else [SilentLogger(one) for one in self.given_loggers]

    @loggers.setter
    def loggers(self, loggers: list[Logger | TakesMetrics]) -> None:
        self.given_loggers, self.called_loggers = loggers, [as_called(one) for one in loggers]

    @property
    def logger(self) -> Any:
        """The first logger that the user chose, else the run folder's CSV log; None without any.

        With `fast_dev_run`, and in processes other than the first, a stand-in on which every call does nothing.
        """
        if not self.given_loggers and self.fast_dev_run:
            return SilentLogger()
        chosen = [one for one in self.given_loggers if not (type(one) is CSVLogger and one.needs_run_folder)]
        first = next(iter(chosen or self.given_loggers), None)
        return first if first is None or self.is_global_zero else SilentLogger(first)

    @property
    def logged_metrics(self) -> dict[str, float]:
        """The last values that loggers are given, of steps and of epochs: those of the fit, and of an evaluation since.

        They have the names that loggers show, such as `loss_step` and `loss_epoch`.
        """
        fit, active = self.fit_run, self.active_run
        values = dict(fit.logged_values if fit is not None else {})
        return metric_values(values | (self._last_logged if active is None else active.logged_values))

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The last values of what was logged with `prog_bar=True`."""
        run = self.active_run or self.fit_run
        return metric_values(run.results.bar_values()) if run is not None else {}

    def print(self, *values: Any, **options: Any) -> None:
        """Print, in the first process alone."""
        if self.is_global_zero:
            print(*values, **options)

    def checkpoint_file(self, ckpt_path: PathLike | None, *, continues: bool = True) -> Path | None:
        """The file that `best`, `last` or a path means; of a run folder the last checkpoint if a fit continues it."""
        if ckpt_path is None:
            return None
        if not isinstance(ckpt_path, (str, os.PathLike)) or not os.fspath(ckpt_path):
            raise UsageError(f"ckpt_path={ckpt_path!r}: a path, best or last is needed", fix='ckpt_path="last"')
        refuse_address(ckpt_path)
        if ckpt_path not in ("best", "last"):
            path = Path(ckpt_path)
            if not path.is_dir():
                return path
            return path / "last.ckpt" if continues else model_path(path)
        found = [getattr(one, f"{ckpt_path}_model_path") for one in self.checkpoint_callbacks]
        if ckpt_path == "last":  # of a run that another process began
            found += [folder / "last.ckpt" for folder in self.checkpoint_folders() if (folder / "last.ckpt").exists()]
        written = next((path for path in found if path), None)
        if written is None:
            raise UsageError(
                f'ckpt_path="{ckpt_path}": no checkpoint has been written',
                why="" if self.enable_checkpointing else "fast_dev_run=... or enable_checkpointing=False writes none",
                fix="fit first, or give the path of a file",
            )
        return Path(written)

    def checkpoint_folders(self) -> list[Path]:
        """Where a run with these arguments writes checkpoints, as far as that is known before it starts."""
        checkpoints = [one for one in self.callbacks if isinstance(one, ModelCheckpoint)]
        given = [one.given_dirpath for one in checkpoints if one.given_dirpath is not None]
        own = [] if self._given_output_dir is None else [self._given_output_dir.absolute()]
        return [*(Path(self.default_root_dir, folder).absolute() for folder in given), *own]
