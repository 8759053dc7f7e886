"""The same model in every process, each with its share of a batch: `ddp`, `ddp_spawn`, `ddp_find_unused_parameters`."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.distribution.environment import Place, place_in
from flashtask.trainer.distribution.group import (
    agree_on,
    close_group,
    gathered,
    is_of_the_group,
    is_open,
    open_group,
    reduced,
)
from flashtask.trainer.distribution.launching import Others, ending_here, fork, reporting, start_again
from flashtask.trainer.placement.strategies import REDUCTIONS, Strategy

__all__ = ["DataParallel", "DataParallelWithUnused", "ForkedDataParallel"]

T = TypeVar("T")

#: Seconds that one process waits for another.
TIMEOUT = 1800.0
#: Seconds in which another process may say why it failed.
_GRACE = 5.0


class DataParallel(Strategy):
    """A process for each device, which all have the model and add up their gradients.

    Where torchrun, SLURM or MPI started this process, it joins the others. Else the script is started again, with the
    same arguments, once for each further device; what stands above the verb runs in all of them.

    Args:
        find_unused_parameters: some parameters may have no part in a loss; looking for them costs time.
        timeout: seconds that one process waits for another.
        options: accelerator and precision, as `Strategy` takes them.
    """

    name = "ddp"
    most_devices = None

    def __init__(self, find_unused_parameters: bool = False, timeout: float = TIMEOUT, **options: Any) -> None:
        super().__init__(**options)
        self.find_unused_parameters, self.timeout = find_unused_parameters, timeout
        self.place = place_in()
        self._others: Others | None = None
        self._steps: list[_SharedStep] = []

    def plan(self, device: torch.device, devices: int, num_nodes: int) -> None:
        """Hear how many processes are wanted; those that somebody else has started are as many as they are."""
        self._device, self._devices, self._num_nodes = device, devices, num_nodes
        place = self.place
        if place is None or self._others is not None:
            return
        if place.launcher == "torchrun" and devices != place.local_world_size:
            raise UsageError(
                f"devices={devices}, and torchrun has started {place.local_world_size} processes on this machine",
                fix=f"devices={place.local_world_size}, or leave devices out; or torchrun --nproc-per-node {devices}",
            )
        if num_nodes > 1 and devices * num_nodes != place.world_size:
            raise UsageError(
                f"num_nodes={num_nodes} with devices={devices}, and {place.launcher} has started {place.world_size} "
                "processes",
                fix="leave num_nodes and devices out: whoever starts the processes has said it",
            )

    @property
    def local_world_size(self) -> int | None:  # type: ignore[override]
        """How many processes somebody has started on this machine, None if nobody has."""
        return None if self.place is None else self.place.local_world_size

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """How many processes there are."""
        return 1 if self.place is None else self.place.world_size

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        """Which of all processes this is."""
        return 0 if self.place is None else self.place.rank

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        """Which of the processes on this machine this is."""
        return 0 if self.place is None else self.place.local_rank

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Start the others, unless they are there, and meet them; where one fails, nobody goes on."""
        if self.place is None and self._devices * self._num_nodes > 1:
            self.place, self._others = self._start()
            atexit.register(self._others.end)
        if self.place is None:
            yield
            return
        with reporting(self.place):
            try:
                self._meet()
                yield
            except BaseException as error:
                raise self._seen(error) from error
            finally:
                for step in self._steps:
                    step.close()

    def _start(self) -> tuple[Place, Others]:
        return start_again(self._devices, self._num_nodes)

    def _meet(self) -> None:
        assert self.place is not None
        if "OMP_NUM_THREADS" not in os.environ and not is_open():
            torch.set_num_threads(max(1, torch.get_num_threads() // self.place.local_world_size))
        # Said of channels-last weights and of dimensions of one, where it means nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        open_group(self.place, self._device, self.timeout)

    def _seen(self, error: BaseException) -> BaseException:
        """What another process failed of, where that is why this one did; the others are ended."""
        if self._others is None:
            return error
        told = self._others.failure(_GRACE) if is_of_the_group(error) else None
        self._others.end()
        return told or error

    def setup(self, module: nn.Module) -> None:
        """Weights and buffers are those of rank 0: a model may have been drawn at random, in each process another."""
        if self.world_size > 1:
            agree_on((*module.parameters(), *module.buffers()))

    def begin_evaluation(self, module: nn.Module) -> None:
        """The statistics of BatchNorm are those of the first process; after a step each has its own."""
        if self.world_size > 1:
            agree_on(module.buffers())

    def average_gradients(self, parameters: Iterable[nn.Parameter], samples: int) -> None:
        """The mean over the samples of all processes; a parameter that no process has a gradient of is left alone."""
        if self.world_size == 1:
            return
        known = list(parameters)
        counts = torch.tensor([samples, *(one.grad is not None for one in known)], dtype=torch.int64)
        total, *present = reduced(counts.to(self._device), "sum").tolist()
        for one in (one for one, processes in zip(known, present, strict=True) if processes):
            own = torch.zeros_like(one) if one.grad is None else one.grad
            one.grad = reduced(own * (samples / total), "sum")

    def wrap_step(self, module: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step as torch's DistributedDataParallel calls it."""
        if self.world_size == 1:
            return step
        self._steps.append(_SharedStep(module, step, self.find_unused_parameters))
        return self._steps[-1]

    def reduce(self, value: T, how: str = "mean") -> T:
        """A number or tensor over all processes; a number is exchanged in float64.

        Raises:
            UnknownNameError: another way than `mean`, `sum`, `max` and `min`.
        """
        if how not in REDUCTIONS:
            raise UnknownNameError("way to reduce", how, REDUCTIONS)
        found: T = value if self.world_size == 1 else reduced(value, how)
        return found

    def gather(self, value: T) -> list[T]:
        """What every process has, in the order of their ranks."""
        return [value] if self.world_size == 1 else gathered(value)

    def barrier(self, name: str = "") -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            places = gathered(name)
            assert len(set(places)) == 1, f"processes wait at different places: {places}"


class DataParallelWithUnused(DataParallel):
    """As `ddp`, where not every parameter has a part in every loss."""

    name = "ddp_find_unused_parameters"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"find_unused_parameters": True, **options})


class ForkedDataParallel(DataParallel):
    """As `ddp`, by processes that are forked where the verb is called, and end with it; this one is rank 0."""

    name = "ddp_spawn"

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Fork the others; what they have at the end is gone, and this process has the same."""
        if self.place is not None or self._devices * self._num_nodes == 1:
            with super().launch():
                yield
            return
        threads = torch.get_num_threads()
        self.place, others = fork(self._devices, self._device)
        if others is None:
            with ending_here(), super().launch():
                yield
            return
        self._others = others
        try:
            with super().launch():
                yield
            if (lost := others.failure(None)) is not None:
                raise lost
        finally:
            close_group()
            others.end()
            self.place = self._others = None
            torch.set_num_threads(threads)


class _Step(nn.Module):
    """A training step as the forward pass of a module, so that DistributedDataParallel can stand around it."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, *arguments: Any) -> Any:
        return self.step(*arguments)


class _SharedStep:
    """Wraps anew when other parameters train; where none does, nothing is to be agreed upon."""

    def __init__(self, module: Any, step: Callable[..., Any], find_unused_parameters: bool) -> None:
        self.module, self.step, self.find_unused_parameters = module, step, find_unused_parameters
        self._wrapped: dict[tuple[int, ...], DistributedDataParallel] = {}

    def close(self) -> None:
        """Let go of what holds the group: it is to end before Python does."""
        self._wrapped.clear()

    def __call__(self, *arguments: Any) -> Any:
        run = self.module.trainer.fit_run
        trained = tuple(id(one) for one in self.module.parameters() if one.requires_grad)
        if not trained or not run.automatic:
            return self.step(*arguments)
        if trained not in self._wrapped:
            made = self._wrapped[trained] = DistributedDataParallel(
                _Step(self.module, self.step), find_unused_parameters=self.find_unused_parameters
            )
            # As an attribute: the argument has another name in each version of torch.
            made.broadcast_buffers = _changes_buffers(self.module)
        wrapped = self._wrapped[trained]
        # Gradients of a group are added up where they are, and exchanged once.
        with nullcontext() if run.group_is_complete else wrapped.no_sync():
            return wrapped(*arguments)


def _changes_buffers(module: nn.Module) -> bool:
    """Whether a part with buffers is in training mode: BatchNorm's statistics. What is frozen leaves its own alone."""
    return any(part.training and any(True for _ in part.buffers(recurse=False)) for part in module.modules())
