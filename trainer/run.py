"""One call of a verb, and everything that changes during it.

What must survive a kill is what `FitRun.state_dict()` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from flashtask.core.errors import DivergedError, UsageError
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.finetuning import Freezing
from flashtask.trainer.loading import OrderedBatches, batch_size_of, length_of
from flashtask.trainer.optimizers import ScheduledRate
from flashtask.trainer.precision import Precision
from flashtask.trainer.results import Results

__all__ = ["EvaluationRun", "FitRun", "Run"]


class Run:
    """What every verb has: module, data, device, precision, and the values logged so far."""

    def __init__(self, trainer: Any, module: Any, data: Any, device: torch.device, precision: Precision) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.device, self.precision = device, precision
        self.memory_format: torch.memory_format = torch.contiguous_format
        self.results = Results()
        #: the moment or step that runs now; it decides how `log` keeps a value
        self.moment = "setup"
        #: samples in the batch that is worked on
        self.batch_size = 1
        self.dataloader_idx = 0
        self.callbacks: list[Any] = []
        #: moment -> who is told of it
        self.listeners: dict[str, tuple[Callable[..., Any], ...]] = {}

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: str,
        batch_size: int | None,
    ) -> None:
        """Keep a value under the moment that runs now."""
        self.results.log(
            self.moment,
            name,
            value,
            weight=self.batch_size if batch_size is None else batch_size,
            on_step=on_step,
            on_epoch=on_epoch,
            prog_bar=prog_bar,
            logger=logger,
            reduce_fx=reduce_fx,
            dataloader_idx=self.dataloader_idx,
        )

    def to_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Move a batch to the run's device and memory format, through the data module's transfer hooks."""
        batch = self.data.on_before_batch_transfer(batch, dataloader_idx)
        batch = self.data.transfer_batch_to_device(batch, self.device, dataloader_idx)
        batch = self.data.on_after_batch_transfer(batch, dataloader_idx)
        if self.memory_format is torch.channels_last:
            batch = _channels_last(batch)
        return batch


