"""`Trainer`: configuration and verbs. What changes during a verb lives in its run."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import UsageError
from flashtask.core.seeding import last_seed
from flashtask.trainer.callbacks import Callback
from flashtask.trainer.checkpointing import ONLY_FOR_RESUMING, ModelCheckpoint, checkpoint_content
from flashtask.trainer.datamodule import GivenLoaders
from flashtask.trainer.driving import drive
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.loggers import CSVLogger, Logger
from flashtask.trainer.loop import Loops
from flashtask.trainer.preparing import check_module, data_of, evaluation_run, fit_run
from flashtask.trainer.progress import ProgressBar
from flashtask.trainer.restoring import load_checkpoint_into
from flashtask.trainer.run import EvaluationRun, Run
from flashtask.trainer.run_folder import RunFolder
from flashtask.trainer.settings import check_settings
from flashtask.trainer.stages import resolve_finetuning

__all__ = ["Trainer"]

#: Where a run writes, and objects: not part of what describes it.
_NOT_IN_RECIPES = ("output_dir", "default_root_dir", "callbacks", "logger")


class Trainer:
    """Trains, validates, tests and predicts any `Module`.

    Args:
        max_epochs: epochs at the most; 1000 if neither this nor `max_steps` is given.
        max_steps: optimizer steps at the most; -1 for no limit.
        accelerator: `auto` (CUDA, then MPS, then CPU), `cpu`, `gpu`, `cuda` or `mps`.
        devices: how many; only 1 so far.
        precision: `32`, `bf16-mixed`, `16-mixed` or `auto`; None leaves it to the module (tasks: `auto`).
        memory_format: `contiguous`, `channels_last` or `auto`; None leaves it to the module (tasks: `auto`).
        seed: of order, augmentation and model; None means that of the last `seed_everything`, else 0.
        default_root_dir: run folders are made in `runs/` below it; the working folder if not given.
        output_dir: the run folder itself; it must not hold a run yet.
        callbacks: one or a list.
        logger: True for the CSV log, False for none, or a `Logger` or a list of them beside it.
        enable_checkpointing: write `best.ckpt` and `last.ckpt`.
        enable_progress_bar: show progress; where the output is no terminal, a line an epoch.
        enable_model_summary: say at the start what trains and how.
        num_sanity_val_steps: validation batches before training; -1 for all, 0 for none.
        limit_train_batches: whole number of batches or share of them (also val, test, predict).
        check_val_every_n_epoch: validate after every so many epochs.
        log_every_n_steps: how often step values are logged.
        accumulate_grad_batches: batches for one optimizer step.
        gradient_clip_val: limit for gradients; None or 0 for none.
        gradient_clip_algorithm: `norm` (of all gradients together) or `value` (of each).

    Raises:
        UsageError: an argument that cannot be meant; the nearest right one is named.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int = -1,
        accelerator: str = "auto",
        devices: Any = "auto",
        precision: Any = None,
        memory_format: str | None = None,
        seed: int | None = None,
        default_root_dir: Any = None,
        output_dir: Any = None,
        callbacks: Any = None,
        logger: Any = True,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        num_sanity_val_steps: int = 2,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        check_val_every_n_epoch: int = 1,
        log_every_n_steps: int = 50,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        **unknown: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "unknown")}
        check_settings(given, unknown)
        self._changed = {n: v for n, v in given.items() if v != inspect.signature(Trainer).parameters[n].default}
        self.max_epochs = 1000 if max_epochs is None and max_steps < 0 else max_epochs
        self.max_steps = max_steps
        self.accelerator, self.devices = accelerator, devices
        self.precision, self.memory_format = precision, memory_format
        self._seed = seed
        self.default_root_dir = Path(default_root_dir) if default_root_dir is not None else Path.cwd()
        self._given_output_dir = Path(output_dir) if output_dir is not None else None
        self.callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        self.loggers = _loggers(logger)
        self.enable_checkpointing = enable_checkpointing
        self.enable_progress_bar, self.enable_model_summary = enable_progress_bar, enable_model_summary
        self.num_sanity_val_steps = num_sanity_val_steps
        self.limit_train_batches, self.limit_val_batches = limit_train_batches, limit_val_batches
        self.limit_test_batches, self.limit_predict_batches = limit_test_batches, limit_predict_batches
        self.check_val_every_n_epoch, self.log_every_n_steps = check_val_every_n_epoch, log_every_n_steps
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.loops = Loops()
        #: the last fit, running or over: what `callback_metrics`, `save_checkpoint` and `ckpt_path="best"` speak of
        self.fit_run: FitRun | None = None
        #: the run that is worked on now
        self.active_run: Run | None = None
        self.checkpoint_callback: ModelCheckpoint | None = None
        self.run_folder: RunFolder | None = None
        self._restored_best: Path | None = None
        self._last_metrics: dict[str, float] = {}

    # ---- verbs

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        strategy: Any = None,
    ) -> None:
        """Train; with a finetuning strategy it is the same as `finetune`.

        Args:
            model: a `Module`.
            train_dataloaders: a loader, or a `DataModule`.
            val_dataloaders: a loader or a list of them.
            datamodule: instead of loaders.
            ckpt_path: continue from this checkpoint, `"last"` for the run folder's own.
            strategy: a finetuning strategy.
        """
        if strategy is not None:
            self.finetune(model, train_dataloaders, val_dataloaders, datamodule, strategy, ckpt_path)
            return
        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        drive(fit_run(self, module, data, None, self._resolve_checkpoint(ckpt_path)), self.loops.fit)

    def finetune(
        self,
        model: Any,
        train_dataloader: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        strategy: Any = "no_freeze",
        ckpt_path: Any = None,
        restore_best: bool = True,
    ) -> None:
        """Train a module whose backbone is pretrained, freezing parts of it as the strategy says.

        Args:
            model: a `Module` with a `backbone`.
            train_dataloader: a loader, or a `DataModule`.
            val_dataloaders: a loader or a list of them.
            datamodule: instead of loaders.
            strategy: `"freeze"`, `"no_freeze"`, `("freeze_unfreeze", 5)`, `("unfreeze_milestones", ((5, 10), 5))`,
                or an object with `stages`.
            ckpt_path: continue from this checkpoint.
            restore_best: put the best epoch's weights back into the model at the end.
        """
        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloader, val=val_dataloaders)
        run = fit_run(self, module, data, resolve_finetuning(strategy), self._resolve_checkpoint(ckpt_path))
        run.restores_best = restore_best
        drive(run, self.loops.fit)

    def validate(
        self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, datamodule: Any = None
    ) -> Any:
        """Run validation; returns a list with one dictionary of metrics for each loader."""
        return self._evaluate("validate", model, dataloaders, ckpt_path, datamodule)

    def test(self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, datamodule: Any = None) -> Any:
        """Run a test; returns a list with one dictionary of metrics for each loader."""
        return self._evaluate("test", model, dataloaders, ckpt_path, datamodule)

    def predict(self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, datamodule: Any = None) -> Any:
        """What `predict_step` returns for each batch, in order: a list (of lists, where there are several loaders)."""
        return self._evaluate("predict", model, dataloaders, ckpt_path, datamodule)

    def save_checkpoint(self, path: Any, weights_only: bool = False) -> None:
        """Write the fit run's state to a file; after best weights were put back, the best epoch's whole state.

        Raises:
            UsageError: nothing has been fitted yet.
            StorageError: the file cannot be written.
        """
        if self.fit_run is None:
            raise UsageError("save_checkpoint needs a fit first", fix="trainer.finetune(model, datamodule=data)")
        if self._restored_best is None:
            content = checkpoint_content(self.fit_run)
        else:
            content = read_checkpoint(self._restored_best)
            content.pop("hyperparameters", None)
        if weights_only:
            content = {key: value for key, value in content.items() if key not in ONLY_FOR_RESUMING}
        write_checkpoint(Path(path), content)

    # ---- what a run tells

    @property
    def seed(self) -> int:
        """The seed of runs: the argument, else that of the last `seed_everything`, else 0."""
        if self._seed is not None:
            return self._seed
        last = last_seed()
        return 0 if last is None else last

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
        """The last values of all metrics: of the fit run, or of the last evaluation if there was no fit."""
        return dict(self.fit_run.metrics if self.fit_run is not None else self._last_metrics)

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
        """Whether the fit ends after this epoch; set it to True to end it."""
        return self.fit_run is not None and bool(self.fit_run.stop_reason)

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if self.fit_run is not None:
            self.fit_run.stop_reason = (self.fit_run.stop_reason or "trainer.should_stop was set") if value else ""

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and prints."""
        return True

    @property
    def output_dir(self) -> Path:
        """The run folder.

        Raises:
            UsageError: there is none yet.
        """
        if self.run_folder is None:
            raise UsageError("there is no run folder yet", fix="it is made when a fit starts")
        return self.run_folder.path

    def say(self, text: str) -> None:
        """Tell the user something: a line on standard error."""
        print(text, file=sys.stderr, flush=True)

    def recipe(self, run: FitRun) -> dict[str, Any] | None:
        """What describes the run in names and numbers, or None if its module or data cannot be described."""
        module, data = run.module.recipe(), getattr(run.data, "recipe", lambda: None)()
        if module is None or data is None:
            return None
        said = {
            **self._changed,
            "max_epochs": self.max_epochs,
            "max_steps": self.max_steps,
            "precision": str(getattr(self.precision, "name", self.precision) or run.module.default_precision),
            "seed": run.seed,
        }
        settings = {n: said[n] for n in inspect.signature(Trainer).parameters if n in said and n not in _NOT_IN_RECIPES}
        finetune = {"strategy": "no_freeze", "restore_best": False}
        if run.finetuning is not None:
            finetune = {"strategy": run.finetuning.recipe(), "restore_best": run.restores_best}
        return {
            "task": module["task"],
            "data": data,
            "model": module["model"],
            "trainer": settings,
            "finetune": finetune,
        }

    # ---- how a verb is carried out

    def callbacks_of(self, stage: str) -> list[Any]:
        """The callbacks of a run: the progress bar, the user's own, and for a fit checkpoints last."""
        bar: list[Callback] = [ProgressBar()] if self.enable_progress_bar else []
        own = [callback for callback in self.callbacks if not isinstance(callback, ModelCheckpoint)]
        if stage != "fit":
            return [*bar, *own]
        checkpoints = [callback for callback in self.callbacks if isinstance(callback, ModelCheckpoint)]
        if checkpoints and not self.enable_checkpointing:
            raise UsageError("enable_checkpointing=False contradicts a ModelCheckpoint", fix="drop one of them")
        if self.enable_checkpointing and not checkpoints:
            checkpoints = [ModelCheckpoint()]
        self.checkpoint_callback = checkpoints[0] if checkpoints else None
        return [*bar, *own, *checkpoints]

    def open_output(self, run: FitRun) -> None:
        """Claim the run folder before anything expensive happens, and make this the fit that everything speaks of."""
        folder = None
        if self.loggers or self.enable_checkpointing:
            folder = self._claim(run.resume_from)
        self.run_folder, self.fit_run, self._restored_best = folder, run, None

    def _claim(self, resume_from: Path | None) -> RunFolder:
        if self._given_output_dir is None:
            return RunFolder.next_free(self.default_root_dir)
        here = self._given_output_dir.absolute()
        return RunFolder(here, resume=resume_from is not None and resume_from.absolute().parent == here)

    def close_output(self, run: FitRun) -> None:
        """Let the run folder go; its path stays known."""
        if self.run_folder is not None and self.fit_run is run:
            self.run_folder.release()

    def restore_best(self, run: FitRun) -> None:
        """Put the best epoch's weights back into the module."""
        checkpoint = self.checkpoint_callback
        if checkpoint is None or not checkpoint.best_model_path:
            return
        path = Path(checkpoint.best_model_path)
        load_checkpoint_into(run.module, read_checkpoint(path), path)
        self._restored_best = path

    def _evaluate(self, stage: str, model: Any, dataloaders: Any, ckpt_path: Any, datamodule: Any) -> Any:
        fitted = self.fit_run
        if model is None and fitted is None:
            raise UsageError(f"trainer.{stage}() needs a model, or a fit first", fix=f"trainer.{stage}(model, ...)")
        module = check_module(model if fitted is None or model is not None else fitted.module)
        is_fitted = fitted is not None and module is fitted.module
        # Another module's own loaders are asked of that module, not of the one that was fitted.
        reusable = fitted is not None and (is_fitted or not isinstance(fitted.data, GivenLoaders))
        if dataloaders is None and datamodule is None and fitted is not None and reusable:
            datamodule = fitted.data
        data = data_of(module, datamodule, **{{"validate": "val"}.get(stage, stage): dataloaders})
        run = evaluation_run(self, module, data, stage)
        run.weights_from = self._resolve_checkpoint(ckpt_path)
        drive(run, self.loops.evaluate)
        if run.weights_from is not None and is_fitted:
            self._restored_best = run.weights_from
        if stage == "predict":
            return run.outputs_of_pass
        self._last_metrics = run.results_of_pass
        return run.metrics_of_loaders()

    def _resolve_checkpoint(self, ckpt_path: Any) -> Path | None:
        """The file that `best`, `last` or a path means."""
        if ckpt_path not in ("best", "last"):
            return Path(ckpt_path) if ckpt_path is not None else None
        found = ""
        if self.checkpoint_callback is not None:
            found = getattr(self.checkpoint_callback, f"{ckpt_path}_model_path")
        if not found and ckpt_path == "last" and self._given_output_dir is not None:
            found = str(self._given_output_dir / "last.ckpt")
        if not found:
            raise UsageError(
                f'ckpt_path="{ckpt_path}": no checkpoint has been written',
                fix="fit first, or give the path of a file",
            )
        return Path(found)


def _loggers(logger: Any) -> list[Logger]:
    """The CSV log and what the user adds; False means none."""
    if logger is False:
        return []
    given = [] if logger in (True, None) else list(logger) if isinstance(logger, (list, tuple)) else [logger]
    return [CSVLogger(), *(one for one in given if not isinstance(one, CSVLogger))]
