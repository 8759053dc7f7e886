"""What a run would do, without doing it: phases, parameters, rates, steps, and estimates of memory and time.

The estimates are measured in a few steps of each phase on copies of module and data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from flashtask.core.library_internals import mark_as_stepped
from flashtask.core.memory import MemoryWatch, give_back_memory
from flashtask.trainer.callbacks.accumulation import accumulation_by_epoch
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.feature_cache import plan_of_features, seconds_of_features
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.phase_ends import set_base_rates
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.module import Module
from flashtask.trainer.run import Run
from flashtask.trainer.run_extension import RunExtension
from flashtask.trainer.run_lifecycle import execute
from flashtask.trainer.tuning.trials import Trial, batches_a_step, learn_nothing, trial

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["GroupPlan", "PhasePlan", "Plan", "plan"]

#: The first one makes what the others use again: gradients, the optimizer's averages, the loader's processes.
_STEPS = 4
#: Where processes load ahead, more steps are waited for, but no longer than this.
_MOST_SECONDS = 20.0
_VALIDATION_BATCHES = 2
#: Of more phases than these, some are measured and the others take what the next wider one needs.
_MOST_MEASURED = 6


@dataclass(frozen=True)
class GroupPlan:
    """A parameter group in a phase in which it trains.

    Args:
        name: of the group.
        parameters: how many numbers it has.
        base_rate: its learning rate before any schedule.
        rate: what the schedule makes of it at the first step of the phase; None if that is not known beforehand.
    """

    name: str
    parameters: int
    base_rate: float
    rate: float | None


@dataclass(frozen=True)
class PhasePlan:
    """A phase of a run.

    Args:
        number: counted from 0.
        trains: what trains, in words.
        until: when it ends, in words.
        start: its first epoch; None if that depends on the run.
        epochs: how many it has in this run, 0 if the run ends before; None if that depends on the run.
        steps: of the optimizer; None if not known beforehand.
        batches: that are trained on; None if not known beforehand.
        trainable: numbers that train.
        frozen: numbers that do not.
        groups: of the optimizer, as far as they train.
        memory: the peak in bytes, an estimate; None if it was not measured.
        seconds_per_batch: of training, an estimate; None if it was not measured.
        seconds: of the phase, an estimate with validation; None if it is not known.
        features_once: whether each sample goes through the backbone once, and not in every epoch.
    """

    number: int
    trains: str
    until: str
    start: int | None
    epochs: int | None
    steps: int | None
    batches: int | None
    trainable: int
    frozen: int
    groups: tuple[GroupPlan, ...]
    memory: int | None = None
    seconds_per_batch: float | None = None
    seconds: float | None = None
    features_once: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Args:
        strategy: its name.
        phases: in their order.
        epochs: of the run; None if it has no known end.
        steps: of the optimizer; None if not known beforehand.
        batches: to train on in an epoch, None if the loader does not know.
        validation_batches: in an epoch, None if a loader does not know.
        batch_size: samples in a batch; None if the loader has none.
        parameters: numbers in the whole model.
        device: where it would run.
        precision: in which number format.
        seconds: of the run, an estimate; None if it is not known.
        how: how memory and time were estimated; empty if they were not.
        features: whether the features of a frozen backbone are computed once, and if not, why: in a sentence.
        remark: a sentence about a last batch that is larger than the others; empty if it is not.
    """

    strategy: str
    phases: tuple[PhasePlan, ...]
    epochs: int | None
    steps: int | None
    batches: int | None
    validation_batches: int | None
    batch_size: int | None
    parameters: int
    device: str
    precision: str
    seconds: float | None = None
    how: str = ""
    features: str = ""
    remark: str = ""

    def _repr_html_(self) -> str:
        """A row a phase, for notebooks."""
        from flashtask.core.html_table import table_html

        columns = ("phase", "trains", "epochs", "steps", "trainable", "frozen", "memory (MiB)", "seconds")
        rows = [
            (
                *(
                    one.number,
                    one.trains,
                    _known(one.epochs),
                    _known(one.steps),
                    f"{one.trainable:,}",
                    f"{one.frozen:,}",
                ),
                *("" if one.memory is None else round(one.memory / 2**20), _known(one.seconds)),
            )
            for one in self.phases
        ]
        return table_html(columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers."""
        return asdict(self)


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def plan(trainer: Trainer, module: Module, data: DataModule, finetuning: Finetuning, *, measure: bool = True) -> Plan:
    """Look at a run that was made ready on copies, and if wanted take a few steps of each phase on them.

    Args:
        trainer: whose run it would be.
        module: to train; it stays as it is.
        data: to train it on.
        finetuning: the strategy.
        measure: estimate memory and time, from a few steps in each phase; with False, nothing is computed.
    """
    looks: list[tuple[Plan, Finetuning, float]] = []
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    quiet = trainer.with_changes(**silent, enable_model_summary=False, callbacks=[], ema_decay=None)

    def look(run: FitRun) -> Iterator[Any]:
        found = _look_at(run, trainer.callbacks_of("fit", copies.module))
        once = measure and any(phase.features_once for phase in found.phases)
        looks.append((found, _strategy_of(run), seconds_of_features(run) if once else 0.0))
        yield from ()

    with trial(quiet, module, data) as copies:
        run = FitRun(quiet, copies.module, copies.data, finetuning)
        run.accumulate(accumulation_by_epoch(batches_a_step(trainer)))
        execute(run, look)  # type: ignore[arg-type]
    ((planned, strategy, of_features),) = looks
    if not measure:
        return planned
    with trial(quiet, module, data) as copies:
        measured = measure_phases(copies, strategy, batches_a_step(trainer)[0])
    return _with_estimates(planned, measured, of_features, trainer.check_val_every_n_epoch or 1)


def _strategy_of(run: FitRun) -> Finetuning:
    assert run.freezing is not None
    return run.freezing.finetuning


def _look_at(run: FitRun, callbacks: list[Any]) -> Plan:
    epochs, validation = run.total_epochs, run.validation
    once, features = plan_of_features(run, callbacks)
    per_loader = [validation.batches_in(n) for n in range(len(validation.loaders))] if validation is not None else []
    sizes = [getattr(source, "batch_size", None) for source in (run.ordered, run.loader) if source is not None]
    return Plan(
        strategy=_strategy_of(run).name,
        phases=tuple(_phases_of(run, epochs, once)),
        epochs=epochs,
        steps=0 if run.solving is not None else run.total_steps if epochs is not None else None,
        batches=run.batches_in_epoch,
        validation_batches=None if None in per_loader else sum(one or 0 for one in per_loader),
        batch_size=next((size for size in sizes if size is not None), None),
        parameters=sum(p.numel() for p in run.module.parameters()),
        device=run.device.type,
        precision=run.precision.name,
        features=features,
        remark=run.remark_on_batches,
    )


def _phases_of(run: FitRun, epochs: int | None, once: bool) -> Iterator[PhasePlan]:
    assert run.freezing is not None
    total = sum(p.numel() for p in run.module.parameters())
    strategy, starts = run.freezing.finetuning, run.freezing.finetuning.starts
    rates, is_solved = list(_rates_at_starts(run, epochs)), run.solving is not None
    for number, phase in enumerate(strategy.phases):
        length = _length(number, starts, epochs)
        steps, batches = _amount(run, starts[number], length)
        trainable = run.freezing.count(number)
        yield PhasePlan(
            number=number,
            trains="head, solved in one pass" if is_solved else str(phase.train),
            until=phase.end,
            start=starts[number],
            epochs=length,
            steps=0 if is_solved else steps,
            batches=batches,
            trainable=trainable,
            frozen=total - trainable,
            groups=tuple(_groups_of(run.freezing, number, rates[number])),
            features_once=once and run.freezing.is_frozen(number),
        )


def _groups_of(freezing: Freezing, number: int, rates: dict[str, float]) -> Iterator[GroupPlan]:
    """The groups that train in a phase; none where a module makes its optimizer without them."""
    for group in freezing.parameter_groups():
        if group.trains[number] and group.name in freezing.rates:
            size = sum(p.numel() for p in group.parameters)
            yield GroupPlan(group.name, size, freezing.rates[group.name][number], rates.get(group.name))


def _length(number: int, starts: list[int | None], epochs: int | None) -> int | None:
    """How many epochs a phase has in the run; 0 if the run ends before it begins."""
    start = starts[number]
    if start is not None and epochs is not None and start >= epochs:
        return 0
    end = starts[number + 1] if number + 1 < len(starts) else epochs
    if start is None or end is None:
        return None
    return min(end, epochs if epochs is not None else end) - start


def _amount(run: FitRun, start: int | None, length: int | None) -> tuple[int | None, int | None]:
    """Optimizer steps and batches of a phase, None where that is not known."""
    if start is None or length is None:
        return None, None
    first, last = run.steps_before(start), run.steps_before(start + length)
    if first is None or last is None or run.batches_in_epoch is None:
        return None, None
    steps, batches = last - first, run.batches_in_epoch * length
    if run.max_steps < 0 or last <= run.max_steps:
        return steps, batches
    taken = max(0, run.max_steps - first)
    return taken, math.ceil(batches * taken / steps) if steps else 0


def _rates_at_starts(run: FitRun, epochs: int | None) -> Iterator[dict[str, float]]:
    """The rates of all groups at the first step of each phase; empty where that is not known."""
    assert run.freezing is not None
    assert run.phases is not None
    for optimizer in run.optimizers:
        mark_as_stepped(optimizer)  # schedules are stepped, and nothing is trained
    schedulers, epoch = [rate.scheduler for rate in run.schedulers], 0
    for number, start in enumerate(run.freezing.finetuning.starts):
        is_known = start is not None and run.steps_before(start) is not None
        if not is_known or start is None or (epochs is not None and start >= epochs):
            yield {}
            continue
        while epoch < start:
            _step_schedules(run, epoch)
            epoch += 1
        rates = {name: by_phase[number] for name, by_phase in run.freezing.rates.items()}
        set_base_rates(run.optimizers, schedulers, rates)
        yield {str(g.get("name")): float(g["lr"]) for o in run.optimizers for g in o.param_groups}


def _step_schedules(run: FitRun, epoch: int) -> None:
    """What an epoch does to the rates, as far as that does not depend on metrics."""
    first, last = run.steps_before(epoch) or 0, run.steps_before(epoch + 1) or 0
    for rate in run.schedulers:
        if rate.reduce_on_plateau:
            continue
        times = sum(step % rate.frequency == 0 for step in range(first + 1, last + 1))
        if rate.interval == "epoch":
            times = int((epoch + 1) % rate.frequency == 0)
        if isinstance(rate.scheduler, LambdaLR) and times:
            rate.scheduler.last_epoch += times - 1  # a pure function of the step: there is no need to go through all
            times = 1
        for _ in range(times):
            rate.scheduler.step()


# ---- estimates


class Measured(NamedTuple):
    """What a phase needs.

    Args:
        seconds_per_batch: of training, loading included.
        seconds_per_validation_batch: 0 if there is no validation.
        memory: the peak in bytes; None where the system does not report it.
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
        learn_nothing(run)
        self.ahead = getattr(run.loader, "num_workers", 0) * (getattr(run.loader, "prefetch_factor", None) or 0)
        if run.solving is None:
            run.limit_steps(_STEPS + self.ahead // run.accumulation(0))
        self._began = time.perf_counter()

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Do not solve a head: only a part of the pass is measured."""
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
        """Seconds from the end of one batch to that of the next, loading included."""
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
    try:
        trial.fit(
            clock,
            steps=_STEPS,
            batches_a_step=batches_a_step,
            finetuning=phase,
            limit_val_batches=_VALIDATION_BATCHES,
        )
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


def _with_estimates(planned: Plan, measured: list[Measured], of_features: float, every: int) -> Plan:
    phases = []
    for phase, found in zip(planned.phases, measured, strict=True):
        seconds = None
        if phase.epochs is not None and phase.batches is not None and planned.validation_batches is not None:
            validation = phase.epochs * planned.validation_batches * found.seconds_per_validation_batch / every
            seconds = phase.batches * found.seconds_per_batch + validation
            if phase.features_once and phase.epochs:
                seconds = of_features  # what is left of an epoch when they are there is little
        phases.append(replace(phase, memory=found.memory, seconds_per_batch=found.seconds_per_batch, seconds=seconds))
    known = [phase.seconds for phase in phases]
    total = None if None in known else sum(one or 0.0 for one in known)
    return replace(planned, phases=tuple(phases), seconds=total, how=measured[0].how)