def _channels_last(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
    if type(batch) in (list, tuple):
        return type(batch)(_channels_last(part) for part in batch)
    return batch


def _at_most(length: int | None, limit: int | None) -> int | None:
    return limit if length is None else length if limit is None else min(length, limit)


class FitRun(Run):
    """Training: optimizers, progress, and the runs of validation that nest in it."""

    def __init__(self, trainer: Any, module: Any, data: Any, device: torch.device, precision: Precision) -> None:
        super().__init__(trainer, module, data, device, precision)
        self.loader: Any = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[ScheduledRate] = []
        self.freezing: Freezing | None = None
        self.validation: EvaluationRun | None = None
        self.sanity: EvaluationRun | None = None
        self.seed = 0
        # progress: this is what a checkpoint holds
        self.epoch = 0
        self.epoch_is_complete = False
        self.global_step = 0
        self.batch_idx = 0
        self.samples = 0
        self.seconds = 0.0
        self.samples_seen = 0
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.stop_reason = ""
        # limits, from the trainer's settings
        self.max_epochs: int | None = None
        self.max_steps = -1
        self.accumulate = 1
        self.limit: int | None = None
        self.skip_epoch = False
        self.interrupted_by: int | None = None
        self._epoch_started_at = 0.0
        self._group_end = 0
        self._resuming = False

    # ---- where the run stands

    @property
    def done(self) -> bool:
        """Whether no further epoch is wanted."""
        return self.out_of_steps or self.epoch >= (self.max_epochs or math.inf) or bool(self.stop_reason)

    @property
    def out_of_steps(self) -> bool:
        """Whether `max_steps` has been reached."""
        return 0 <= self.max_steps <= self.global_step

    @property
    def epoch_cut_short(self) -> bool:
        """Whether the rest of the epoch's batches is not wanted."""
        return self.skip_epoch or self.out_of_steps or self.interrupted_by is not None

    @property
    def validates(self) -> bool:
        """Whether this epoch ends with validation."""
        every: int = self.trainer.check_val_every_n_epoch
        return (self.epoch + 1) % every == 0

    @property
    def group_is_complete(self) -> bool:
        """Whether the batch that is worked on is the last of its accumulation group."""
        return self.batch_idx == self._group_end

    @property
    def batches_in_epoch(self) -> int | None:
        """How many batches an epoch has, None if the loader does not know."""
        return _at_most(length_of(self.loader), self.limit)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None if it has no known end."""
        by_steps = self.max_steps if self.max_steps >= 0 else math.inf
        per_epoch = self.batches_in_epoch
        by_epochs = math.inf
        if per_epoch is not None and self.max_epochs is not None:
            by_epochs = math.ceil(per_epoch / self.accumulate) * self.max_epochs
        total = min(by_steps, by_epochs)
        return None if math.isinf(total) else int(total)

    # ---- what the loop asks for

    def start_epoch(self) -> None:
        """Settle what is frozen, set modes, and begin at the place in the epoch where the run stands."""
        if not self._resuming:
            self.batch_idx = self.samples = 0
            self.results.reset()
        self._resuming = False
        self.skip_epoch = False
        self._epoch_started_at = time.monotonic()
        self.module.train()
        frozen = False
        if self.freezing is not None:
            stage = self.freezing.apply(self.epoch)
            frozen = stage.frozen
            if stage.start == self.epoch and self.epoch > 0:
                count = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
                self.trainer.say(f"epoch {self.epoch}: unfreezing, {count:,} parameters train now")
        ordered = getattr(self.loader, "batch_sampler", None)
        if isinstance(ordered, OrderedBatches):
            ordered.set_place(self.epoch, start=self.samples, frozen=frozen)
        elif hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)

    def groups(self) -> Iterator[list[Any]]:
        """The epoch's remaining batches in accumulation groups, until the epoch is cut short."""
        remaining = None if self.limit is None else max(0, self.limit - self.batch_idx)
        batches = islice(iter(self.loader), remaining)
        while not self.epoch_cut_short and (group := list(islice(batches, self.accumulate))):
            yield group
        if self.interrupted_by is not None:
            raise RunInterruptedError(self.interrupted_by)

    def receive(self, group: list[Any]) -> Iterator[tuple[float, Any, int]]:
        """Each batch of a group on the device: (its share of the group's samples, batch, its number in the epoch)."""
        sizes = [batch_size_of(batch) for batch in group]
        total = sum(sizes)
        self._group_end = self.batch_idx + len(group)
        for batch, size in zip(group, sizes, strict=True):
            self.batch_size = size
            # Counted when it is handed out, so that a checkpoint written after the group's step stands behind it.
            self.batch_idx += 1
            self.samples += size
            self.samples_seen += size
            yield (1 if size == total else size / total), self.to_device(batch), self.batch_idx - 1

    def loss_of(self, outputs: Any) -> torch.Tensor | None:
        """The loss that a training step returned, checked before it can touch the weights.

        Raises:
            DivergedError: it is NaN or infinite.
            UsageError: there is no loss in what was returned.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None and outputs is None:
            return None
        if not isinstance(loss, torch.Tensor):
            raise UsageError(
                f"training_step returned {type(outputs).__name__} without a loss",
                fix='return the loss, or {"loss": loss, ...}',
            )
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            rates = ", ".join(f"{group['lr']:g}" for optimizer in self.optimizers for group in optimizer.param_groups)
            raise DivergedError(
                f"the loss became {loss.item()} in epoch {self.epoch}, batch {self.batch_idx}, step {self.global_step}",
                why=f"learning rates were {rates}; the step was not taken, the weights are as before it",
                fix="lower the learning rate, or pass gradient_clip_val=1.0",
            )
        return loss

    def clip_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by norm or by value, if the trainer was told to."""
        limit = self.trainer.gradient_clip_val
        if not limit:
            return
        self.precision.unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.trainer.gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)

    def count_step(self) -> None:
        """An optimizer step has been taken."""
        self.global_step += 1
        for rate in self.schedulers:
            if rate.interval == "step" and self.global_step % rate.frequency == 0:
                rate.step(self.metrics)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            values = self.results.step_values()
            for logger in self.trainer.loggers:
                logger.log_step(values, self.global_step, self.epoch)

    def close_epoch(self) -> None:
        """Collect the epoch's values, step the schedulers, and write the epoch's row."""
        rates = self.learning_rates()
        self.metrics.update(self.results.callback_values())
        for rate in self.schedulers:
            if rate.interval == "epoch" and (self.epoch + 1) % rate.frequency == 0:
                rate.step(self.metrics)
        spent = time.monotonic() - self._epoch_started_at
        self.seconds += spent
        row: dict[str, float] = {"epoch": self.epoch, "step": self.global_step}
        row |= self.results.epoch_values(logger_only=True)
        if self.validation is not None and self.validates:
            row |= self.validation.results_of_pass
        row |= rates
        row["trainable_parameters"] = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        row[f"{self.module.sample_noun}_per_second"] = self.samples / max(spent, 1e-9)
        row["seconds"] = spent
        self.history.append(row)
        self.epoch_is_complete = True
        for logger in self.trainer.loggers:
            logger.log_epoch(row)

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.epoch_is_complete = False

    def learning_rates(self) -> dict[str, float]:
        """Current rates: `learning_rate` for the first parameter group, `learning_rate_<name>` for the others."""
        rates: dict[str, float] = {}
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                name = str(group.get("name", f"{number}_{index}"))
                rates["learning_rate" if not rates else f"learning_rate_{name}"] = float(group["lr"])
        return rates

    def target_rates(self) -> dict[str, float]:
        """The rates that the optimizer was made with, by name of the parameter group, before any schedule."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return {
            str(group.get("name", f"group {index}")) + " learning rate": group.get("initial_lr", group["lr"])
            for index, group in enumerate(groups)
        }

    # ---- what survives a kill

    def state_dict(self) -> dict[str, Any]:
        """Progress, in names that a reader of the checkpoint understands."""
        return {
            "epoch": self.epoch,
            "epoch_is_complete": self.epoch_is_complete,
            "global_step": self.global_step,
            "batch_idx": self.batch_idx,
            "samples": self.samples,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "metrics": dict(self.metrics),
            "history": self.history,
            "results": [] if self.epoch_is_complete else self.results.state_dict(),
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken: at the start of the next epoch, or in the middle of one."""
        self.epoch = state["epoch"] + (1 if state["epoch_is_complete"] else 0)
        self.global_step, self.samples_seen = state["global_step"], state["samples_seen"]
        self.seconds, self.metrics = state["seconds"], dict(state["metrics"])
        self.history, self.stop_reason = list(state["history"]), state["stop_reason"]
        if not state["epoch_is_complete"]:
            self.batch_idx, self.samples = state["batch_idx"], state["samples"]
            self.results.load_state_dict(state["results"])
            self._resuming = True


