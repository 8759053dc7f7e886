"""The run of training: what a step needs, and what must survive a kill (`FitRun.state_dict()`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.checkpoint import error_context, read_checkpoint
from flashtask.core.errors import DivergedError, UsageError
from flashtask.core.library_internals import batch_norm_class
from flashtask.core.metrics import is_metric, uncounted
from flashtask.core.seeding import derive_seed, generator_states, seed_generators, set_generator_states
from flashtask.trainer.batch_transfer import detached
from flashtask.trainer.callbacks.accumulation import accumulation_by_epoch
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.checkpoints.restoring import restore_run
from flashtask.trainer.closed_form_fit import ClosedFormFit, fits_in_closed_form, refuse_gradients
from flashtask.trainer.data_loaders import (
    OrderedBatches,
    batch_size_of,
    begin_at,
    end_workers,
    known_shares,
    length_of,
    order_of,
    shares_of_group,
)
from flashtask.trainer.datamodule import DataModule, GivenLoaders
from flashtask.trainer.devices.precision import Precision, record_precision
from flashtask.trainer.distribution.agreement import facts_of_data
from flashtask.trainer.feature_cache import use_features
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.lora import adapt_for
from flashtask.trainer.finetuning.phase_ends import PhaseProgress, enter_phase, leave_phase, require_phase_groups
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.hooks import is_written
from flashtask.trainer.loss_checks import NanGuard, loss_in
from flashtask.trainer.manual_optimization import clip, train_only
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import (
    ScheduledRate,
    learning_rates,
    optimizer_in_turn,
    read_frequencies,
    read_optimizers,
)
from flashtask.trainer.run import EvaluationRun, Run, as_it_takes, at_most, used_up, with_step_end
from flashtask.trainer.run_extension import RunExtension, Wrapped
from flashtask.trainer.run_preparation import (
    check_state_keys,
    check_training_data,
    evaluation_loaders,
    leave_optimization_to_module,
    limit_of,
    training_loader,
    want_gradients,
)
from flashtask.trainer.run_record import recipe_of
from flashtask.trainer.signals import RunInterruptedError
from flashtask.trainer.step_outputs import as_seen_by_hooks
from flashtask.trainer.step_overrides import StepOverrides
from flashtask.trainer.validation_times import ValidationTimes

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["FitRun"]

#: methods of a precision that an extension may wrap -> names of the parts
_PRECISION_PARTS = {"backward": "backward", "unscale": "unscale", "step": "optimizer_step", "update": "scale_update"}


class FitRun(Run):
    """Training: optimizers, progress, and the runs of validation that nest in it."""

    stage, word = "fit", "train"
    _parts: Mapping[str, str] = {
        name: name
        for name in (
            "training_step",
            "to_device",
            "clip_gradients",
            "zero_grad",
            "count_step",
            "scheduler_step",
            "finish_pass",
            "close_epoch",
        )
    }

    def __init__(
        self,
        trainer: Trainer,
        module: Module,
        data: DataModule,
        finetuning: Finetuning | None = None,
        *,
        resume_from: Path | None = None,
        restores_best: bool = False,
    ) -> None:
        super().__init__(trainer, module, data)
        device_plan = self.device_plan
        self.finetuning, self.resume_from = finetuning, resume_from
        #: what describes it in names and numbers, settled when it begins
        self.recipe: dict[str, Any] | None = None
        #: what the recipe of the run that is continued could not hold
        self.lost_before: dict[str, str] = {}
        self.seed: int = trainer.seed
        self.max_epochs: int | None = trainer.epochs_of(module)
        self.max_steps: int = trainer.max_steps
        self.guard = NanGuard(device_plan.device, of_all=partial(device_plan.strategy.reduce, how="max"))
        #: how many batches make one optimizer step, by epoch; known for the whole run before it starts
        self.accumulation: Callable[[int], int] = accumulation_by_epoch(trainer.accumulate_grad_batches)
        #: as the first of these processes had it, where fewer of them go on
        self._batch_of_all: dict[str, int] | None = None
        # made by the preparation
        self.loader: Any = None
        self.limit: int | None = None
        self.optimizers: list[Optimizer] = []
        self.schedulers: list[ScheduledRate] = []
        #: for how many batches each of several optimizers has its turn; empty: each has one in every batch
        self.frequencies: list[int] = []
        self.freezing: Freezing | None = None
        self.phases: PhaseProgress | None = None
        #: what computes the head, if it is solved and not trained
        self.solving: ClosedFormFit | None = None
        self.validation: EvaluationRun | None = None
        #: when it comes
        self.validation_times = ValidationTimes(self)
        self.sanity: EvaluationRun | None = None
        self.training_step: Callable[..., Any] = module.training_step
        self.automatic: bool = module.automatic_optimization
        self.keeps_outputs = False
        #: put the best epoch's weights back at the end
        self.restores_best = restores_best
        #: they have been put back, and `metrics` are that epoch's
        self.has_best = False
        # progress: this is what a checkpoint holds
        self.epoch = 0
        self.epoch_is_complete = False
        self.global_step = 0
        self.batch_idx = 0
        self.batches_seen = 0
        self.samples = 0
        self.samples_seen = 0
        self.seconds = 0.0
        self.training_seconds = 0.0
        self.epoch_seconds = 0.0
        #: the rows of epochs, and those of validations inside epochs
        self.history: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.stop_reason = ""
        # of the current step
        self.outputs: list[Any] = []
        #: the number of the optimizer whose turn it is
        self.turn = 0
        #: the rest of the epoch is left out
        self.skip_epoch = False
        #: the epoch ends at the next step and keeps its place, to be continued by another run
        self.is_leaving = False
        self.has_gradients = False
        self.has_stepped = False
        self.group_is_open = False
        self._epoch_started_at = 0.0
        self._trained_for = 0.0
        self._samples_before = 0
        #: no batch of the epoch follows; the loader has none left, else the epoch was cut short
        self.epoch_is_over = False
        self._exhausted = False
        #: the epoch in which the loaders were made, and what wraps them
        self._loaded_in = 0
        self._extensions: list[RunExtension] = []
        #: the loader begins at the run's place in the epoch, else with the first batch
        self._begins_here = True
        #: the number of batches in the epoch up to the end of the accumulation group
        self.group_end = 0
        #: the part of the group's samples that the batch has
        self.share = 1.0
        #: which of several optimizers the group is for; None: all of them
        self._turn: int | None = None
        self._written_step = 0
        #: the values of the epoch, under the names that callbacks see
        self._of_epoch: dict[str, float] = {}
        self._step_precision = device_plan.precision
        self._resumed_at = -1
        self._hooks_read_outputs = True
        #: names that were measured in this epoch, and those of them that no callback has looked at yet
        self.fresh_metrics: set[str] = set()
        self.new_metrics: set[str] = set()
        #: one of the measurements that no callback has looked at is a validation
        self.has_validated = False

    # ---- making it ready

    def prepare(self) -> None:
        """Claim the run folder, set up data, freezing and optimizers, and restore the checkpoint that is continued."""
        trainer, module, data = self.trainer, self.module, self.data
        refuse_gradients(module, self.finetuning)
        self.resume_from = trainer.open_output(self)
        seed_generators(self.seed)
        record_precision(module, trainer.precision)
        self.loggers = trainer.called_loggers if trainer.is_global_zero else []
        self._start()
        # The callbacks of this package read a loss however it comes, and a step is spared the wrapping.
        owners = [(module, Module), *((callback, Callback) for callback in self.callbacks)]
        self._hooks_read_outputs = any(
            is_written(owner, "on_train_batch_end", base) and not type(owner).__module__.startswith("flashtask.")
            for owner, base in owners
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        check_state_keys(self)
        for part in module.modules():
            if is_metric(part):
                part.reset()  # what a run that failed may have left
        # An error in a turn of one of several optimizers leaves the parameters of the others switched off.
        self.undo.append(partial(want_gradients, {p: p.requires_grad for p in module.parameters()}))
        if self.finetuning is not None:
            self.freezing = Freezing(module, self.finetuning)
            self.phases = PhaseProgress(self.freezing.finetuning, module)
            if (most := self.finetuning.length) is not None:
                self.max_epochs = most if self.max_epochs is None else min(most, self.max_epochs)
        content = None if self.resume_from is None else read_checkpoint(self.resume_from)
        if content is not None and "datamodule" in content:
            with error_context(str(self.resume_from)):
                data.on_load_checkpoint(content)
                data.load_state_dict(content["datamodule"])  # its loaders may depend on it
        self._load_training()
        if content is not None:
            self._keep_batch_of_all(content)
        self.strategy.agree(lambda: facts_of_data(self))
        step = self.strategy.wrap_step(module, as_it_takes(module.training_step))
        self.training_step = with_step_end(self, step, "training")
        self.keeps_outputs = is_written(module, "training_epoch_end", Module)
        self._add_validation()
        self._add_training()
        self._set_validation_interval()
        if self.strategy.global_rank:
            # Dropout is to fall on other numbers in each process; weights are those of the first one.
            seed_generators(derive_seed("process", self.seed, self.strategy.global_rank) % 2**32)
        if content is not None:
            self.lost_before = dict((content.get("recipe") or {}).get("not_saved") or {})
            assert self.resume_from is not None
            restore_run(self, self.resume_from, content)
            self.sanity = None
            if self.solving is not None:
                self.solving.resume()
        use_features(self)
        self.extend(StepOverrides(self, Module))
        self._finish_preparing()

    def _adapt(self) -> None:
        adapt_for(self)

    def _trains_batchnorm(self) -> bool:
        """Whether a BatchNorm layer may be in train mode at some time in the run."""
        if self.freezing is not None:
            return self.freezing.trains_batchnorm
        return any(isinstance(part, batch_norm_class()) for part in self.module.modules())

    def _add_validation(self) -> None:
        """The runs of validation that nest in this one: after epochs, and the sanity check before the first."""
        trainer, module = self.trainer, self.module
        writes_step = type(module).validation_step is not Module.validation_step
        if not writes_step and isinstance(self.data, GivenLoaders) and self.data.has("val"):
            trainer.say(f"{type(module).__name__} has no validation_step: the validation data is not used")
        if not writes_step or trainer.overfit_batches:
            return
        loaders, limits = self._load_validation()
        if all(limit == 0 for limit in limits):
            return
        self.validation = EvaluationRun.inside(self, loaders, limits, leaves_no_trace=False)
        if steps := trainer.num_sanity_val_steps:
            few = limits if steps < 0 else [at_most(steps, limit) for limit in limits]
            self.sanity = EvaluationRun.inside(self, loaders, few, leaves_no_trace=True)

    def _load_training(self) -> None:
        loader = self.data.train_dataloader()
        check_training_data(loader, self.module)
        self.loader, self.limit = training_loader(
            self.trainer, loader, self.seed, joins_single=self._trains_batchnorm()
        )
        self.undo.append(partial(end_workers, self.loader))

    def _keep_batch_of_all(self, content: Mapping[str, Any]) -> None:
        """Where fewer processes go on, a step takes as many samples as before: each has several batches for it.

        Another batch size than before, or limits that count batches, say that something else is wanted.
        """
        then, order, world = content.get("batch_of_all"), self.ordered, self.strategy.world_size
        if then is None or order is None:
            return
        counts_batches = self.limit is not None or isinstance(self.trainer.val_check_interval, int)
        is_asked_for = then["samples"] != then["processes"] * order.own_size
        if world >= then["processes"] or is_asked_for or counts_batches or order.drop_last or not self.automatic:
            return
        most = then["processes"] + 1
        parts = next((n for n in range(1, most) if _is_share(then["samples"], n * world, order.own_size)), None)
        if parts is None:
            return
        order.share_out(then["samples"] // (parts * world))
        before, self._batch_of_all = self.accumulation, dict(then)
        self.accumulate(lambda epoch: parts * before(epoch))
        self.trainer.say(
            f"going on with {world} process{'es' if world > 1 else ''} in place of {then['processes']}: "
            f"{parts} batches of {order.own_size} for each step, which still takes {then['samples']} samples"
        )

    @property
    def batch_of_all(self) -> dict[str, int] | None:
        """Samples of a batch of all processes together, and the number of processes that this was settled for."""
        if self._batch_of_all is not None or self.ordered is None:
            return self._batch_of_all
        return {"samples": self.ordered.batch_size, "processes": self.strategy.world_size}

    def _load_validation(self) -> tuple[list[Any], list[int | None]]:
        loaders = evaluation_loaders(self.trainer, self.module, self.data.val_dataloader(), "val")
        self.undo += [partial(end_workers, loader) for loader in loaders]
        return loaders, [limit_of(self.trainer.limit_val_batches, loader) for loader in loaders]

    def _set_validation_interval(self) -> None:
        if self.validation is not None and self.solving is None:
            self.validation_times.set_interval(self.batches_in_epoch)

    def _reload(self) -> None:
        """Make the loaders again where `reload_dataloaders_every_n_epochs` asks for it."""
        every: int = self.trainer.reload_dataloaders_every_n_epochs
        if not every or self.epoch // every == self._loaded_in // every:
            return
        self._loaded_in = self.epoch
        self._load_training()
        for extension in self._extensions:
            self.loader = extension.wrap_loader(self, self.loader)
        if self.validation is not None:
            loaders, self.validation.limits = self._load_validation()
            for extension in self._extensions:
                loaders = [extension.wrap_loader(self.validation, loader) for loader in loaders]
            self.validation.read_from(loaders)
        self._set_validation_interval()

    def _add_training(self) -> None:
        """Optimizers and schedules; where the head is solved, the pass that collects its features."""
        module = self.module
        refuse_gradients(module, self.finetuning)  # the data may have made the head
        if self.solves_head:
            ClosedFormFit(self).prepare()
            return
        if self.freezing is not None:
            self.freezing.freeze_for_good()
        configured = module.configure_optimizers()
        self.optimizers, self.schedulers = read_optimizers(configured, self)
        self.frequencies = read_frequencies(configured)
        if self.freezing is not None and self.freezing.finetuning.has_rates:
            require_phase_groups(self.optimizers, self.freezing.rates, module)
        if not self.automatic:
            leave_optimization_to_module(self)

    @property
    def solves_head(self) -> bool:
        """Whether the head is fitted in closed form, in one pass and without an optimizer."""
        return fits_in_closed_form(self.module, self.finetuning)

    def begin(self) -> None:
        """Settle what describes the run: from here on its settings are those that count."""
        self.recipe = recipe_of(self)

    # ---- what callbacks and extensions call

    def stop(self, reason: str) -> None:
        """End the fit after this step, or when `min_epochs` and `min_steps` allow it; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def go_on(self) -> None:
        """Forget why the fit was to end: a run that is resumed has more patience or time."""
        self.stop_reason = ""

    def leave(self) -> None:
        """End the fit at the next step; the epoch keeps its place, to be continued by another run."""
        self.is_leaving = True

    def interrupt(self, signal_number: int) -> None:
        """End the fit at the next step because of a signal."""
        super().interrupt(signal_number)
        self.is_leaving = True

    def skip_rest(self) -> None:
        """Leave out the rest of the epoch."""
        self.skip_epoch = True

    def note_step(self) -> None:
        """With manual optimization: the module has let an optimizer step."""
        self.has_stepped = True

    def accumulate(self, batches_a_step: Callable[[int], int]) -> None:
        """Set how many batches make one optimizer step, by epoch; before the optimizers are made."""
        self.accumulation = batches_a_step

    def limit_steps(self, steps: int) -> None:
        """End after so many optimizer steps, whatever `max_steps` is."""
        self.max_steps = steps

    def read_from(self, loader: Any) -> None:
        """Take the batches from another loader, which gives the same samples in the same order."""
        self.loader = loader

    def replace_training(self, solving: ClosedFormFit) -> None:
        """One pass in which each batch goes to `solving.step`, without optimizers; at its end `solving.finish`."""
        self.solving = solving
        self.training_step, self.automatic, self.keeps_outputs = solving.step, False, False
        self.max_epochs, self.max_steps = 1, -1

    def keep_last_weights(self) -> None:
        """Do not put the best epoch's weights back at the end."""
        self.restores_best = False

    def take_best(self, metrics: dict[str, float]) -> None:
        """The best epoch's weights have been put back: its metrics are the run's."""
        self.metrics, self.fresh_metrics, self.has_best = metrics, set(metrics), True

    def _extend_parts(self, extension: RunExtension) -> None:
        super()._extend_parts(extension)
        self._extensions.append(extension)
        precision = self.precision
        parts = [(name, part, getattr(precision, name)) for name, part in _PRECISION_PARTS.items()]
        wrapped = {name: extension.wrap_call(self, part, call) for name, part, call in parts}
        if any(wrapped[name] is not call for name, _, call in parts):
            self.precision = cast("Precision", Wrapped(precision, wrapped))
        self.loader = extension.wrap_loader(self, self.loader)
        for nested in (self.validation, self.sanity):
            if nested is not None:  # whose listeners are those of this run
                nested._extend_parts(extension)

    # ---- position and limits

    @property
    def done(self) -> bool:
        """Whether no further epoch is wanted."""
        if self.out_of_steps or (self.max_epochs is not None and self.epoch >= self.max_epochs):
            return True
        if self.is_leaving and self.interrupted_by is None:
            return True
        return bool(self.stop_reason) and self.may_stop_after(self.epoch - 1)

    @property
    def out_of_steps(self) -> bool:
        """Whether `max_steps` has been reached."""
        return 0 <= self.max_steps <= self.global_step

    @property
    def why_nothing_was_left(self) -> str:
        """Why a run that was continued had ended before; empty if it trained."""
        if self.samples_seen != self._resumed_at or self.solving is not None or self.is_leaving:
            return ""
        ended = self.stop_reason or f"it has had its {self.epoch} epochs and {self.global_step} steps"
        return f"nothing left to do: {ended}"

    def may_stop_after(self, epoch: int) -> bool:
        """Whether `min_epochs` and `min_steps` allow a run to stop early when an epoch is over."""
        least: int = self.trainer.min_epochs or 0
        return epoch + 1 >= least and self.global_step >= (self.trainer.min_steps or 0)

    @property
    def ends_unexpectedly(self) -> bool:
        """Whether the epoch is over before its loader's end, or where nobody knew that it would be."""
        return self.epoch_is_over and (not self._exhausted or self.batches_in_epoch is None)

    @property
    def group_is_complete(self) -> bool:
        """Whether the batch that is worked on is the last of its accumulation group."""
        return self.batch_idx == self.group_end

    @property
    def batches_in_epoch(self) -> int | None:
        """How many batches an epoch has, None if the loader does not know."""
        return at_most(length_of(self.loader), self.limit)

    @property
    def remark_on_batches(self) -> str:
        """A sentence about a last batch with one sample more than the others; empty if it has not."""
        joined = None if self.ordered is None else self.ordered.joined
        if joined is None or self.batches_in_epoch != length_of(self.loader):
            return ""
        noun = self.module.sample_noun
        return f"the last batch of an epoch has {joined} {noun}: BatchNorm cannot train on one that is left over alone"

    def steps_before(self, epoch: int) -> int | None:
        """How many optimizer steps come before an epoch, None if the loader does not know its length."""
        batches = self.batches_in_epoch
        return None if batches is None else sum(math.ceil(batches / self.accumulation(e)) for e in range(epoch))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None if it has no known end."""
        by_steps = self.max_steps if self.max_steps >= 0 else math.inf
        by_epochs = None if self.max_epochs is None else self.steps_before(self.max_epochs)
        total = min(by_steps, math.inf if by_epochs is None else by_epochs)
        return None if math.isinf(total) else int(total)

    @property
    def total_epochs(self) -> int | None:
        """Epochs of the whole run, the last of which `max_steps` may cut short; None if it has no known end."""
        batches = self.batches_in_epoch
        if self.max_steps < 0 or not batches:
            return self.max_epochs
        epochs = steps = 0
        most = math.inf if self.max_epochs is None else self.max_epochs
        while steps < self.max_steps and epochs < most:
            steps += math.ceil(batches / self.accumulation(epochs))
            epochs += 1
        return epochs

    # ---- what the loop asks for

    def start_epoch(self) -> None:
        """Freeze and unfreeze, set modes, and continue at the run's place in the epoch."""
        self.outputs.clear()
        self._collected = -1
        if not self.batch_idx:
            self.fresh_metrics.clear()
        self.skip_epoch = self.epoch_is_over = False
        self._epoch_started_at, self._trained_for = time.monotonic(), 0.0
        self.module.train()
        enter_phase(self)
        self._step_precision = self.inference_precision if self.is_frozen(self.epoch) else self.precision
        for optimizer in self.optimizers if self.automatic or not self.samples_seen else ():
            optimizer.zero_grad()  # of a batch that was skipped, or of what happened before the run
        self._reload()
        self.go_to(self.epoch, self.samples)

    def go_to(self, epoch: int, sample: int = 0) -> None:
        """Let the loader give an epoch's batches next, from a sample on if the order is the engine's own."""
        batch = self.batch_idx if sample else 0
        self._begins_here = begin_at(self.loader, epoch, sample=sample, batch=batch, frozen=self.is_frozen(epoch))

    def is_frozen(self, epoch: int) -> bool:
        """Whether the whole backbone is frozen in an epoch."""
        if self.freezing is None or self.phases is None:
            return False
        return self.freezing.is_frozen(self.phases.position(epoch).number)

    def first_step_of(self, phase: int) -> int | None:
        """The optimizer step at which a phase of the strategy began, None if it has not."""
        return None if self.phases is None else self.phases.first_step(phase)

    @property
    def ordered(self) -> OrderedBatches | None:
        """The engine's own order of samples, None for a loader of the user's that was left alone."""
        return order_of(self.loader)

    def stretches(self) -> Iterator[Iterator[list[Any]]]:
        """The epoch's remaining batches as `groups` gives them, in stretches: a validation comes between two of them.

        The first stretch is empty where a resumed run was stopped before a validation.
        """
        batches = self._open()
        while not self.epoch_is_over:
            yield self._groups(batches, self.validation_times.next_in_epoch)
            if self.validation_times.is_overdue:
                self.validation_times.note()  # a loop of the user's has left it out

    def groups(self) -> Iterator[list[Any]]:
        """The epoch's remaining batches in accumulation groups, until the epoch is cut short."""
        return self._groups(self._open(), math.inf)

    def _open(self) -> Iterator[Any]:
        batches = iter(self.loader) if self._begins_here else self._read_again()
        return islice(batches, None if self.limit is None else max(0, self.limit - self.batch_idx))

    def _groups(self, batches: Iterator[Any], end: float) -> Iterator[list[Any]]:
        """Groups of batches up to the place in the epoch at which validation is due, or up to the epoch's end."""
        self.has_validated = False
        self.new_metrics.clear()
        started_at = time.monotonic()
        is_used_up = False
        accumulate = self.accumulation(self.epoch)
        while not (self._is_cut_short() or self.out_of_steps):
            if self.batch_idx >= end and self.batch_idx != self.batches_in_epoch:
                self._trained_for += time.monotonic() - started_at
                return
            group = list(islice(batches, accumulate))
            if is_used_up := not group:
                break
            yield group
        self._trained_for += time.monotonic() - started_at
        self._end_batches(is_used_up)

    def _end_batches(self, is_used_up: bool) -> None:
        """The loader has no further batch, or those that follow are left out."""
        self.group_is_open = False
        self._raise_if_diverged()
        if signal_number := self.strategy.reduce(self.interrupted_by or 0, "max"):
            self.interrupted_by = signal_number
            raise RunInterruptedError(signal_number)
        if is_used_up and not self.batch_idx and hasattr(self.loader, "__next__") and self.epoch:
            raise used_up("training")
        if is_used_up and not self.batch_idx:
            raise UsageError(
                "the training loader gave no batch",
                why="it is empty, or has fewer samples than a batch and drops the last one",
                fix="a smaller batch_size, drop_last=False, or limit_train_batches above 0",
            )
        self._exhausted = self.skip_epoch or is_used_up or self.batch_idx == self.batches_in_epoch
        self.epoch_is_over = True
        self.finish_pass()

    def finish_pass(self) -> None:
        """Where an epoch's batches end: a head that is solved is computed here."""
        if self.solving is not None:
            self.solving.finish()

    def _is_cut_short(self) -> bool:
        """Whether the epoch ends here; where one process ends it, all do."""
        stops = bool(self.stop_reason) and self.may_stop_after(self.epoch - 1)
        if self.strategy.world_size > 1:
            # Asked before every step, so it is one exchange and not four.
            noted = torch.tensor([int(self.skip_epoch), int(self.is_leaving), int(stops), self.interrupted_by or 0])
            skips, leaves, stops, signal_number = self.strategy.reduce(noted, "max").tolist()
            # A signal that has come since then is kept: the others hear of it when they are asked again.
            self.skip_epoch, self.is_leaving = self.skip_epoch or bool(skips), self.is_leaving or bool(leaves)
            self.interrupted_by = self.interrupted_by or signal_number or None
            return bool(skips or leaves or stops)
        return self.skip_epoch or self.is_leaving or stops

    def _read_again(self) -> Iterator[Any]:
        """A loader of the user's, continued in the middle of an epoch: behind the batches that were trained on."""
        self.trainer.say(
            f"your own loader cannot be asked for its order: the first {self.batch_idx} batches of epoch {self.epoch} "
            "are read again and left out; if it shuffles, they are not those that were trained on"
        )
        # What reading them draws was drawn before the stop already.
        states = generator_states()
        batches: Iterator[Any] = iter(self.loader)
        for _ in islice(batches, self.batch_idx):
            pass
        set_generator_states(states)
        return batches

    def forward(self) -> AbstractContextManager[Any]:
        """The context of a step's forward pass; what is logged in it belongs to `training_step`.

        With `precision="auto"` only steps in which the backbone trains may round: a head on a frozen backbone is
        trained on the features that it is given later.
        """
        self.current_hook = "training_step"
        return self._step_precision.forward()

    def forward_only(self, batch: Any, batch_idx: int) -> None:
        """The forward half of a training step, in the precision of evaluation."""
        if batch is None:
            return
        self.batch_size = batch_size_of(batch)
        moved = self.to_device(batch)
        for _, arguments in self.turns():
            self.current_hook = "training_step"
            with self.inference_precision.forward():
                self.training_step(moved, batch_idx, *arguments)

    def receive(self, group: list[Any]) -> Iterator[tuple[float, Any, int]]:
        """Each batch of a group on the device: (its share of the group's samples, batch, its number in the epoch)."""
        sizes = [0 if batch is None else batch_size_of(batch) for batch in group]
        processes = self.strategy.world_size
        known = known_shares(self.loader, self.samples, self.batch_idx, len(group), processes)
        shares = shares_of_group(sizes, known, processes)
        given = [number for number, batch in enumerate(group, 1) if batch is not None]
        self.group_end = self.batch_idx + (given[-1] if given else 0)
        self._turn = optimizer_in_turn(self.frequencies, self.batch_idx) if self.frequencies else None
        self.group_is_open, self.has_gradients, self.has_stepped = bool(given), False, False
        for batch, (self.batch_size, taken, self.share) in zip(group, shares, strict=True):
            self.batch_idx += 1
            self.batches_seen += 1
            self.samples += taken
            self.samples_seen += taken
            if batch is None:  # a `collate_fn` has nothing to give
                self._require_one_process()
                continue
            # A sample that only fills a step is another process's own, and is counted there.
            with nullcontext() if self.batch_size else uncounted(self.metric_objects()):
                yield self.share, self.to_device(batch), self.batch_idx - 1

    def _require_one_process(self) -> None:
        """Without a step of this process the others would wait for its gradients."""
        if self.strategy.world_size > 1:
            raise UsageError(
                "the training loader gave None for a batch in one of several processes",
                why="each process takes part in each step",
                fix="leave the samples out in the dataset",
            )

    def metric_objects(self) -> list[Any]:
        """The metric objects that steps may give something to: parts of the module, and what was logged."""
        logged = (entry.metric for entry in self.results.entries.values() if entry.metric is not None)
        return list({id(one): one for one in (*filter(is_metric, self.module.modules()), *logged)}.values())

    def turns(self) -> Iterable[tuple[Optimizer | None, tuple[int, ...]]]:
        """Who is trained by a batch: (optimizer, further arguments of the step), one after the other.

        With several optimizers each has its turn, in which only its own parameters want gradients; if they have
        frequencies, one of them has. With manual optimization, or none, there is one turn without an optimizer.
        """
        if not self.automatic or not self.optimizers:
            return ((None, ()),)
        if len(self.optimizers) == 1:
            return ((self.optimizers[0], ()),)
        return self._alternate()

    def _alternate(self) -> Iterator[tuple[Optimizer, tuple[int]]]:
        for index, optimizer in enumerate(self.optimizers):
            if self._turn not in (None, index):
                continue
            if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
                continue  # all that it trains is frozen now
            before = train_only(optimizer, self.optimizers)
            self.turn = index
            yield optimizer, (index,)
            for parameter, wanted in before.items():
                parameter.requires_grad_(wanted)

    def loss_of(self, outputs: Any) -> torch.Tensor | None:
        """The loss that a training step returned, checked before it can touch the weights.

        Raises:
            DivergedError: it is NaN or infinite.
            UsageError: what was returned holds no loss.
        """
        if outputs is None or not self.automatic:
            return None
        loss = loss_in(outputs)
        self.check_finite("the loss", loss)
        self.has_gradients = True
        return loss

    def check_finite(self, what: str, value: torch.Tensor) -> None:
        """Let no NaN or infinite loss or norm come near the weights.

        Raises:
            DivergedError: it is one, and that could be seen without waiting for a device.
        """
        if self.guard.refuses(value):
            raise self._diverged(what, f"became {value.item()}")

    def agree_on_gradients(self, optimizer: Optimizer) -> None:
        """With manual optimization: let the gradients that an optimizer is about to use be those of all processes."""
        if self.strategy.world_size > 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.strategy.average_gradients(parameters, self.batch_size)

    def mean_over_processes(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """A loss as the mean over the samples that all processes have in a batch."""
        if self.strategy.world_size == 1 or loss is None:
            return loss
        total = self.strategy.reduce(loss.detach() * self.batch_size, "sum")
        return total / self.strategy.reduce(self.batch_size, "sum")

    def clip_gradients(self, optimizer: Optimizer) -> None:
        """Clip by norm or by value, if `gradient_clip_val` asks for it; after this the optimizer may step.

        Raises:
            DivergedError: the norm is NaN or infinite.
        """
        trainer = self.trainer
        if trainer.gradient_clip_val or trainer.detect_anomaly:
            norm = clip(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            # With a gradient scaler an overflow does not mean divergence: the scaler skips that step.
            if norm is not None and not self.precision.skips_overflow:
                self.check_finite("the norm of the gradients", norm)
        self.guard.hold_back(optimizer)

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Clear the gradients of an optimizer that has stepped."""
        optimizer.zero_grad()

    def scheduler_step(self, scheduler: Any, metric: float | None) -> None:
        """Step a scheduler, with the metric that it monitors if it wants one."""
        scheduler.step() if metric is None else scheduler.step(metric)

    def _raise_if_diverged(self) -> None:
        """What a device noted is read here, where values are read anyway."""
        if self.guard.has_seen_bad():
            raise self._diverged("the loss", "was NaN or infinite at or before this place")

    def _diverged(self, what: str, how: str) -> DivergedError:
        rates = ", ".join(f"{rate:g}" for rate in learning_rates(self.optimizers).values())
        clipped = bool(self.trainer.gradient_clip_val)
        return DivergedError(
            f"{what} {how} in epoch {self.epoch}, batch {self.batch_idx - 1}, step {self.global_step}",
            why=f"learning rates were {rates}; the step was not taken",
            fix="lower the learning rate" if clipped else "lower the learning rate, or pass gradient_clip_val=1.0",
        )

    def count_step(self) -> None:
        """The optimizers have stepped; with manual optimization, only if the module let one of them."""
        self.group_is_open = False
        self.precision.update()
        skipped = bool(self.optimizers) and not self.has_gradients  # no batch of the group had a loss
        if skipped if self.automatic else not self.has_stepped:
            return
        self.global_step += 1
        for rate in self.schedulers:
            if rate.interval == "step" and self.global_step % rate.frequency == 0 and self._is_in_turn(rate):
                if not rate.reduce_on_plateau:
                    rate.step(self.metrics, self.scheduler_step)
                elif not self.validation_times.is_overdue:  # else it waits for the values of that validation
                    rate.step(self.metrics | self.results.callback_values(), self.scheduler_step)

    def _is_in_turn(self, rate: ScheduledRate) -> bool:
        """Whether the optimizer of a schedule has taken the step."""
        return self._turn is None or getattr(rate.scheduler, "optimizer", None) is self.optimizers[self._turn]

    @property
    def own_part(self) -> dict[str, Callable[..., Any]]:
        """The values of a step are written when everybody has logged theirs."""
        return {"train_batch_end": self._write_step}

    def _write_step(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.global_step
        if step == self._written_step:
            return  # in the middle of an accumulation group, or no optimizer stepped
        self._written_step = step
        if step % self.trainer.log_every_n_steps == 0:
            self._raise_if_diverged()
            values = self.results.step_values()
            for logger in self.loggers if values else ():
                logger.log_step(values, step, self.epoch)
        if step % self.trainer.flush_logs_every_n_steps == 0:
            self.flush_logs()

    def flush_logs(self) -> None:
        """Let every logger write down the values that it has."""
        for logger in self.loggers:
            logger.flush()

    def keep(self, returned: list[Any]) -> Any:
        """Collect what steps returned, if the module wants to see it at the end of the epoch.

        Args:
            returned: for a batch, by the step of each optimizer.

        Returns:
            What hooks are given: what the step returned, or a list of that where there are several optimizers.
        """
        if self.keeps_outputs:
            self.outputs.append(self._of_turns([as_seen_by_hooks(detached(one)) for one in returned]))
        if not self._hooks_read_outputs:
            return self._of_turns(returned)
        return self._of_turns([as_seen_by_hooks(one) for one in returned])

    def _of_turns(self, returned: list[Any]) -> Any:
        if self.automatic and len(self.optimizers) > 1:
            return returned
        return returned[0] if returned else None

    def take_metrics(self, values: dict[str, float]) -> None:
        """Values that were measured in this epoch."""
        self.metrics.update(values)
        self.fresh_metrics.update(values)
        self.new_metrics.update(values)

    def take_validation(self, values: dict[str, float], logged: dict[str, float]) -> None:
        """The values of a validation that is over, and those of them that loggers are given."""
        self.take_metrics(values)
        self.logged |= logged
        for rate in self.schedulers if self.validation_times.is_overdue else ():
            if rate.reduce_on_plateau and rate.interval == "step" and self.global_step % rate.frequency == 0:
                rate.step(self.metrics | self.results.callback_values(), self.scheduler_step)
        self.validation_times.note()
        self.has_validated = True

    def close_validation(self) -> None:
        """Write the row of a validation inside an epoch."""
        assert self.validation is not None
        row: dict[str, float] = {"epoch": self.epoch, "step": self.global_step, **self.validation.results_of_pass}
        self.validations.append(row)
        for logger in self.loggers:
            logger.log_epoch(row)
        self.flush_logs()

    @property
    def metrics_of_weights(self) -> dict[str, float]:
        """The values that were measured in the epoch that the weights are from: others are of earlier weights."""
        return {name: value for name, value in self.metrics.items() if name in self.fresh_metrics}

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of the log: of validations inside epochs, and of epochs."""
        return sorted([*self.validations, *self.history], key=lambda row: (row["epoch"], row["step"]))

    def collect(self) -> None:
        """Compute the epoch's values as far as they are logged, so that hooks of its end can read them."""
        if self._is_out_of_date("train_epoch_end"):
            self._of_epoch = self.strategy.gather(self.results.callback_values())[0]
            self._collected = len(self.results.entries)
            self.take_metrics(self._of_epoch)

    def close_epoch(self) -> None:
        """Collect the epoch's values, step the schedulers, and write the epoch's row."""
        rates = learning_rates(self.optimizers)
        self.collect()
        for rate in self.schedulers:
            due = rate.interval == "epoch" and (self.epoch + 1) % rate.frequency == 0 and self._exhausted
            if due and self._can_step(rate):
                rate.step(self.metrics, self.scheduler_step)
        spent = self.epoch_seconds + time.monotonic() - self._epoch_started_at
        trained = max(self._trained_for, 1e-9)
        self.seconds += spent
        self.training_seconds += trained
        row: dict[str, float] = {"epoch": self.epoch, "step": self.global_step}
        row |= {name: self._of_epoch[name] for name in self.results.epoch_names()}
        if self.validation is not None and self.has_validated:
            row |= self.validation.results_of_pass
        row |= {name: rate for name, rate in rates.items() if name not in row}
        row["trainable_parameters"] = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        row[f"{self.module.sample_noun}_per_second"] = (self.samples - self._samples_before) / trained
        row["seconds"] = spent
        self.history.append(row)
        self.logged = self.logged_values | row
        self.epoch_is_complete = self._exhausted
        leave_phase(self)
        self.trainer.require_own_folder()
        for logger in self.loggers:
            logger.log_epoch(row)
        self.flush_logs()

    def _can_step(self, rate: ScheduledRate) -> bool:
        """A plateau scheduler waits for epochs in which its metric is measured."""
        measured = not rate.reduce_on_plateau or rate.monitor in self.fresh_metrics
        return measured or self.validation is None or self.validation_times.was_in_epoch

    def end_epoch(self) -> None:
        """Go on to the next epoch; one that `max_steps` cut short keeps its place. Where one process stops, all do."""
        self.stop_reason = next(filter(None, self.strategy.gather(self.stop_reason)), "")
        if not self.epoch_is_complete:
            return
        self.epoch += 1
        self.epoch_is_complete = False
        self._go_to_start()
        self.results.reset()

    def begin_epoch_anew(self) -> None:
        """Go back from the middle of an epoch to its first batch."""
        self.samples_seen -= self.samples
        self.batches_seen -= self.batch_idx
        self._go_to_start()

    def _go_to_start(self) -> None:
        self.batch_idx = self.samples = self._samples_before = 0
        self.epoch_seconds = 0.0
        self.validation_times.begin_epoch()

    # ---- what survives a kill

    def state_dict(self) -> dict[str, Any]:
        """Progress, in names that a reader of the checkpoint understands.

        Raises:
            UsageError: in the middle of an accumulation group, whose gradients are in no checkpoint.
            DivergedError: the weights are no longer worth keeping.
        """
        self._raise_if_diverged()
        if self.group_is_open:
            raise UsageError(
                "a checkpoint cannot be written in the middle of a step",
                why="gradients are in no checkpoint, so the run could not be continued exactly",
                fix="save in on_train_batch_end when trainer.global_step has grown, or in on_epoch_end",
            )
        complete = self.epoch_is_complete
        so_far = self.epoch_seconds + time.monotonic() - self._epoch_started_at
        return {
            "epoch": self.epoch,
            "epoch_is_complete": complete,
            "global_step": self.global_step,
            "batch_idx": 0 if complete else self.batch_idx,
            "batches_seen": self.batches_seen,
            "validated_at": self.validation_times.last,
            "measured": sorted(self.fresh_metrics),
            "samples": 0 if complete else self.samples,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "epoch_seconds": so_far if self.batch_idx and not complete else 0.0,
            "metrics": dict(self.metrics),
            "history": self.history,
            "validations": self.validations,
            "results": [] if complete else self.results.state_dict(self.module),
            "stop_reason": self.stop_reason,
            "phases": None if self.phases is None else self.phases.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: at the start of the next epoch, or in the middle of one."""
        self.epoch = state["epoch"] + (1 if state["epoch_is_complete"] else 0)
        self.global_step, self.samples_seen = state["global_step"], state["samples_seen"]
        self._written_step = self.global_step
        self._resumed_at = self.samples_seen
        before, self.samples = state["batch_idx"], state["samples"]
        # In batches of this run, which fewer processes may take more of for the same step.
        self.batch_idx = self.samples // self.ordered.batch_size if before and self.ordered is not None else before
        self._samples_before = self.samples
        # A checkpoint of 0.1 does not have these.
        self.batches_seen = state.get("batches_seen", self.batch_idx)
        self.validations = list(state.get("validations", ()))
        self.fresh_metrics = set(state.get("measured") or (state["metrics"] if state["epoch_is_complete"] else ()))
        self.validation_times.go_on(state.get("validated_at", 0), before)
        self.seconds, self.training_seconds = state["seconds"], state["training_seconds"]
        self.epoch_seconds = state["epoch_seconds"]
        self.metrics, self.stop_reason = dict(state["metrics"]), state["stop_reason"]
        # The row of an epoch that was cut short is written again when it is complete.
        self.history = [row for row in state["history"] if row["epoch"] < self.epoch]
        self.logged = dict(self.rows[-1]) if self.rows else {}
        self.results.load_state_dict(state["results"], self.module)
        if self.phases is not None and state["phases"] is not None:
            self.phases.load_state_dict(state["phases"])


def _is_share(samples: int, parts: int, most: int) -> bool:
    """Whether so many equal parts of a batch have no more samples than a process can take."""
    return samples % parts == 0 and samples // parts <= most
