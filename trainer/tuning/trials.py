"""Trials: runs on copies of a module and its data, which leave no trace in either, in the trainer or on the disk."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.callbacks.accumulation import GradientAccumulationScheduler
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.distribution.process_strategies import automatic_strategy
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.module import Module
from flashtask.trainer.run_lifecycle import execute

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["Trial", "batches_a_step", "learn_nothing", "require_one_process", "trial"]

#: A trial shows, writes and validates nothing, and ends after the steps that it is for.
_SILENT: dict[str, Any] = {
    "ema_decay": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
    "reload_dataloaders_every_n_epochs": 0,
    "max_epochs": None,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "fast_dev_run": False,
    "track_grad_norm": -1,
    "profiler": None,
}


class Trial:
    """Copies of a module and its data that may be trained in any way, because they are thrown away.

    Args:
        trainer: whose settings the runs have.
        module: a copy.
        data: a copy, which knows the copy of the module.
    """

    def __init__(self, trainer: Trainer, module: Module, data: DataModule) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        #: where the copies will be trained
        self.device: torch.device = FitRun(trainer, module, data).device

    def fit(
        self,
        callback: Callback,
        *,
        steps: int,
        batches_a_step: int,
        finetuning: Finetuning | None = None,
        **settings: Any,
    ) -> FitRun:
        """Train the copy for a number of optimizer steps, through as many epochs as that takes.

        Args:
            callback: the only one; the user's own are not called in a trial.
            steps: of the optimizer.
            batches_a_step: `accumulate_grad_batches`.
            finetuning: what is frozen.
            settings: other arguments of the trainer.
        """
        changes = {**_SILENT, "max_steps": steps, "accumulate_grad_batches": batches_a_step, "callbacks": [callback]}
        search = self.trainer.with_changes(**{**changes, **settings})
        search.loops = self.trainer.loops
        run = FitRun(search, self.module, self.data, finetuning)
        execute(run, search.loops.fit)
        return run


def batches_a_step(trainer: Trainer) -> dict[int, int]:
    """How many batches make one optimizer step, by the epoch from which on they do."""
    plans = [c.scheduling for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    given = plans[0] if plans else trainer.accumulate_grad_batches
    return {0: 1, **given} if isinstance(given, Mapping) else {0: given}


def require_one_process(trainer: Trainer, what: str) -> None:
    """Refuse a trainer of several processes.

    Args:
        trainer: that steps are tried for.
        what: is done in one process: `tune looks for numbers`.

    Raises:
        UsageError: it has several.
    """
    if trainer.strategy.world_size > 1 or automatic_strategy(trainer.devices, trainer.num_nodes) != "single":
        raise UsageError(
            f"{what} in one process, and this trainer has several",
            why="each of them would find others",
            fix="the same with Trainer(devices=1) first; then give what it found to this trainer",
        )


def learn_nothing(run: FitRun) -> None:
    """Let the steps of a run leave the weights where they are, so that none can diverge."""
    run.schedulers.clear()
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = 0.0


@contextmanager
def trial(trainer: Trainer, module: Module, data: DataModule) -> Iterator[Trial]:
    """Copies to try something on; random generators are put back when the block ends, however it ends.

    Raises:
        UsageError: something in the module or the data cannot be copied.
    """
    states = generator_states()
    try:
        yield Trial(trainer, *_copies(module, data))
    finally:
        set_generator_states(states)


def _copies(module: Module, data: DataModule) -> tuple[Module, DataModule]:
    memo: dict[int, Any] = {id(held): held for held in _shared(module, data)}
    memo |= {id(value): value.detach().clone() for value in _computed(module)}
    try:
        copies = copy.deepcopy((module, data), memo)
    except (FlashtaskError, MemoryError):
        raise
    except Exception as error:  # whatever an object of the user's raises when it is copied
        raise UsageError(
            f"{type(module).__name__} or its data cannot be copied, and tuning leaves yours as they are",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="make what cannot be copied in setup(self, stage), or give it a __deepcopy__",
        ) from error
    for made in copies:
        made.trainer = None
    for part in copies[0].modules():
        _bind_again(part, memo)
    return copies


def _shared(module: Module, data: DataModule) -> Iterator[Any]:
    """What is not copied: a trainer that works on them now, and the arrays and tensors that are data."""
    yield from (owner.trainer for owner in (module, data) if owner.trainer is not None)
    seen: set[int] = set()
    yield from _arrays_in(vars(data), seen)
    for part in module.modules():
        sources = [value for value in vars(part).values() if isinstance(value, (Dataset, DataLoader, DataModule))]
        yield from _arrays_in(sources, seen)


def _arrays_in(held: Any, seen: set[int]) -> Iterator[Any]:
    """Arrays and tensors in containers, data sets and loaders of any depth: they may be large, and are only read."""
    if isinstance(held, (torch.Tensor, np.ndarray)):
        yield held
    elif isinstance(held, (dict, list, tuple, Dataset, DataLoader, DataModule)) and id(held) not in seen:
        seen.add(id(held))
        inside = held if isinstance(held, (list, tuple)) else (held if isinstance(held, dict) else vars(held)).values()
        for value in inside:
            yield from _arrays_in(value, seen)


def _bind_again(part: nn.Module, copied: Mapping[int, Any]) -> None:
    """Let functions that closed over something of the original, as hooks often do, see its copy."""
    for held in (vars(part), *(value for value in vars(part).values() if isinstance(value, dict))):
        for key, value in held.items():
            if isinstance(value, types.FunctionType):
                held[key] = _bound_again(value, copied)


def _bound_again(function: types.FunctionType, copied: Mapping[int, Any]) -> types.FunctionType:
    cells = [(cell, copied.get(id(_content(cell)))) for cell in function.__closure__ or ()]
    if all(copy_of is None for _, copy_of in cells):
        return function
    closure = tuple(cell if copy_of is None else types.CellType(copy_of) for cell, copy_of in cells)
    arguments = (function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made = types.FunctionType(*arguments, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing in it yet
        return None


def _computed(module: nn.Module) -> Iterator[torch.Tensor]:
    """Attributes that are results of a computation, which torch does not copy: a weight under weight_norm, a loss."""
    for part in module.modules():
        yield from (v for v in vars(part).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
