"""A run, all that changes during one stage (`fit`, `test`, ...); the runs of validation, test and prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import UsageError
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.batch_transfer import channels_last, move_to_device
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.checkpoints.restoring import load_checkpoint_into
from flashtask.trainer.data_loaders import batch_size_of, end_workers, length_of, order_of, taken_in_turn
from flashtask.trainer.datamodule import DataModule, transfer_hooks
from flashtask.trainer.device_plan import DevicePlan
from flashtask.trainer.distribution.agreement import facts_of_module
from flashtask.trainer.feature_cache import use_known_features
from flashtask.trainer.hooks import LEVELS, is_written, listeners, report_misspelled_data_methods
from flashtask.trainer.loggers.logger import Logger
from flashtask.trainer.module import Module
from flashtask.trainer.results import Logged, LogSettings, Results
from flashtask.trainer.run_extension import RunExtension
from flashtask.trainer.run_preparation import (
    device_plan_of,
    evaluation_loaders,
    limit_of,
    memory_format_of,
    training_loader,
)
from flashtask.trainer.signals import RunInterruptedError

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.trainer import Trainer

__all__ = ["EvaluationRun", "Run", "as_it_takes", "at_most", "used_up", "with_step_end"]


class Run:
    """What every stage has: module, data, device, precision, and the values logged so far."""

    #: `fit`, `validate`, `test` or `predict`
    stage = ""
    #: the first word of its hooks: `train`, `validation`, `test` or `predict`
    word = ""
    #: its methods that an extension may wrap: attribute -> name of the part
    _parts: Mapping[str, str] = {"to_device": "to_device"}

    def __init__(
        self, trainer: Trainer, module: Module, data: DataModule, device_plan: DevicePlan | None = None
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.device_plan = device_plan = device_plan or device_plan_of(trainer, module)
        self.strategy = device_plan.strategy
        self.device = device_plan.device
        self.precision, self.inference_precision = device_plan.precision, device_plan.inference_precision
        self.memory_format: torch.memory_format = torch.contiguous_format
        self.results = Results(self.strategy.reduce)
        #: the last value of each metric
        self.metrics: dict[str, float] = {}
        #: the last value of each name in the rows of the log
        self.logged: dict[str, float] = {}
        #: how many names were logged when the values of this pass, or epoch, were computed; -1: they were not
        self._collected = -1
        #: the hook or step that runs now; it decides how `log` keeps a value
        self.current_hook = "setup"
        #: samples in the batch that is worked on
        self.batch_size = 1
        #: number of the loader that the batch comes from, None if there is only one
        self.loader_number: int | None = None
        #: the hooks around moving a batch, None for those that are not written: before, move, after
        self.transfer: tuple[Any, Any, Any] = (None, None, None)
        self.callbacks: list[Callback] = []
        #: the `teardown` of each `setup` that was begun, in the order of beginning
        self.undo: list[Callable[[], Any]] = []
        self.loggers: list[Logger] = []
        #: the signal that asked it to end
        self.interrupted_by: int | None = None
        #: ready for its loop
        self.is_prepared = False
        #: hook -> the methods that are called
        self.listeners: dict[str, tuple[Callable[..., Any], ...]] = {}

    @property
    def own_part(self) -> dict[str, Callable[..., Any]]:
        """What the engine does at a hook, after all methods but those that write checkpoints: hook -> function."""
        return {}

    def notify(self, hook: str, *arguments: Any) -> None:
        """Call the methods for a hook; one that returns -1 before a training batch skips the rest of the epoch."""
        active = self.trainer.active_run or self
        before, active.current_hook = active.current_hook, hook
        for call in self.listeners.get(hook, ()):
            answer = call(*arguments)
            if hook == "train_batch_start" and isinstance(answer, int) and answer == -1:
                self.skip_rest()
        active.current_hook = before

    def skip_rest(self) -> None:
        """What a hook wants that returns -1; only a fit has a rest to skip."""

    def abandon_evaluation(self) -> None:
        """End an evaluation that is worked on now in its middle, without a trace."""
        active = self.trainer.active_run
        if isinstance(active, EvaluationRun) and active.is_open:
            active.abandon()

    def interrupt(self, signal_number: int) -> None:
        """End because of a signal, as soon as that is possible."""
        self.interrupted_by = signal_number

    def prepare(self) -> None:
        """Make the run ready for its loop: at its start, or where its checkpoint was written."""
        raise NotImplementedError

    def _start(self) -> None:
        """The common start of every stage: the data is fetched, meets the module, and is set up."""
        trainer, module, data, stage = self.trainer, self.module, self.data, self.stage
        self.callbacks = trainer.callbacks_of(stage, module)
        module.trainer = data.trainer = trainer
        trainer.active_run = self
        for callback in self.callbacks:
            self.undo.append(partial(setattr, callback, "logs_for", callback.logs_for))
            callback.logs_for = module
        report_misspelled_data_methods(data, DataModule)
        self.listeners = listeners(trainer, module, self.callbacks, Module, Callback, self.own_part)
        if self.strategy.local_rank == 0:
            data.prepare_data()
        self.strategy.barrier("prepare_data")
        module.connect(data)
        self._set_up_data(stage)
        module.data_is_set_up(data)
        self.undo.append(partial(module.teardown, stage))
        module.setup(stage)
        self.undo += [partial(callback.teardown, trainer, module, stage) for callback in reversed(self.callbacks)]
        for callback in self.callbacks:
            callback.setup(trainer, module, stage)
        module.configure_model()
        self.memory_format = memory_format_of(module, self.device, self.trainer.memory_format)
        module.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.precision.convert_module(module)
        if trainer.sync_batchnorm and self.strategy.world_size > 1:
            from flashtask.core.batchnorm import synchronize_batchnorm

            synchronize_batchnorm(module, self.device)
        self.strategy.agree(lambda: facts_of_module(module))
        self._adapt()
        self.strategy.setup(module)
        self.transfer = transfer_hooks(data, module)

    def _set_up_data(self, stage: str) -> None:
        """`setup` of the data module; its `teardown` follows at the end of the run, also if `setup` fails half-way."""
        self.undo.append(partial(self.data.teardown, stage))
        self.data.setup(stage)

    def _adapt(self) -> None:
        """Change layers before anybody looks at the parameters; only a fit does."""

    def _finish_preparing(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, RunExtension):
                self.extend(callback)
        self.is_prepared = True

    def extend(self, extension: RunExtension) -> None:
        """Let an extension wrap the functions, listeners and loaders of the run."""
        for hook, calls in self.listeners.items():
            self.listeners[hook] = tuple(extension.wrap_listener(self, hook, call) for call in calls)
        self._extend_parts(extension)

    def _extend_parts(self, extension: RunExtension) -> None:
        for attribute, name in self._parts.items():
            call = getattr(self, attribute)
            wrapped = extension.wrap_call(self, name, call)
            if wrapped is not call:
                setattr(self, attribute, wrapped)

    @contextmanager
    def logging_nothing(self) -> Iterator[None]:
        """Values that are logged inside the block are dropped; hook and size of the batch are put back after it."""
        before = self.results, self.loggers, self.current_hook, self.batch_size
        self.results, self.loggers = Results(), []
        try:
            yield
        finally:
            self.results, self.loggers, self.current_hook, self.batch_size = before

    def log(
        self, name: str, value: Logged | Mapping[str, Logged], settings: LogSettings, batch_size: int | None
    ) -> None:
        """Keep a value, or each value of a dictionary, under the hook that runs now."""
        if not isinstance(value, torch.Tensor) and isinstance(value, Mapping):
            self.results.chart(name, self.loggers)
            for series, one in value.items():
                self.log(f"{name}/{series}", one, settings, batch_size)
            return
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise UsageError(f"log({name!r}, batch_size={batch_size!r}): a whole number of at least 1 is needed")
        # What only fills a step counts for nothing, whatever the module takes it for.
        weight = self.batch_size if batch_size is None or not self.batch_size else batch_size
        self.results.log(self.current_hook, name, value, weight, settings, self.loader_number)

    @property
    def live_metrics(self) -> dict[str, float]:
        """The last value of each metric; during a training step also those that were logged in it."""
        is_in_step, _ = LEVELS.get(self.current_hook, (False, False))
        return {**self.metrics, **self.results.values_in_step()} if is_in_step else self.metrics

    @property
    def logged_values(self) -> dict[str, float]:
        """The last values that loggers are given: rows of the log, and what steps have logged since."""
        return {**self.logged, **self.results.step_values(of_all=False)}

    def agree_on_results(self) -> None:
        """Let every process have the entries of all: one of them may have been given no batch."""
        if self.strategy.world_size > 1:
            self.results.agree(self.strategy.gather, self.module)

    def _is_out_of_date(self, hook: str) -> bool:
        """Whether values have to be computed: they have not been yet, or some process has logged in a hook since."""
        self.agree_on_results()
        logged_in_hook = any(logged_in == hook for logged_in, _ in self.results.entries)
        return logged_in_hook or self._collected != len(self.results.entries)

    def to_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Move a batch to the run's device and memory format, through the transfer hooks that are written."""
        before, move, after = self.transfer
        if before is not None:
            batch = before(batch, dataloader_idx)
        if move is not None:
            batch = move(batch, self.device, dataloader_idx)
        elif self.device.type != "cpu":  # there a batch is where it was loaded
            batch = move_to_device(batch, self.device)
        if after is not None:
            batch = after(batch, dataloader_idx)
        if self.precision.dtype is not None:
            batch = self.precision.convert_batch(batch)
        if self.memory_format is torch.channels_last:
            batch = channels_last(batch)
        return batch


