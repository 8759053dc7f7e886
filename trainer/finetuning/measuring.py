"""A few steps of each phase of a strategy on copies, timed, with the peak of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flashtask.core.memory import MemoryWatch, give_back_memory
from flashtask.trainer.callbacks.base import Callback
from flashtask.trainer.finetuning.phases import Finetuning
from flashtask.trainer.run import Run, RunExtension
from flashtask.trainer.tuning.trials import Trial

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Measured", "measure_phases"]

#: The first one makes what the others use again: gradients, the optimizer's averages, the loader's processes.
_STEPS = 4
#: Where processes load ahead, more steps are waited for, but no longer than this.
_MOST_SECONDS = 20.0
_VALIDATION_BATCHES = 2
#: Of more phases than these, some are measured and the others take what the next wider one needs.
_MOST_MEASURED = 6


class Measured(NamedTuple):
    """What a phase needs.

    Args:
        seconds_per_batch: of training, loading included.
        seconds_per_validation_batch: 0 if there is no validation.
        memory: the peak in bytes; None where the system does not tell.
        how: how this was measured, in a sentence.
    """

    seconds_per_batch: float
    seconds_per_validation_batch: float
    memory: int | None
    how: str


class _Clock(Callback, RunExtension):
    """Keeps the weights where they are, and notes when batches end."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.validation_seconds: list[float] = []
        self._validation_began = 0.0
        #: batches that processes load ahead; these are there at once, and the others may not be
        self.ahead = 0

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Nothing is learned, so that no step can diverge."""
        run = trainer.current_fit
        run.schedulers.clear()
        for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0
        self.ahead = getattr(run.loader, "num_workers", 0) * (getattr(run.loader, "prefetch_factor", None) or 0)
        if run.solving is None:
            run.limit_steps(_STEPS + self.ahead // run.accumulation(0))
        self._began = time.perf_counter()

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Of a pass for a head that is solved a part is looked at, and on a part no head is solved."""
        return (lambda: None) if name == "finish_pass" else call

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        run = trainer.current_fit
        _wait_for(run.device)
        self.ends.append(time.perf_counter())
        is_enough = run.global_step >= _STEPS or not run.automatic
        is_whole = run.solving is not None and len(self.ends) >= _STEPS + self.ahead
        if is_whole or (is_enough and self.ends[-1] - self._began > _MOST_SECONDS):
            run.leave()

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Note the time."""
        self._validation_began = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the time since the batch before."""
        now = time.perf_counter()
        self.validation_seconds.append(now - self._validation_began)
        self._validation_began = now

    @property
    def seconds_per_batch(self) -> float:
        """Between two batches, loading included."""
        gaps = [later - earlier for earlier, later in pairwise(self.ends)]
        if not self.ahead:
            return median(gaps) if gaps else 0.0
        # What is loaded ahead comes in bursts, so the mean counts.
        gaps = gaps[self.ahead :] or gaps
        return mean(gaps) if gaps else 0.0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_phases(trial: Trial, strategy: Finetuning, batches_a_step: int) -> list[Measured]:
    """What each phase of a strategy needs, from a few steps at a learning rate of zero.

    Args:
        trial: copies that may be trained in any way.
        strategy: for the layers of this module.
        batches_a_step: `accumulate_grad_batches`.
    """
    count = len(strategy.phases)
    apart = max(1, -(-(count - 1) // (_MOST_MEASURED - 1)))
    chosen = sorted({*range(0, count, apart), count - 1})
    found = {number: _measure(trial, strategy.only(number), batches_a_step) for number in chosen}
    return [found[next(number for number in chosen if number >= phase)] for phase in range(count)]


def _measure(trial: Trial, phase: Finetuning, batches_a_step: int) -> Measured:
    clock = _Clock()
    is_cuda = trial.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(trial.device)
    watch = _memory_watch()
    changes = {"limit_val_batches": _VALIDATION_BATCHES, "check_val_every_n_epoch": 1}
    try:
        trial.fit(clock, steps=_STEPS, batches_a_step=batches_a_step, finetuning=phase, **changes)
    finally:
        if watch is not None:
            watch.__exit__(None, None, None)
        trial.module.merge_lora()  # another phase may have none
        for parameter in trial.module.parameters():
            parameter.grad = None
        give_back_memory()
    memory = torch.cuda.max_memory_allocated(trial.device) if is_cuda else watch.peak if watch is not None else None
    where = "memory of the device" if is_cuda else "resident memory of the process"
    how = f"measured on {_STEPS} optimizer steps or more of each phase, with real batches; peak of the {where}"
    validation = min(clock.validation_seconds, default=0.0)
    return Measured(clock.seconds_per_batch, validation, memory, how)


def _memory_watch() -> MemoryWatch | None:
    try:
        return MemoryWatch().__enter__()
    except OSError:
        return None
