"""The run of training: what a step needs, and what must survive a kill (`FitRun.state_dict()`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from flashtask.core.errors import DivergedError, UsageError
from flashtask.trainer.finetuning import Freezing
from flashtask.trainer.loading import OrderedBatches, batch_size_of, length_of
from flashtask.trainer.optimizers import ScheduledRate
from flashtask.trainer.precision import Precision
from flashtask.trainer.run import EvaluationRun, Run, RunInterruptedError, at_most

__all__ = ["FitRun"]


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
        self.training_seconds = 0.0
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
        self._trained_for = 0.0
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
        return at_most(length_of(self.loader), self.limit)

    @property
    def steps_in_epoch(self) -> int | None:
        """How many optimizer steps an epoch has, None if the loader does not know."""
        batches = self.batches_in_epoch
        return None if batches is None else math.ceil(batches / self.accumulate)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None if it has no known end."""
        by_steps = self.max_steps if self.max_steps >= 0 else math.inf
        per_epoch = self.steps_in_epoch
        by_epochs = math.inf
        if per_epoch is not None and self.max_epochs is not None:
            by_epochs = per_epoch * self.max_epochs
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
        self._trained_for = time.monotonic() - self._epoch_started_at
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
        self.training_seconds += self._trained_for
        row: dict[str, float] = {"epoch": self.epoch, "step": self.global_step}
        row |= self.results.epoch_values(logger_only=True)
        if self.validation is not None and self.validates:
            row |= self.validation.results_of_pass
        row |= rates
        row["trainable_parameters"] = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        row[f"{self.module.sample_noun}_per_second"] = self.samples / max(self._trained_for, 1e-9)
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
            "training_seconds": self.training_seconds,
            "metrics": dict(self.metrics),
            "history": self.history,
            "results": [] if self.epoch_is_complete else self.results.state_dict(),
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken: at the start of the next epoch, or in the middle of one."""
        self.epoch = state["epoch"] + (1 if state["epoch_is_complete"] else 0)
        self.global_step, self.samples_seen = state["global_step"], state["samples_seen"]
        self.seconds, self.training_seconds = state["seconds"], state["training_seconds"]
        self.metrics = dict(state["metrics"])
        self.history, self.stop_reason = list(state["history"]), state["stop_reason"]
        if not state["epoch_is_complete"]:
            self.batch_idx, self.samples = state["batch_idx"], state["samples"]
            self.results.load_state_dict(state["results"])
            self._resuming = True
