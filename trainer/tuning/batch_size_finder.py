"""The largest batch size that trains in the memory there is.

On an accelerator sizes are tried until one does not fit. A CPU has no such moment: the system would kill the process.
So there a few small sizes are trained on, and the line through their peaks of memory shows how far the rest reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from flashtask.core.errors import OutOfMemoryError, UsageError
from flashtask.core.memory import MemoryLimit, MemoryWatch, give_back_memory, memory_in_use, memory_limits
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.data_loaders import batch_size_of
from flashtask.trainer.datamodule import DataModule, GivenLoaders
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.tuning.batch_size_search import (
    BatchSizeOptions,
    BatchSizeSearch,
    MemoryPoint,
    expected_memory,
    largest_fitting,
    largest_within,
)
from flashtask.trainer.tuning.named_values import NamedValue
from flashtask.trainer.tuning.trials import Trial, batches_a_step, learn_nothing

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["batch_size_in", "find_batch_size"]

#: What is measured on a CPU: enough for a line, small enough for any machine.
_SIZES = (2, 4, 8, 16, 32)

#: The second step holds what the first has made: gradients, and the optimizer's averages.
_STEPS = 2

#: The share of the free memory that training may take. The rest is also for a heap that earlier work left in pieces:
#: for two layers with few, large blocks it took a fifth more than in a new process, and was promised 12 % too little.
_SHARE = 0.8


def batch_size_in(module: Module, data: DataModule, name: str) -> NamedValue:
    """The batch size of a module or its data module, in every place that has it.

    Raises:
        UsageError: there is none, it is not a whole number, or the loader that it would be for was given as it is.
    """
    if isinstance(data, GivenLoaders) and data.has("train"):
        raise UsageError(
            "the batch size of a loader that is passed to the trainer cannot be changed",
            fix="give the module a method train_dataloader(), or pass datamodule=...",
        )

    def missing() -> UsageError:
        return UsageError(
            "there is no batch size that could be changed",
            why=f"nothing in {type(module).__name__}, its hyper-parameters or the data module is named {name}",
            fix=f"self.{name} = 32 in __init__, and DataLoader(..., batch_size=self.{name}) in train_dataloader",
        )

    owners = (module,) if isinstance(data, GivenLoaders) else (module, data)
    found = NamedValue.find((name,), owners, missing)
    if not isinstance(found.value, int) or isinstance(found.value, bool):
        raise UsageError(f"{name} is {found.value!r}: a whole number is needed", fix=f"{name}=32")
    return found


def find_batch_size(trial: Trial, options: BatchSizeOptions, finetuning: Finetuning | None) -> BatchSizeSearch:
    """Search on the copies of a trial, while as much of the backbone trains as ever will.

    Raises:
        UsageError: the loader does not use the batch size, or this system does not report how much memory is in use.
        OutOfMemoryError: not even the smallest batches fit.
    """
    attempts = _Attempts(trial, batch_size_in(trial.module, trial.data, options.attribute), finetuning)
    return _by_measuring(attempts, options) if trial.device.type == "cpu" else _by_trying(attempts, options)


class _Attempts:
    """Short trainings of one trial at different batch sizes."""

    def __init__(self, trial: Trial, value: NamedValue, finetuning: Finetuning | None) -> None:
        self.trial, self.value = trial, value
        self._finetuning = None
        if finetuning is not None:
            self._finetuning = finetuning.only(finetuning.widest)
        # A group of batches is in memory as a whole.
        self._batches_a_step = max(batches_a_step(trial.trainer).values())
        #: what the last one saw
        self.seen = _Watcher(value.name, 0)

    def run(self, batch_size: int) -> None:
        """Take a few steps; nothing of them stays in memory.

        Raises:
            OutOfMemoryError: they did not fit.
        """
        self.value.give(batch_size)
        self.seen = _Watcher(self.value.name, batch_size)
        try:
            self.trial.fit(self.seen, steps=_STEPS, batches_a_step=self._batches_a_step, finetuning=self._finetuning)
        finally:
            for parameter in self.trial.module.parameters():
                parameter.grad = None
            give_back_memory()
            if self.trial.device.type == "cuda":
                torch.cuda.empty_cache()

    def limit(self, options: BatchSizeOptions) -> tuple[int, str]:
        """The largest batch size that makes sense, and what bounds it, once one attempt has seen the data."""
        samples = self.seen.samples
        if samples is not None and samples < options.max_batch_size:
            return max(1, samples), "data"
        return options.max_batch_size, "max_batch_size"


class _Watcher(Callback):
    """Keeps the weights of a short training where they are, and looks at its loader and batches."""

    #: Of a module that steps its optimizers itself and does so less often than this, the rest is not waited for.
    _most_batches = 16

    def __init__(self, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        #: in the training data, None if it does not know
        self.samples: int | None = None
        #: that processes of the loader hold for each sample of a batch
        self.bytes_in_workers = 0.0
        self._batches, self._is_checked = 0, False

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Look at the loader; nothing is learned, so that no step can diverge."""
        run = trainer.current_fit
        learn_nothing(run)
        self.samples = _samples_of(run)
        size = run.ordered.batch_size if run.ordered is not None else getattr(run.loader, "batch_size", None)
        self._is_checked = size is not None
        if size is not None:
            self._check(size)

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """Look at the first batch."""
        self._batches += 1
        loader = trainer.current_fit.loader
        if self._batches > 1:
            return
        if not self._is_checked:  # a loader or batch sampler of the user's own
            self._check(batch_size_of(batch))
        workers = getattr(loader, "num_workers", 0)
        if workers:
            # Each prepares some batches ahead, and puts together one more.
            ahead = workers * ((loader.prefetch_factor or 0) + 1)
            self.bytes_in_workers = ahead * _bytes_of(batch) / max(1, batch_size_of(batch))

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Wait no longer for a step."""
        run = trainer.current_fit
        if not run.automatic and self._batches >= self._most_batches:
            run.leave()

    def _check(self, size: int) -> None:
        if size != self.batch_size and size != self.samples:
            raise UsageError(
                f"the training loader does not use {self.name}",
                why=f"its batches have {size} samples where {self.name} is {self.batch_size}",
                fix=f"DataLoader(..., batch_size=self.{self.name}) in train_dataloader",
            )


def _by_measuring(attempts: _Attempts, options: BatchSizeOptions) -> BatchSizeSearch:
    """For a CPU: no size is trained on that the smaller ones do not promise to fit."""
    give_back_memory()  # what an earlier run has freed, else the first sizes would seem to need none
    tightest, points = _tightest_limit(), list[MemoryPoint]()
    budget, fitting = _SHARE * tightest.free, options.max_batch_size
    before = memory_in_use()
    for size in (min(size, options.max_batch_size) for size in _SIZES):
        is_possible = not points or (size <= attempts.limit(options)[0] and expected_memory(points, size) <= budget)
        if not is_possible or (points and size == points[-1].batch_size):
            break
        try:
            with MemoryWatch() as watch:
                attempts.run(size)
        except OutOfMemoryError:
            if not points:
                raise
            fitting = size - 1
            break
        in_workers = round(size * attempts.seen.bytes_in_workers)
        points.append(MemoryPoint(size, max(0, watch.peak - before) + in_workers))
    limit, bound = attempts.limit(options)
    found = min(fitting, largest_within(budget, points, limit))
    if not found:
        raise _too_little(points[0], tightest)
    bound = bound if found == limit else "memory"
    found = found if options.mode == "binsearch" else 2 ** (found.bit_length() - 1)
    return BatchSizeSearch(found, bound, tuple(points), tightest, attempts.seen.samples)


def _tightest_limit() -> MemoryLimit:
    try:
        return min(memory_limits(), key=lambda limit: limit.free)
    except OSError as error:
        raise UsageError(
            "the batch size cannot be searched for on this system's CPU",
            why=f"it does not report how much memory a process uses ({error})",
            fix="batch_size=32, or a device with memory of its own",
        ) from error


def _too_little(point: MemoryPoint, tightest: MemoryLimit) -> OutOfMemoryError:
    return OutOfMemoryError(
        "there is too little memory for any batch size",
        why=f"batches of {point.batch_size} need {_mib(point.memory)}, and {_SHARE:.0%} of the {_mib(tightest.free)} "
        f"that are left of {tightest.name} may be used",
        fix="smaller images, or a smaller backbone",
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _by_trying(attempts: _Attempts, options: BatchSizeOptions) -> BatchSizeSearch:
    """For an accelerator, whose lack of memory is an error that can be caught."""
    device, points = attempts.trial.device, dict[int, MemoryPoint | None]()

    def fits(size: int) -> bool:
        if size not in points:
            points[size] = _tried(attempts, size)
        return points[size] is not None

    fits(min(2, options.max_batch_size))  # from here on the data is known
    limit, bound = attempts.limit(options)
    found = largest_fitting(fits, limit, options.mode)
    if not found:
        raise OutOfMemoryError(f"not even batches of 1 fit into the memory of {device}", fix="a smaller backbone")
    at_limit = found == limit or (options.mode == "power" and 2 * found > limit)
    memory = MemoryLimit(f"the memory of {device}", torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0)
    measured = tuple(point for _, point in sorted(points.items()) if point is not None)
    bound = bound if at_limit else "memory"
    return BatchSizeSearch(found, bound, measured, memory, attempts.seen.samples)


def _tried(attempts: _Attempts, size: int) -> MemoryPoint | None:
    """What a size needed, None if it did not fit."""
    is_cuda = attempts.trial.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(attempts.trial.device)
    try:
        attempts.run(size)
    except OutOfMemoryError:
        return None
    return MemoryPoint(size, torch.cuda.max_memory_allocated(attempts.trial.device) if is_cuda else 0)


def _samples_of(run: FitRun) -> int | None:
    if run.ordered is not None:
        return int(run.ordered.length)
    try:
        return len(run.loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _bytes_of(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return sum(_bytes_of(part) for part in parts)