class RunInterruptedError(Exception):
    """A signal asked the run to stop; its place in the epoch has been kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class EvaluationRun(Run):
    """Validation, test or prediction; it may nest in a fit run, and never replaces it.

    Args:
        outer: the run whose module, data and device it uses.
        word: `validation`, `test` or `predict`: the first word of its moments.
        loaders: one or more loaders.
        limits: for each loader, batches at the most, or None.
        parent: the fit run it nests in, or None.
        keep_outputs: collect what the step returns, for `predict`.
    """

    def __init__(
        self,
        outer: Run,
        word: str,
        loaders: list[Any],
        limits: list[int | None],
        *,
        parent: FitRun | None = None,
        keep_outputs: bool = False,
    ) -> None:
        super().__init__(outer.trainer, outer.module, outer.data, outer.device, outer.precision)
        self.memory_format = outer.memory_format
        self.word, self.loaders, self.limits, self.parent = word, loaders, limits, parent
        self.step_name = "predict_step" if word == "predict" else f"{word}_step"
        self.keep_outputs = keep_outputs
        self.outputs: list[list[Any]] = [[] for _ in loaders]
        #: the values of the last pass, under the names loggers show
        self.results_of_pass: dict[str, float] = {}
        self.samples_seen = 0
        self._modes: list[tuple[nn.Module, bool]] = []

    def begin(self) -> None:
        """Eval mode for everything; what was logged in the last pass is forgotten."""
        self.results.reset()
        self.samples_seen = 0
        self._modes = [(part, part.training) for part in self.module.modules()]
        self._generators = generator_states()
        self.module.eval()
        self.trainer.active_run = self

    def batches(self, number: int) -> Iterator[tuple[Any, int]]:
        """The batches of one loader, on the device, with their numbers."""
        self.dataloader_idx = number
        for batch_idx, batch in enumerate(islice(iter(self.loaders[number]), self.limits[number])):
            self.batch_size = batch_size_of(batch)
            yield self.to_device(batch, number), batch_idx
            self.samples_seen += self.batch_size
            if self.parent is not None and self.parent.interrupted_by is not None:
                self.abandon()
                raise RunInterruptedError(self.parent.interrupted_by)

    def batches_in(self, number: int) -> int | None:
        """How many batches the pass takes from a loader, None if the loader does not know its length."""
        return _at_most(length_of(self.loaders[number]), self.limits[number])

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Call the module's method for a batch; the loader's number is passed where there are several."""
        method = getattr(self.module, self.step_name)
        return method(batch, batch_idx, dataloader_idx) if len(self.loaders) > 1 else method(batch, batch_idx)

    def keep(self, outputs: Any, number: int) -> None:
        """Collect what prediction returns."""
        if self.keep_outputs:
            self.outputs[number].append(outputs)

    def close(self) -> None:
        """Compute the values of the pass and hand them to the fit run, if there is one."""
        self.results_of_pass = self.results.epoch_values(logger_only=True)
        if self.parent is not None and self is not self.parent.sanity:
            self.parent.metrics.update(self.results.callback_values())

    def metrics_of_loaders(self) -> list[dict[str, float]]:
        """The values of the last pass, a dictionary for each loader."""
        return [dict(self.results_of_pass)]

    def end(self) -> None:
        """Put modes back; a sanity check leaves no trace in the generators either."""
        if self.parent is not None and self is self.parent.sanity:
            self.abandon()
        for part, mode in self._modes:
            part.training = mode
        self._modes = []
        self.trainer.active_run = self.parent or self

    def abandon(self) -> None:
        """Put back what the pass drew from the generators: it is not part of the run that goes on, or is resumed."""
        set_generator_states(self._generators)