def at_most(length: int | None, limit: int | None) -> int | None:
    """The smaller of a length and a limit, either of which may be unknown."""
    return limit if length is None else length if limit is None else min(length, limit)


def as_it_takes(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as it is called, with batch and number: one that takes the batch alone is given that alone."""
    parameters = inspect.signature(step).parameters.values()
    if len(parameters) != 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return step
    return lambda batch, *numbers: step(batch)


def with_step_end(run: Run, step: Callable[..., Any], word: str) -> Callable[..., Any]:
    """A step, followed by the module's `<word>_step_end` if there is one, which may change what the step returned."""
    if not is_written(run.module, f"{word}_step_end", Module):
        return step
    step_end = getattr(run.module, f"{word}_step_end")

    def step_and_end(*arguments: Any) -> Any:
        outputs = step(*arguments)
        run.current_hook = f"{word}_step_end"
        changed = step_end(outputs)
        return outputs if changed is None else changed

    return step_and_end


def used_up(what: str) -> UsageError:
    """The error for an iterator in the place of a loader, from which an earlier pass has taken all batches."""
    return UsageError(
        f"the loader of {what} is used up",
        why="an iterator gives its batches only once",
        fix="a DataLoader or a list of batches",
    )


class EvaluationRun(Run):
    """Validation, test or prediction; it may nest in a fit run, and never replaces it.

    Args:
        trainer: that carries it out.
        module: to evaluate.
        data: its data module.
        stage: `validate`, `test` or `predict`.
        keeps_outputs: `predict` and `*_epoch_end(outputs)` get the outputs of all batches.
        weights_from: the checkpoint whose weights are loaded first.
        parent: the fit run it nests in, which has prepared everything for it.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: Module,
        data: DataModule,
        stage: str,
        *,
        keeps_outputs: bool = True,
        weights_from: Path | None = None,
        parent: FitRun | None = None,
    ) -> None:
        super().__init__(trainer, module, data, None if parent is None else parent.device_plan)
        self.stage, self.parent, self.weights_from = stage, parent, weights_from
        self.precision = self.inference_precision
        self.word = {"validate": "validation"}.get(stage, stage)
        self._parts = {"to_device": "to_device", "step": f"{self.word}_step"}
        self.loaders: list[Any] = []
        #: for each loader, batches at the most, or None
        self.limits: list[int | None] = []
        wants_outputs = stage == "predict" or is_written(module, f"{self.word}_epoch_end", Module)
        self.keeps_outputs = keeps_outputs and wants_outputs
        self.outputs: list[list[Any]] = []
        #: the values of the last pass, under the names loggers show
        self.results_of_pass: dict[str, float] = {}
        self.samples_seen = self._batches_seen = 0
        self._step = with_step_end(self, as_it_takes(getattr(module, f"{self.word}_step")), self.word)
        self._has_all_outputs = False
        self._modes: list[tuple[nn.Module, bool]] = []
        self._outer: Run | None = None
        #: loggers that a script, or the fit that it was called in, has opened
        self._open_before: list[Logger] = []
        #: what holds while the module is asked for a batch
        self._asking: ExitStack | None = None

    @classmethod
    def inside(cls, fit: FitRun, loaders: list[Any], limits: list[int | None], *, leaves_no_trace: bool) -> Self:
        """The validation of a fit, which is ready: it has the fit's place, callbacks and hooks.

        Args:
            fit: whose validation it is.
            loaders: to validate on.
            limits: for each loader, batches at the most, or None.
            leaves_no_trace: nothing is logged: the sanity check.
        """
        made = cls(fit.trainer, fit.module, fit.data, "validate", parent=fit)
        made.memory_format, made.transfer = fit.memory_format, fit.transfer
        made.loaders, made.limits = loaders, limits
        made.callbacks, made.listeners = fit.callbacks, fit.listeners
        made.loggers = [] if leaves_no_trace else fit.loggers
        return made

    def prepare(self) -> None:
        """Load the weights and the data; with `overfit_batches` the data is that of training."""
        trainer, stage, step = self.trainer, self.stage, f"{self.word}_step"
        if stage != "predict" and getattr(type(self.module), step) is getattr(Module, step):
            raise UsageError(f"{type(self.module).__name__} has no {step}", fix=f"def {step}(self, batch, batch_idx)")
        if trainer.is_global_zero:
            self.loggers = trainer.called_loggers
            self._open_before = [one for one in self.loggers if one.is_open]
        self._start()
        if self.weights_from is not None:
            load_checkpoint_into(self.module, read_checkpoint(self.weights_from), self.weights_from)
        if not self._takes_training_data():
            short = {"validate": "val"}.get(stage, stage)
            self.loaders = evaluation_loaders(trainer, self.module, getattr(self.data, f"{short}_dataloader")(), short)
            self.undo += [partial(end_workers, loader) for loader in self.loaders]
            if not self.loaders:
                raise UsageError(f"there is nothing to {stage} on", fix=f"trainer.{stage}(model, dataloaders=...)")
            self.limits = [limit_of(getattr(trainer, f"limit_{short}_batches"), loader) for loader in self.loaders]
            use_known_features(self)
        self._finish_preparing()

    def _takes_training_data(self) -> bool:
        """With `overfit_batches`, take the few batches that are trained on; whether there are any."""
        if not self.trainer.overfit_batches or self.stage == "predict":
            return False
        self._set_up_data("fit")
        loader = self.data.train_dataloader()
        if loader is None:
            return False
        few, limit = training_loader(self.trainer, loader, self.trainer.seed)
        self.undo.append(partial(end_workers, few))
        self.loaders, self.limits = [few], [limit]
        return True

    def read_from(self, loaders: list[Any]) -> None:
        """Take the batches from other loaders, which give the same samples in the same order."""
        self.loaders = loaders

    def _extend_parts(self, extension: RunExtension) -> None:
        super()._extend_parts(extension)
        self.loaders = [extension.wrap_loader(self, loader) for loader in self.loaders]

    @property
    def is_sanity_check(self) -> bool:
        """Whether this is the short pass before training, which leaves no trace."""
        return self.parent is not None and self is self.parent.sanity

    @property
    def is_open(self) -> bool:
        """Whether a pass has begun and not ended."""
        return bool(self._modes)

    def begin(self) -> None:
        """Eval mode for everything; what was logged in the last pass is forgotten."""
        self.results.reset()
        self.metrics, self._collected = {}, -1
        self.samples_seen = self._batches_seen = 0
        self._has_all_outputs = False
        self.outputs = [[] for _ in self.loaders]
        self._modes = [(part, part.training) for part in self.module.modules()]
        self._generators = generator_states()
        self._outer, self.trainer.active_run = self.trainer.active_run, self
        self.strategy.begin_evaluation(self.module)
        self.module.eval()

    def batches(self, number: int) -> Iterator[tuple[Any, int]]:
        """The batches of one loader, on the device, with their numbers."""
        self.loader_number = number if len(self.loaders) > 1 else None
        if self._asking is None:  # not before: a hook of the start may change weights
            self._asking = ExitStack()
            self._asking.enter_context(self.strategy.whole_weights(self.module))
        for batch_idx, batch in enumerate(islice(iter(self.loaders[number]), self.limits[number])):
            if batch is None:  # a `collate_fn` has nothing to give
                continue
            self.batch_size = batch_size_of(batch)
            yield self.to_device(batch, number), batch_idx
            self.samples_seen += self.batch_size
            # Several processes obey it together, at the next step: their signals come at different batches.
            alone = self.strategy.world_size == 1
            if alone and self.parent is not None and self.parent.interrupted_by is not None:
                raise RunInterruptedError(self.parent.interrupted_by)
        self.loader_number = None  # what is logged now is of all loaders

    def batches_in(self, number: int) -> int | None:
        """How many batches the pass takes from a loader, None if the loader does not know its length."""
        return at_most(length_of(self.loaders[number]), self.limits[number])

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Call the module's method for a batch; the loader's number is passed where there are several."""
        self.current_hook = f"{self.word}_step"
        arguments = (batch, batch_idx, dataloader_idx) if len(self.loaders) > 1 else (batch, batch_idx)
        return self._step(*arguments)

    def keep(self, outputs: Any, number: int) -> None:
        """Collect what the step returns, for `predict` and for a module with `*_epoch_end(outputs)`."""
        if self.keeps_outputs:
            self.outputs[number].append(outputs)
        self._batches_seen += 1
        if self.loggers and self._batches_seen % self.trainer.log_every_n_steps == 0:
            # Empty unless the module asked for `on_step=True`. Processes may have different numbers of batches, so
            # with `sync_dist=True` only the values of the epoch are of all of them.
            values = self.results.step_values(of_all=False)
            for logger in self._opened_loggers() if values else ():
                logger.log_step(values, self.trainer.global_step, self.trainer.current_epoch)

    def _opened_loggers(self) -> list[Logger]:
        """The loggers, opened on first use outside of a fit; without any fit, those that need no run folder."""
        if self.parent is not None:
            return self.loggers
        has_folder = self.trainer.run_folder is not None
        writing = [one for one in self.loggers if one.is_open or has_folder or not one.needs_run_folder]
        for logger in writing:
            logger.open_outside_of_a_fit()
        return writing

    def loggers_to_close(self) -> list[Logger]:
        """The loggers that this run has opened, or its module by using them."""
        opened = [one for one in self.loggers if one.is_open and one not in self._open_before]
        return opened if self.parent is None else []

    @property
    def outputs_of_pass(self) -> list[Any]:
        """Outputs of all batches, in a list for each loader where there are several; in `predict`, of all processes."""
        if self.stage == "predict" and self.shares_loaders and not self._has_all_outputs:
            self._has_all_outputs = True
            by_process = self.strategy.gather(self.outputs)
            self.outputs = [taken_in_turn(of_loader) for of_loader in zip(*by_process, strict=True)]
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]

    @property
    def predictions(self) -> tuple[list[Any], ...]:
        """What `on_predict_epoch_end` may take; nothing in other stages."""
        return (self.outputs_of_pass,) if self.stage == "predict" else ()

    @property
    def shares_loaders(self) -> bool:
        """Whether each process has a share of the samples that the engine has given it."""
        single = [one for loader in self.loaders for one in getattr(loader, "flattened", [loader])]
        return any(order.world_size > 1 for order in map(order_of, single) if order is not None)

    def collect(self) -> None:
        """Compute the values of the pass as far as they are logged, and hand them to the fit run, if there is one.

        Raises:
            UsageError: an iterator was given, and an earlier pass has used it up.
        """
        if not self._batches_seen and any(hasattr(loader, "__next__") for loader in self.loaders):
            raise used_up(self.word)
        if not self._is_out_of_date(f"{self.word}_epoch_end"):
            return
        self.metrics = self.strategy.gather(self.results.callback_values())[0]
        self._collected = len(self.results.entries)
        if self.parent is not None and not self.is_sanity_check:
            self.parent.take_metrics(self.metrics)

    def close(self) -> None:
        """Collect the values of the pass, those that hooks of its end have logged among them."""
        self.collect()
        self.results_of_pass = found = {name: self.metrics[name] for name in self.results.epoch_names()}
        self.logged = self.logged_values | found
        trainer = self.trainer
        if self.parent is not None and not self.is_sanity_check:
            self.parent.take_validation(self.metrics, self.logged)
        for logger in self._opened_loggers() if self.parent is None and found else ():
            logger.log_evaluation(self.stage, found, trainer.global_step, trainer.current_epoch)

    def metrics_of_loaders(self) -> list[dict[str, float]]:
        """The values of the last pass, a dictionary for each loader; what was logged after the last one is in each."""
        of_loaders = [self.results.is_of_loader(number) for number in range(len(self.loaders))]
        return [{n: value for n, value in self.results_of_pass.items() if is_own[n]} for is_own in of_loaders]

    def end(self) -> None:
        """Put modes back; a sanity check leaves no trace in the generators either."""
        if self.is_sanity_check:
            set_generator_states(self._generators)
        self.results.reset_metrics()
        if self._asking is not None:
            self._asking.close()
            self._asking = None
        for part, mode in self._modes:
            part.training = mode
        self._modes = []
        self.trainer.active_run = self._outer

    def abandon(self) -> None:
        """End in the middle: what the pass drew from the generators is not part of the run that is continued."""
        set_generator_states(self._generators)
        self.end()
