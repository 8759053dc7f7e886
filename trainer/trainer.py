"""`Trainer`: configuration and methods (`fit`, `test`, ...). What changes during a run lives in the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.files import PathLike
from flashtask.core.keywords import named_arguments
from flashtask.core.seeding import last_seed
from flashtask.trainer.argument_checks import check_settings
from flashtask.trainer.by_name import Named
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.callbacks.callback_registry import make_callbacks
from flashtask.trainer.callbacks.early_stopping import EarlyStopping
from flashtask.trainer.callbacks.monitors import GradientNormMonitor
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.callbacks.timing import Duration, TimeLimit
from flashtask.trainer.callbacks.weight_averaging import EMAWeightAveraging
from flashtask.trainer.checkpoints.content import checkpoint_content
from flashtask.trainer.checkpoints.content import weights_only as without_what_resumes
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.checkpoints.restoring import load_checkpoint_into
from flashtask.trainer.datamodule import DataModule, GivenLoaders, Loaders
from flashtask.trainer.device_plan import check_device_plan
from flashtask.trainer.devices.accelerators import Accelerator
from flashtask.trainer.devices.precision import Precision
from flashtask.trainer.distribution.process_strategies import Strategy, point_out_distribution
from flashtask.trainer.finetuning.strategies import Finetuning, FinetuningLike, resolve_finetuning
from flashtask.trainer.fit_result import FitResult, best_metrics_of, fit_result, shown_path
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.lightning1.trainer_base import Lightning1Trainer
from flashtask.trainer.loggers.adapted_logger import TakesMetrics
from flashtask.trainer.loggers.logger import Logger
from flashtask.trainer.loggers.logger_registry import LoggerLike, make_loggers
from flashtask.trainer.loop import Loops
from flashtask.trainer.module import Module
from flashtask.trainer.profiling.profilers import Profiler, resolve_profiler
from flashtask.trainer.run import EvaluationRun
from flashtask.trainer.run_facts import RunFacts
from flashtask.trainer.run_folder import RunFolder, was_begun_by_us
from flashtask.trainer.run_lifecycle import execute
from flashtask.trainer.run_preparation import check_module, data_of
from flashtask.trainer.text_table import text_table

if TYPE_CHECKING:
    from flashtask.trainer.budget import Budget, BudgetChoice
    from flashtask.trainer.finetuning_plan import Plan
    from flashtask.trainer.tuning.tune import TuningResult

__all__ = ["Trainer"]


class Trainer(RunFacts, Lightning1Trainer):
    """Trains, validates, tests and predicts any `Module`.

    Names of the Lightning 1.x Trainer (`gpus`, `progress_bar_refresh_rate`, ...) are understood too, or their
    replacement is named: trainer/lightning1/older_arguments.py.

    Args:
        max_epochs: epochs at the most, -1 for no limit; where nothing limits the run, the module's own number: 10 for a
            task, else 1000.
        min_epochs: a run is not stopped early before so many epochs; so is `min_steps`.
        max_steps: optimizer steps at the most; -1 for no limit.
        min_steps: see `min_epochs`.
        max_time: of training at the most: `"10min"`, `"DD:HH:MM:SS"`, a timedelta, or its parts, `{"hours": 1}`.
        accelerator: `auto` (CUDA, then MPS, then CPU), `cpu`, `gpu`, `cuda`, `mps`, or an `Accelerator`.
        devices: how many on each machine, or which: 1, -1, `[0]`, `"0"`; `auto` is one, or what torchrun, SLURM or MPI
            have started.
        num_nodes: machines; somebody has to start a process on each.
        strategy: how a run is spread over processes: `auto` (`ddp` where there are several), `single`, `ddp`,
            `ddp_spawn`, `fsdp`, ... (`STRATEGIES` lists them), or a `Strategy`.
        sync_batchnorm: on GPUs, let BatchNorm see the batches of all processes.
        precision: `32`, `bf16-mixed`, `16-mixed`, `64-true`, `16-true`, `bf16-true`, `auto`, or a `Precision`; None
            leaves it to the module (tasks: `auto`).
        plugins: a `Precision` or `Strategy` object, or a list of them.
        memory_format: `contiguous`, `channels_last` or `auto`; None leaves it to the module (tasks: `auto`).
        seed: of order, augmentation and model; None means that of the last `seed_everything`, else 0.
        default_root_dir: run folders are made in `runs/` below it; the working folder if not given.
        output_dir: the run folder itself; it must not hold a run yet.
        callbacks: one or a list: a `Callback`, a name that `CALLBACKS` lists, or `(name, {options})`.
        logger: True for the CSV log and TensorBoard's where it is installed, False for none, or a `Logger`, an object
            with Lightning's `log_metrics`, a name that `LOGGERS` lists or a list of them beside the CSV log.
        enable_checkpointing: write `best.ckpt` and `last.ckpt`.
        enable_progress_bar: show progress; a line an epoch if the output is not a terminal.
        enable_model_summary: print at the start what trains and how, and at the end which epoch the model has.
        num_sanity_val_steps: validation batches before training; -1 for all, 0 for none.
        limit_train_batches: whole number of batches or share of them (also val, test, predict).
        overfit_batches: number or share of the training batches that serve training, validation and test alike,
            unshuffled; validation during a fit is off.
        fast_dev_run: True or a number of batches: run so many of everything once, and write nothing.
        check_val_every_n_epoch: validate after every so many epochs; None counts the batches of `val_check_interval`
            across epochs.
        val_check_interval: validate inside epochs too: after every such share of an epoch (0.25), or after every so
            many batches (100), once the optimizer step that they belong to is complete; 1.0 for the end of an epoch.
        reload_dataloaders_every_n_epochs: ask for the loaders again after every so many epochs (`train_dataloader` and
            `val_dataloader` may look at `trainer.current_epoch`); 0 makes them once.
        log_every_n_steps: how often step values are logged.
        flush_logs_every_n_steps: steps after which loggers write their values to disk; also done after each epoch.
        accumulate_grad_batches: batches for one optimizer step, or `{epoch: batches}` from certain epochs on.
        gradient_clip_val: limit for gradients; None or 0 for none.
        gradient_clip_algorithm: `norm` (of all gradients together) or `value` (of each).
        ema_decay: average the weights over steps with this weight for the average, such as 0.999, and validate and keep
            the average: the callback `EMAWeightAveraging`; None for none.
        track_grad_norm: log this norm of all gradients (2 for the 2-norm, `inf`); -1 for none.
        detect_anomaly: find the operation that makes a gradient NaN; slow.
        deterministic: let torch use deterministic algorithms alone; `warn` only warns if there is not one.
        benchmark: let cuDNN try which algorithm is fastest.
        profiler: `simple`, `advanced`, `pytorch`, or a `Profiler`.
        use_distributed_sampler: share the samples of a loader over the processes; False leaves that to the loader.
        feature_cache: compute the features of a frozen backbone once, and keep them for later runs: `auto` where every
            epoch sees the same inputs, True insists on it, False never; a number for so many views of augmented inputs.
        auto_lr_find: what `tune` finds by default: the learning rate, also by the name of its attribute.
        auto_scale_batch_size: the same for the batch size; `power` or `binsearch`.
        report: after `finetune`, write `report.html` to the run folder, for modules that have such a page, as tasks do.

    Raises:
        UsageError: an invalid argument; the message names the nearest valid one.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Duration | None = None,
        accelerator: str | Accelerator = "auto",
        devices: int | str | Sequence[int] = "auto",
        num_nodes: int = 1,
        strategy: str | Strategy = "auto",
        sync_batchnorm: bool = False,
        precision: str | int | Precision | None = None,
        plugins: Precision | Strategy | Sequence[Precision | Strategy] | None = None,
        memory_format: str | None = None,
        seed: int | None = None,
        default_root_dir: PathLike | None = None,
        output_dir: PathLike | None = None,
        callbacks: Callback | Named | Sequence[Callback | Named] | None = None,
        logger: LoggerLike | Sequence[Logger | TakesMetrics | Named] | None = True,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        num_sanity_val_steps: int = 2,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        fast_dev_run: bool | int = False,
        check_val_every_n_epoch: int | None = 1,
        val_check_interval: int | float = 1.0,
        reload_dataloaders_every_n_epochs: int = 0,
        log_every_n_steps: int = 50,
        flush_logs_every_n_steps: int = 100,
        accumulate_grad_batches: int | dict[int, int] = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        ema_decay: float | None = None,
        track_grad_norm: float | str = -1,
        detect_anomaly: bool = False,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        profiler: Profiler | Named | None = None,
        use_distributed_sampler: bool = True,
        feature_cache: bool | int | str = "auto",
        auto_lr_find: bool | str = False,
        auto_scale_batch_size: bool | str = False,
        report: bool = True,
        **older: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "older", "__class__")}
        if older:
            Trainer.__init__(self, **Trainer._todays_names(older, given))
            return
        super().__init__()
        check_settings(given)
        #: what it was made with, by today's names
        self.arguments = given
        self.max_epochs = max_epochs
        self.min_epochs, self.min_steps = min_epochs, min_steps
        self.max_steps, self.max_time = max_steps, max_time
        self.accelerator, self.devices, self.num_nodes = accelerator, devices, num_nodes
        self.sync_batchnorm = sync_batchnorm
        self.strategy = check_device_plan(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
            plugins=plugins,
        )
        self.precision, self.plugins, self.memory_format = precision, plugins, memory_format
        self._seed = seed
        self.default_root_dir = Path(default_root_dir) if default_root_dir is not None else Path.cwd()
        self._given_output_dir = Path(output_dir) if output_dir is not None else None
        #: what the first process has claimed, for the others
        self._claimed_folder: Path | None = None
        self.callbacks = make_callbacks(callbacks)
        self.ema_decay = ema_decay
        #: the callback that `ema_decay` stands for
        self.ema_callback = None if ema_decay is None else EMAWeightAveraging(ema_decay)
        self.callbacks += [] if self.ema_callback is None else [self.ema_callback]
        self.loggers = make_loggers(logger)
        self.enable_checkpointing = enable_checkpointing
        self.enable_progress_bar, self.enable_model_summary = enable_progress_bar, enable_model_summary
        self.num_sanity_val_steps = num_sanity_val_steps
        self.limit_train_batches, self.limit_val_batches = limit_train_batches, limit_val_batches
        self.limit_test_batches, self.limit_predict_batches = limit_test_batches, limit_predict_batches
        self.overfit_batches, self.fast_dev_run = overfit_batches, fast_dev_run
        self.check_val_every_n_epoch, self.val_check_interval = check_val_every_n_epoch, val_check_interval
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.log_every_n_steps, self.flush_logs_every_n_steps = log_every_n_steps, flush_logs_every_n_steps
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.track_grad_norm, self.detect_anomaly = track_grad_norm, detect_anomaly
        self.deterministic, self.benchmark = deterministic, benchmark
        self.profiler = resolve_profiler(profiler)
        self.use_distributed_sampler = use_distributed_sampler
        self.feature_cache = feature_cache
        self.auto_lr_find, self.auto_scale_batch_size = auto_lr_find, auto_scale_batch_size
        self.report = report
        if fast_dev_run:
            self._run_briefly(int(fast_dev_run))
        self.loops = Loops()
        self._restored_best: Path | None = None
        #: run folder, fit and restored checkpoint before the fit that is being made ready
        self._before: tuple[RunFolder | None, FitRun | None, Path | None] = (None, None, None)

    def _run_briefly(self, batches: int) -> None:
        """So many batches of everything, once, leaving nothing behind."""
        self.max_epochs, self.max_steps, self.num_sanity_val_steps = 1, batches, 0
        self.check_val_every_n_epoch, self.val_check_interval, self.overfit_batches = 1, 1.0, 0.0
        self.limit_train_batches = self.limit_val_batches = batches
        self.limit_test_batches = self.limit_predict_batches = batches
        self.enable_checkpointing, self.loggers = False, []
        self.callbacks = [one for one in self.callbacks if not isinstance(one, (ModelCheckpoint, EarlyStopping))]

    def with_changes(self, **changes: Any) -> Trainer:
        """Another trainer with the same arguments but these; it has run nothing yet.

        Callbacks and loggers that are objects are the same objects, unless they are among the changes.
        """
        return Trainer(**{**self.arguments, "seed": self.seed, "max_epochs": self._max_epochs, **changes})

    # ---- fit, validate, test, predict, tune

    @named_arguments
    def fit(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        ckpt_path: PathLike | None = None,
        strategy: FinetuningLike | None = None,
    ) -> FitResult:
        """Train; with a finetuning strategy it is the same as `finetune`.

        Args:
            model: a `Module`.
            train_dataloaders: a loader, several in a list or dictionary, or a `DataModule`.
            val_dataloaders: a loader, or a list or dictionary of them.
            datamodule: instead of loaders.
            ckpt_path: continue from this checkpoint, `"last"` for the run folder's own.
            strategy: a finetuning strategy; None trains everything.

        Returns:
            What came of it; the model has the last epoch's weights.
        """
        if strategy is not None:
            return self.finetune(model, train_dataloaders, val_dataloaders, datamodule, strategy, ckpt_path)
        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        self.ckpt_path = self.checkpoint_file(ckpt_path)
        run = FitRun(self, module, data, resume_from=self.ckpt_path)
        execute(run, self._path.fit)
        return self._result_of(run)

    @named_arguments
    def finetune(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        strategy: FinetuningLike | None = None,
        ckpt_path: PathLike | None = None,
        restore_best: bool = True,
        *,
        budget: Budget | None = None,
        train_dataloader: Loaders | None = None,
    ) -> FitResult:
        """Train a module whose backbone is pretrained, freezing parts of it by a strategy.

        Args:
            model: a `Module` with a `backbone`.
            train_dataloaders: a loader, several in a list or dictionary, or a `DataModule`.
            val_dataloaders: a loader, or a list or dictionary of them.
            datamodule: instead of loaders.
            strategy: `"freeze"`, `"no_freeze"`, `("freeze_unfreeze", 5)`, `("lora", 8)`, ..., a list of `Phase`, or an
                object with `phases` or `stages`; None means the module's `default_strategy`: `freeze` for tasks.
            ckpt_path: continue from this checkpoint.
            restore_best: put the best epoch's weights back into the model at the end.
            budget: `"10min"`, or `"best"`: choose the epochs, and the strategy unless it is given, from the speed that
                is measured here; `max_epochs` is what was chosen afterwards.
            train_dataloader: another name of `train_dataloaders`.

        Returns:
            What came of it: which epoch's weights the model has, their metrics, the run folder.
        """
        if train_dataloader is not None and train_dataloaders is not None:
            raise UsageError("train_dataloader and train_dataloaders are the same", fix="drop train_dataloader")
        loaders = train_dataloader if train_dataloaders is None else train_dataloaders
        module = check_module(model)
        data = data_of(module, datamodule, train=loaders, val=val_dataloaders)
        self.ckpt_path = self.checkpoint_file(ckpt_path)
        if budget is not None:
            chosen = self.choose_within(budget, module, datamodule=data, strategy=strategy)
            strategy, self.max_epochs = chosen.strategy, chosen.epochs
            self.say(chosen.says)
        finetuning = _finetuning(module, strategy)
        run = FitRun(self, module, data, finetuning, resume_from=self.ckpt_path, restores_best=restore_best)
        execute(run, self._path.fit)
        result = self._result_of(run)
        if self.report and run.history and not self.fast_dev_run:
            self._write_report(run)
        return result

    def _write_report(self, run: FitRun) -> None:
        """The page of a run that has a folder; the run is over, so that nothing that goes wrong here makes it fail."""
        if self.run_folder is None:
            return
        folder = self.run_folder.path
        fix = f"flashtask report {folder}"
        if run.strategy.world_size > 1:
            if type(run.module).write_report is not Module.write_report:
                self.say(f"no report is written by several processes; {fix} writes it")
            return
        try:
            page = run.module.write_report(self, folder, run.data)
        except Exception as error:
            self.say(f"the report was not written: {type(error).__name__}: {error}\n  fix: {fix}")
            return
        if page is not None and self.enable_model_summary and self.says_result:
            self.say(f"report: {shown_path(page)}")

    @property
    def result(self) -> Any:
        """What came of the last fit: of a task with a run folder a `FinishedRun`, else the `FitResult`.

        Raises:
            UsageError: nothing has been fitted yet.
        """
        if self.fit_run is None:
            raise UsageError("trainer.result needs a fit first", fix="trainer.finetune(model, datamodule=data)")
        run, folder = self.fit_run, self.claimed_folder
        opened = None if folder is None else run.module.finished_run(self, folder, run.data)
        return fit_result(run) if opened is None else opened

    def _result_of(self, run: FitRun) -> FitResult:
        result = fit_result(run)
        if self.enable_model_summary and self.says_result:
            self.say(str(result))
        return result

    @named_arguments
    def validate(
        self,
        model: Module | None = None,
        dataloaders: Loaders | None = None,
        ckpt_path: PathLike | None = None,
        datamodule: DataModule | None = None,
        verbose: bool = False,
    ) -> list[dict[str, float]]:
        """Run validation; returns a list with one dictionary of metrics for each loader.

        With `verbose` they are also printed as a table.
        """
        run = self._evaluate("validate", model, dataloaders, ckpt_path, datamodule)
        return self._tell_metrics(run, verbose)

    @named_arguments
    def test(
        self,
        model: Module | None = None,
        dataloaders: Loaders | None = None,
        ckpt_path: PathLike | None = None,
        datamodule: DataModule | None = None,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """Run a test; returns a list with one dictionary of metrics for each loader.

        With `verbose` they are also printed as a table.
        """
        run = self._evaluate("test", model, dataloaders, ckpt_path, datamodule)
        return self._tell_metrics(run, verbose)

    @named_arguments
    def predict(
        self,
        model: Module | None = None,
        dataloaders: Loaders | None = None,
        ckpt_path: PathLike | None = None,
        datamodule: DataModule | None = None,
        return_predictions: bool = True,
    ) -> list[Any] | None:
        """What `predict_step` returns for each batch, in order: a list (of lists, where there are several loaders).

        With `return_predictions=False` they are not kept, only given to callbacks such as a prediction writer, and None
        is returned.
        """
        keeps = return_predictions
        run = self._evaluate("predict", model, dataloaders, ckpt_path, datamodule, keeps_outputs=keeps)
        return run.outputs_of_pass if keeps else None

    @named_arguments
    def tune(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        strategy: FinetuningLike | None = None,
        learning_rate: bool | str | Mapping[str, Any] | None = None,
        batch_size: bool | str | Mapping[str, Any] | None = None,
    ) -> TuningResult:
        """Find a learning rate or a batch size and set it on the module or its data; nothing else changes.

        Args:
            model: a `Module`.
            train_dataloaders: a loader, several in a list or dictionary, or a `DataModule`.
            val_dataloaders: a loader, or a list or dictionary of them.
            datamodule: instead of loaders; a batch size can only be found for one, or for a module's own loaders.
            strategy: the finetuning strategy to tune for; None means the module's own, as in `finetune`.
            learning_rate: find it: True, the name of the attribute that has it, or a dictionary of options; None means
                `auto_lr_find`.
            batch_size: find it: True, `power`, `binsearch`, or a dictionary of options; None means
                `auto_scale_batch_size`.

        Returns:
            A `TuningResult`, with the whole curve and all that was measured.

        Raises:
            UsageError: nothing is to be found, or it cannot be set anywhere.
        """
        from flashtask.trainer.tuning.tune import tune

        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        learning_rate = self.auto_lr_find if learning_rate is None else learning_rate
        batch_size = self.auto_scale_batch_size if batch_size is None else batch_size
        if not learning_rate and not batch_size:
            raise UsageError(
                "trainer.tune() has nothing to find", fix="trainer.tune(model, datamodule=data, learning_rate=True)"
            )
        trains_all = strategy is None and module.default_strategy == "no_freeze"  # no backbone is needed for that
        finetuning = None if trains_all else _finetuning(module, strategy)
        return tune(self, module, data, finetuning=finetuning, learning_rate=learning_rate, batch_size=batch_size)

    @named_arguments
    def plan(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        strategy: FinetuningLike | None = None,
        measure: bool = True,
    ) -> Plan:
        """What `finetune` would do: phases, parameters, rates, steps, memory and time. Nothing is trained or written.

        Args:
            model: a `Module`; it stays as it is.
            train_dataloaders: a loader, several in a list or dictionary, or a `DataModule`.
            val_dataloaders: a loader, or a list or dictionary of them.
            datamodule: instead of loaders.
            strategy: the finetuning strategy; None means the module's own, as in `finetune`.
            measure: estimate memory and time from a few steps on copies.

        Returns:
            A `Plan`.
        """
        from flashtask.trainer.finetuning_plan import plan

        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        return plan(self, module, data, _finetuning(module, strategy), measure=measure)

    @named_arguments
    def choose_within(
        self,
        budget: Budget,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        strategy: FinetuningLike | None = None,
    ) -> BudgetChoice:
        """The strategy and number of epochs that `finetune(..., budget=...)` would take.

        Args:
            budget: `"90s"`, `"10min"`, `"1h"`, or `"best"`.
            model: a `Module`; it stays as it is.
            train_dataloaders: a loader, several in a list or dictionary, or a `DataModule`.
            val_dataloaders: a loader, or a list or dictionary of them.
            datamodule: instead of loaders.
            strategy: if given, only the epochs are chosen.

        Raises:
            UsageError: the trainer has an end of its own or several processes, or the time cannot be estimated.
        """
        from flashtask.trainer.budget import choose_within

        module = check_module(model)
        data = data_of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        return choose_within(self, module, data, None if strategy is None else _finetuning(module, strategy), budget)

    @named_arguments
    def save_checkpoint(self, path: PathLike, weights_only: bool = False) -> None:
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
            content |= self.fit_run.module.describe_use()
        if not weights_only and "progress" not in content:
            raise UsageError(
                f"{self._restored_best} holds weights only, and they are what the model has now",
                fix="save_checkpoint(path, weights_only=True), or ModelCheckpoint(save_weights_only=False)",
            )
        if self.is_global_zero:
            write_checkpoint(Path(path), without_what_resumes(content) if weights_only else content)

    # ---- what a run prints

    #: `fit` and `finetune` print a summary at their end; the command line prints its own
    says_result = True

    def _tell_metrics(self, run: EvaluationRun, verbose: bool) -> list[dict[str, float]]:
        found = run.metrics_of_loaders()
        if verbose and self.says_result and any(found):
            names = list(dict.fromkeys(name for of_loader in found for name in of_loader))
            rows = [[name, *(f"{one[name]:.6g}" if name in one else "" for one in found)] for name in names]
            heads = [f"loader {number}" for number in range(len(found))] if len(found) > 1 else ["value"]
            self.say(text_table([f"{run.stage} metric", *heads], rows, None))
        return found

    @property
    def max_epochs(self) -> int | None:
        """Epochs at the most: the argument, else those of the last fit run; None before it or without a limit."""
        given = self._max_epochs
        return self.epochs_of(self.fit_run.module) if given is None and self.fit_run is not None else given

    @max_epochs.setter
    def max_epochs(self, epochs: int | None) -> None:
        self._max_epochs = epochs

    def epochs_of(self, module: Module) -> int | None:
        """Epochs of a run of a module at the most: the argument, else the module's own where nothing else ends it."""
        has_no_end = self._max_epochs is None and self.max_steps < 0 and self.max_time is None
        epochs = module.default_max_epochs if has_no_end else self._max_epochs
        return None if epochs == -1 else epochs

    @property
    def seed(self) -> int:
        """The seed of runs: the argument, else that of the last `seed_everything`, else 0."""
        if self._seed is not None:
            return self._seed
        last = last_seed()
        return 0 if last is None else last

    def say(self, text: str) -> None:
        """Tell the user something: a line on standard error, from the first process."""
        if self.is_global_zero:
            print(text, file=sys.stderr, flush=True)

    # ---- how a run is carried out

    def callbacks_of(self, stage: str, module: Module) -> list[Callback]:
        """The callbacks of a run: the progress bar, the user's own, and for a fit checkpoints last.

        A callback of the module takes the place of the trainer's of the same class.
        """
        of_module = make_callbacks(module.configure_callbacks())
        replaced = {type(callback) for callback in of_module}
        given = [callback for callback in self.callbacks if type(callback) not in replaced]
        given += [*of_module, *self._from_arguments()]
        own = [callback for callback in given if not isinstance(callback, ModelCheckpoint)]
        shows_own = any(isinstance(callback, ProgressBar) for callback in own)
        shows_bar = self.enable_progress_bar and not shows_own and self.is_global_zero
        bar: list[Callback] = [ProgressBar()] if shows_bar else []
        if stage != "fit":
            return [*bar, *own]
        checkpoints = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
        if checkpoints and not self.enable_checkpointing:
            raise UsageError("enable_checkpointing=False contradicts a ModelCheckpoint", fix="drop one of them")
        if self.enable_checkpointing and not checkpoints:
            checkpoints = [ModelCheckpoint()]
        return [*bar, *own, *checkpoints]

    def _from_arguments(self) -> list[Callback]:
        """The callbacks that arguments are short for."""
        found: list[Callback] = []
        if self.max_time is not None:
            found.append(TimeLimit(self.max_time))
        if self.track_grad_norm != -1:
            found.append(GradientNormMonitor(self.track_grad_norm))
        return found

    def open_output(self, run: FitRun) -> Path | None:
        """Claim the run folder before anything expensive happens, and make this the trainer's fit.

        Returns:
            The checkpoint to continue from: the run's own, or the last one of an earlier attempt of torchrun.
        """
        if isinstance(self.active_run, FitRun) or getattr(self.active_run, "parent", None) is not None:
            raise UsageError(
                "this trainer is in the middle of a fit",
                why="its callbacks and loggers belong to that one",
                fix="another Trainer for the fit inside: trainer.with_changes(callbacks=[...], logger=False)",
            )
        folder, earlier = None, None
        if (self.loggers or self.enable_checkpointing) and self.is_global_zero:
            earlier = self._last_of_an_earlier_attempt()
            folder = self._claim(run.resume_from or earlier)
        found = (None if folder is None else folder.path, earlier)
        self._claimed_folder, earlier = self.strategy.gather(found)[0]
        if earlier is not None:
            self.say(f"torchrun has started this again: going on from {earlier}")
        self._before = (self.run_folder, self.fit_run, self._restored_best)
        self._last_metrics, self._last_logged = {}, {}
        self._set_fit(folder, run, None)
        return earlier or run.resume_from

    def folder_for_evaluation(self) -> Path:
        """Where an evaluation without a fit writes what its module logs by itself: a folder like that of a run."""
        if self._given_output_dir is not None:
            return self._given_output_dir.absolute()
        folder = RunFolder.next_free(self.default_root_dir)
        folder.release()
        return folder.path

    def _set_fit(self, folder: RunFolder | None, run: FitRun | None, restored_best: Path | None) -> None:
        self.run_folder, self.fit_run, self._restored_best = folder, run, restored_best

    def forget(self, run: FitRun) -> None:
        """A fit that never got ready: its predecessor is the trainer's fit again."""
        if self.fit_run is run:
            self._set_fit(*self._before)

    def _last_of_an_earlier_attempt(self) -> Path | None:
        """Where torchrun has started the script again: the `last.ckpt` that it wrote before."""
        if self._given_output_dir is None or not was_begun_by_us(self._given_output_dir.absolute()):
            return None
        written = [folder / "last.ckpt" for folder in self.checkpoint_folders()]
        return next((path for path in written if path.exists()), None)

    def _claim(self, resume_from: Path | None) -> RunFolder:
        if self._given_output_dir is None:
            return RunFolder.next_free(self.default_root_dir)
        continues = resume_from is not None and resume_from.absolute().parent in self.checkpoint_folders()
        continues = continues or was_begun_by_us(self._given_output_dir.absolute())
        return RunFolder(self._given_output_dir.absolute(), resume=continues)

    def require_own_folder(self) -> None:
        """Before something is written: the run folder is still the one that was claimed.

        Raises:
            StorageError: it was removed or replaced, or a file in it has become a link.
        """
        if self.run_folder is not None:
            self.run_folder.require_unchanged()

    def close_output(self, run: FitRun) -> None:
        """Let the run folder go; its path stays known."""
        if self.run_folder is not None and self.fit_run is run:
            self.run_folder.release()

    def restore_best(self, run: FitRun) -> None:
        """Put the best epoch's weights back into the module; its metrics are those that `callback_metrics` gives."""
        checkpoint = self.checkpoint_callback
        if checkpoint is None or not checkpoint.best_model_path:
            return
        path = Path(checkpoint.best_model_path)
        if not path.exists():
            last = checkpoint.last_model_path
            raise MissingInputError(
                f"{path} was removed during the run, so the best epoch's weights cannot be put back",
                why="the module has the weights of the last epoch",
                fix=f'load("{last}") has them too' if last else "",
            )
        content = read_checkpoint(path)
        load_checkpoint_into(run.module, content, path)
        self._restored_best = path
        run.take_best(best_metrics_of(run, checkpoint, content["metrics"]))

    def _evaluate(
        self,
        stage: str,
        model: Module | None,
        dataloaders: Loaders | None,
        ckpt_path: PathLike | None,
        datamodule: DataModule | None,
        keeps_outputs: bool = True,
    ) -> EvaluationRun:
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
        self.ckpt_path = weights_from = self.checkpoint_file(ckpt_path, continues=False)
        run = EvaluationRun(self, module, data, stage, keeps_outputs=keeps_outputs, weights_from=weights_from)
        execute(run, self._path.evaluate)
        self._loaders[stage] = run.loaders
        own = [path for one in self.checkpoint_callbacks for path in (*one.best_k_models, one.last_model_path)]
        if weights_from is not None and is_fitted and str(weights_from.absolute()) in own:
            self._restored_best = weights_from  # the weights of another file are not of this fit
        if stage != "predict" and self.active_run is None:  # a fit that goes on has values of its own
            self._last_metrics, self._last_logged = run.metrics, run.logged
        return run


def _finetuning(module: Module, strategy: FinetuningLike | None) -> Finetuning:
    """The strategy that was given, else the module's own."""
    try:
        return resolve_finetuning(module.default_strategy if strategy is None else strategy)
    except UsageError as error:
        point_out_distribution(error, strategy)
        raise
