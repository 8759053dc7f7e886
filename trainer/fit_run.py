"""The run of training: what a step needs, and what must survive a kill (`FitRun.state_dict()`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from flashtask.core.errors import DivergedError, UsageError
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.accumulation import accumulation_by_epoch
from flashtask.trainer.finetuning import Freezing
from flashtask.trainer.loading import OrderedBatches, batch_size_of, length_of
from flashtask.trainer.optimizers import ScheduledRate
from flashtask.trainer.precision import Precision
from flashtask.trainer.run import EvaluationRun, Run, RunInterruptedError, at_most
from flashtask.trainer.stages import Finetuning

__all__ = ["FitRun"]


class FitRun(Run):
    """Training: optimizers, progress, and the runs of validation that nest in it."""

    stage = "fit"

    def __init__(
        self,
        trainer: Any,
        module: Any,
        data: Any,
        device: torch.device,
        precision: Precision,
        finetuning: Finetuning | None = None,
        resume_from: Path | None = None,
    ) -> None:
        super().__init__(trainer, module, data, device, precision)
        self.finetuning, self.resume_from = finetuning, resume_from
        self.seed: int = trainer.seed
        self.max_epochs: int | None = trainer.max_epochs
        self.max_steps: int = trainer.max_steps
        #: how many batches make one optimizer step, by epoch; known for the whole run before it starts
        self.accumulation: Callable[[int], int] = accumulation_by_epoch(trainer.accumulate_grad_batches)
        # made by the preparation
        self.loader: Any = None
        self.limit: int | None = None
        self.optimizers: list[Optimizer] = []
        self.schedulers: list[ScheduledRate] = []
        self.freezing: Freezing | None = None
        self.validation: EvaluationRun | None = None
        self.sanity: EvaluationRun | None = None
        self.training_step: Callable[..., Any] = module.training_step
        self.automatic: bool = getattr(module, "automatic_optimization", True)
        self.keeps_outputs = False
        #: put the best epoch's weights back at the end
        self.restores_best = False
        # progress: this is what a checkpoint holds
        self.epoch = 0
        self.epoch_is_complete = False
        self.global_step = 0
        self.batch_idx = 0
        self.samples = 0
        self.samples_seen = 0
        self.seconds = 0.0
        self.training_seconds = 0.0
        self.epoch_seconds = 0.0
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.stop_reason = ""
        # of the moment
        self.outputs: list[Any] = []
        self.skip_epoch = False
        self.has_gradients = False
        self.group_is_open = False
        self.interrupted_by: int | None = None
        self._epoch_started_at = 0.0
        self._trained_for = 0.0
        self._samples_before = 0
        self._exhausted = False
        self._group_end = 0
        #: names that were measured in this epoch
        self.fresh_metrics: set[str] = set()

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
    def accumulate(self) -> int:
        """How many batches make one optimizer step in this epoch."""
        return self.accumulation(self.epoch)

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

    # ---- what the loop asks for

    def start_epoch(self) -> None:
        """Settle what is frozen, set modes, and begin at the place in the epoch where the run stands."""
        self.outputs.clear()
        self.fresh_metrics.clear()
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
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # of a batch that was skipped, or of what happened before the run
        if self.ordered is not None:
            self.ordered.set_place(self.epoch, start=self.samples, frozen=frozen)
        elif hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)

    @property
    def ordered(self) -> OrderedBatches | None:
        """The engine's own order of samples, None for a loader of the user's that was left alone."""
        sampler = getattr(self.loader, "batch_sampler", None)
        return sampler if isinstance(sampler, OrderedBatches) else None

    def groups(self) -> Iterator[list[Any]]:
        """The epoch's remaining batches in accumulation groups, until the epoch is cut short."""
        batches = iter(self.loader) if self.ordered is not None or not self.batch_idx else self._read_again()
        batches = islice(batches, None if self.limit is None else max(0, self.limit - self.batch_idx))
        group: list[Any] = []
        while not (self.skip_epoch or self.out_of_steps or self.interrupted_by is not None):
            group = list(islice(batches, self.accumulate))
            if not group:
                break
            yield group
        self.group_is_open = False
        self._trained_for = time.monotonic() - self._epoch_started_at
        if self.interrupted_by is not None:
            raise RunInterruptedError(self.interrupted_by)
        if not self.batch_idx:
            raise UsageError(
                "the training loader gave no batch",
                why="it is empty, or has fewer samples than a batch and drops the last one",
                fix="a smaller batch_size, drop_last=False, or limit_train_batches above 0",
            )
        self._exhausted = self.skip_epoch or not group or self.batch_idx == self.batches_in_epoch

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

    def receive(self, group: list[Any]) -> Iterator[tuple[float, Any, int]]:
        """Each batch of a group on the device: (its share of the group's samples, batch, its number in the epoch)."""
        sizes = [batch_size_of(batch) for batch in group]
        total = sum(sizes)
        self._group_end = self.batch_idx + len(group)
        self.group_is_open, self.has_gradients = True, False
        for batch, size in zip(group, sizes, strict=True):
            self.batch_size = size
            # The sampler knows how many samples it handed out; a batch may not look like its number of samples.
            order = self.ordered
            taken = size if order is None else min(order.batch_size, order.length - self.samples)
            self.batch_idx += 1
            self.samples += taken
            self.samples_seen += taken
            yield (1 if size == total else size / total), self.to_device(batch), self.batch_idx - 1

    def turns(self) -> Iterable[tuple[Optimizer | None, tuple[int, ...]]]:
        """Who is trained by a batch: (optimizer, further arguments of the step), one after the other.

        With several optimizers each has its turn, in which only its own parameters want gradients. With manual
        optimization, or none, there is one turn without an optimizer.
        """
        if not self.automatic or not self.optimizers:
            return ((None, ()),)
        if len(self.optimizers) == 1:
            return ((self.optimizers[0], ()),)
        return self._alternate()

    def _alternate(self) -> Iterator[tuple[Optimizer, tuple[int]]]:
        held = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        wanted = {p: p.requires_grad for parameters in held for p in parameters}
        for index, optimizer in enumerate(self.optimizers):
            own = set(held[index])
            for parameter, before in wanted.items():
                parameter.requires_grad_(before and parameter in own)
            yield optimizer, (index,)
            for parameter, before in wanted.items():
                parameter.requires_grad_(before)

    def loss_of(self, outputs: Any) -> torch.Tensor | None:
        """The loss that a training step returned, checked before it can touch the weights.

        Raises:
            DivergedError: it is NaN or infinite.
            UsageError: there is no loss in what was returned.
        """
        if outputs is None or not self.automatic:
            return None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor):
            raise UsageError(
                f"training_step returned {type(outputs).__name__} without a loss",
                fix='return the loss, or {"loss": loss, ...}',
            )
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self._diverged("the loss", loss.item())
        self.has_gradients = True
        return loss

    def clip_gradients(self, optimizer: Optimizer) -> None:
        """Clip by norm or by value, if the trainer was told to.

        Raises:
            DivergedError: the norm is NaN or infinite.
        """
        limit = self.trainer.gradient_clip_val
        if not limit:
            return
        self.precision.unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.trainer.gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
            return
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        # With a gradient scaler an overflow is no divergence: the scaler skips that step.
        if norm.device.type == "cpu" and not self.precision.skips_overflow and not math.isfinite(norm.item()):
            raise self._diverged("the norm of the gradients", norm.item())

    def _diverged(self, what: str, value: float) -> DivergedError:
        rates = ", ".join(f"{group['lr']:g}" for optimizer in self.optimizers for group in optimizer.param_groups)
        clipped = bool(self.trainer.gradient_clip_val)
        return DivergedError(
            f"{what} became {value} in epoch {self.epoch}, batch {self.batch_idx - 1}, step {self.global_step}",
            why=f"learning rates were {rates}; the step was not taken",
            fix="lower the learning rate" if clipped else "lower the learning rate, or pass gradient_clip_val=1.0",
        )

    def count_step(self) -> None:
        """The optimizers have stepped."""
        if self.has_gradients:
            self.precision.update()
        self.group_is_open = False
        self.global_step += 1
        for rate in self.schedulers:
            if rate.interval == "step" and self.global_step % rate.frequency == 0:
                rate.step(self.metrics)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            values = self.results.step_values()
            for logger in self.trainer.loggers:
                logger.log_step(values, self.global_step, self.epoch)

    def keep(self, outputs: Any) -> None:
        """Collect outputs of steps, if the module wants to see them at the end of the epoch."""
        if self.keeps_outputs:
            self.outputs.append(_detached(outputs))

    def take_metrics(self, values: dict[str, float]) -> None:
        """Values that were measured in this epoch."""
        self.metrics.update(values)
        self.fresh_metrics.update(values)

    def close_epoch(self) -> None:
        """Collect the epoch's values, step the schedulers, and write the epoch's row."""
        rates = self.learning_rates()
        self.take_metrics(self.results.callback_values())
        for rate in self.schedulers:
            due = rate.interval == "epoch" and (self.epoch + 1) % rate.frequency == 0 and self._exhausted
            if due and self._can_step(rate):
                rate.step(self.metrics)
        spent = self.epoch_seconds + time.monotonic() - self._epoch_started_at
        trained = max(self._trained_for, 1e-9)
        self.seconds += spent
        self.training_seconds += trained
        row: dict[str, float] = {"epoch": self.epoch, "step": self.global_step}
        row |= self.results.epoch_values(logger_only=True)
        if self.validation is not None and self.validates:
            row |= self.validation.results_of_pass
        row |= rates
        row["trainable_parameters"] = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        row[f"{self.module.sample_noun}_per_second"] = (self.samples - self._samples_before) / trained
        row["seconds"] = spent
        self.history.append(row)
        self.epoch_is_complete = self._exhausted
        for logger in self.trainer.loggers:
            logger.log_epoch(row)

    def _can_step(self, rate: ScheduledRate) -> bool:
        """A plateau scheduler waits for epochs in which its metric is measured."""
        measured = not rate.reduce_on_plateau or rate.monitor in self.fresh_metrics
        return measured or self.validation is None or self.validates

    def end_epoch(self) -> None:
        """Go on to the next epoch; one that `max_steps` cut short keeps its place."""
        if not self.epoch_is_complete:
            return
        self.epoch += 1
        self.epoch_is_complete = False
        self.batch_idx = self.samples = self._samples_before = 0
        self.epoch_seconds = 0.0
        self.results.reset()

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
        """Progress, in names that a reader of the checkpoint understands.

        Raises:
            UsageError: in the middle of an accumulation group, whose gradients are in no checkpoint.
        """
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
            "samples": 0 if complete else self.samples,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "epoch_seconds": so_far if self.batch_idx and not complete else 0.0,
            "metrics": dict(self.metrics),
            "history": self.history,
            "results": [] if complete else self.results.state_dict(self.module),
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken: at the start of the next epoch, or in the middle of one."""
        self.epoch = state["epoch"] + (1 if state["epoch_is_complete"] else 0)
        self.global_step, self.samples_seen = state["global_step"], state["samples_seen"]
        self.batch_idx, self.samples = state["batch_idx"], state["samples"]
        self._samples_before = self.samples
        self.seconds, self.training_seconds = state["seconds"], state["training_seconds"]
        self.epoch_seconds = state["epoch_seconds"]
        self.metrics, self.stop_reason = dict(state["metrics"]), state["stop_reason"]
        # The row of an epoch that was cut short is written again when it is complete.
        self.history = [row for row in state["history"] if row["epoch"] < self.epoch]
        self.results.load_state_dict(state["results"], self.module)


def _detached(outputs: Any) -> Any:
    """Outputs without their graphs, so that an epoch of them fits into memory."""
    if isinstance(outputs, torch.Tensor):
        return outputs.detach()
    if isinstance(outputs, dict):
        return {key: _detached(value) for key, value in outputs.items()}
    return outputs
