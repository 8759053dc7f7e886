"""One call of a verb, and everything that changes during it; the runs of validation, test and prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.loading import OrderedBatches, batch_size_of, length_of
from flashtask.trainer.placement.placement import Placement
from flashtask.trainer.results import LogSettings, Results
from flashtask.trainer.transfer import channels_last, move_to_device

__all__ = ["EvaluationRun", "Run", "RunInterruptedError", "as_it_takes", "at_most", "taken_in_turn"]


class Run:
    """What every verb has: module, data, device, precision, and the values logged so far."""

    #: `fit`, `validate`, `test` or `predict`
    stage = ""

    def __init__(self, trainer: Any, module: Any, data: Any, placement: Placement) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.placement, self.strategy = placement, placement.strategy
        self.device = placement.device
        self.precision, self.inference_precision = placement.precision, placement.inference_precision
        self.memory_format: torch.memory_format = torch.contiguous_format
        self.results = Results(self.strategy.reduce)
        #: the moment or step that runs now; it decides how `log` keeps a value
        self.moment = "setup"
        #: samples in the batch that is worked on
        self.batch_size = 1
        #: number of the loader that the batch comes from, None if there is only one
        self.loader_number: int | None = None
        #: the hooks around moving a batch, None for those that nobody wrote: before, move, after
        self.transfer: tuple[Any, Any, Any] = (None, None, None)
        self.callbacks: list[Any] = []
        #: the `teardown` of each `setup` that was begun, in the order of beginning
        self.undo: list[Callable[[], Any]] = []
        self.loggers: list[Any] = []
        #: ready to be driven
        self.is_prepared = False
        #: moment -> who is told of it
        self.listeners: dict[str, tuple[Callable[..., Any], ...]] = {}

    @property
    def own_part(self) -> dict[str, Callable[..., Any]]:
        """What the engine itself does when a moment is told, after everybody but checkpoints: moment -> function."""
        return {}

    def tell(self, moment: str, *arguments: Any) -> None:
        """Tell those who listen that a moment has come."""
        active = self.trainer.active_run
        before, active.moment = active.moment, moment
        for call in self.listeners.get(moment, ()):
            answer = call(*arguments)
            if moment == "train_batch_start" and isinstance(answer, int) and answer == -1:
                self.trainer.fit_run.skip_epoch = True
        active.moment = before

    def log(self, name: str, value: Any, settings: LogSettings, batch_size: int | None) -> None:
        """Keep a value, or each value of a dictionary, under the moment that runs now."""
        if not isinstance(value, torch.Tensor) and isinstance(value, Mapping):
            self.results.chart(name, self.loggers)
            for series, one in value.items():
                self.log(f"{name}/{series}", one, settings, batch_size)
            return
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise UsageError(f"log({name!r}, batch_size={batch_size!r}): a whole number of at least 1 is needed")
        # What only fills a step counts for nothing, whatever the module takes it for.
        weight = self.batch_size if batch_size is None or not self.batch_size else batch_size
        loader = self.loader_number if settings.add_dataloader_idx else None
        self.results.log(self.moment, name, value, weight, settings, loader)

    def agree_on_results(self) -> None:
        """Let every process have the entries of all: one of them may have been given no batch."""
        if self.strategy.world_size > 1:
            self.results.agree(self.strategy.gather, self.module)

    def to_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Move a batch to the run's device and memory format, through the transfer hooks that somebody wrote."""
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


class RunInterruptedError(Exception):
    """A signal asked the run to stop; its place in the epoch has been kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def at_most(length: int | None, limit: int | None) -> int | None:
    """The smaller of a length and a limit, either of which may be unknown."""
    return limit if length is None else length if limit is None else min(length, limit)


def as_it_takes(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step as it is called, with batch and number: one that takes the batch alone is given that alone."""
    parameters = inspect.signature(step).parameters.values()
    if len(parameters) != 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return step
    return lambda batch, *numbers: step(batch)


def taken_in_turn(by_process: tuple[list[Any], ...]) -> list[Any]:
    """The parts of the first batch of all processes, then those of the second, ...: the order of the data."""
    return [part for parts in zip_longest(*by_process, fillvalue=_MISSING) for part in parts if part is not _MISSING]


_MISSING = object()


class EvaluationRun(Run):
    """Validation, test or prediction; it may nest in a fit run, and never replaces it.

    Args:
        trainer: whose verb it is.
        module: to evaluate.
        data: its data module.
        placement: where it runs, and in which number format.
        stage: `validate`, `test` or `predict`.
        parent: the fit run it nests in, or None.
    """

    def __init__(self, trainer: Any, module: Any, data: Any, placement: Placement, stage: str, parent: Any) -> None:
        super().__init__(trainer, module, data, placement)
        self.stage, self.parent = stage, parent
        self.precision = placement.inference_precision
        #: the first word of its moments
        self.word = {"validate": "validation"}.get(stage, stage)
        self.loaders: list[Any] = []
        #: for each loader, batches at the most, or None
        self.limits: list[int | None] = []
        self.keeps_outputs = stage == "predict" or hasattr(module, f"{self.word}_epoch_end")
        self.outputs: list[list[Any]] = []
        #: the values of the last pass, under the names loggers show
        self.results_of_pass: dict[str, float] = {}
        self.samples_seen = self._batches_seen = 0
        #: the checkpoint whose weights are loaded first, or None
        self.weights_from: Path | None = None
        self._step = as_it_takes(getattr(module, f"{self.word}_step"))
        self._step_end = getattr(module, f"{self.word}_step_end", None)
        self._has_all_outputs = False
        self._modes: list[tuple[nn.Module, bool]] = []
        self._outer: Run | None = None
        #: what holds while the module is asked for a batch
        self._asking: ExitStack | None = None

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
        if self._asking is None:  # not before: whoever is told of the start may change weights
            self._asking = ExitStack()
            self._asking.enter_context(self.strategy.whole_weights(self.module))
        for batch_idx, batch in enumerate(islice(iter(self.loaders[number]), self.limits[number])):
            self.batch_size = batch_size_of(batch)
            yield self.to_device(batch, number), batch_idx
            self.samples_seen += self.batch_size
            # Several processes obey it together, at the next step: their signals come at different batches.
            alone = self.strategy.world_size == 1
            if alone and self.parent is not None and self.parent.interrupted_by is not None:
                raise RunInterruptedError(self.parent.interrupted_by)

    def batches_in(self, number: int) -> int | None:
        """How many batches the pass takes from a loader, None if the loader does not know its length."""
        return at_most(length_of(self.loaders[number]), self.limits[number])

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Call the module's method for a batch; the loader's number is passed where there are several."""
        self.moment = f"{self.word}_step"
        arguments = (batch, batch_idx, dataloader_idx) if len(self.loaders) > 1 else (batch, batch_idx)
        outputs = self._step(*arguments)
        if self._step_end is None:
            return outputs
        self.moment = f"{self.word}_step_end"
        changed = self._step_end(outputs)
        return outputs if changed is None else changed

    def keep(self, outputs: Any, number: int) -> None:
        """Collect what the step returns, for `predict` and for a module with `*_epoch_end(outputs)`."""
        if self.keeps_outputs:
            self.outputs[number].append(outputs)
        self._batches_seen += 1
        if self.loggers and self._batches_seen % self.trainer.log_every_n_steps == 0:
            values = self.results.step_values()  # empty unless the module asked for `on_step=True`
            for logger in self.loggers if values else ():
                logger.log_step(values, self.trainer.global_step, self.trainer.current_epoch)

    @property
    def outputs_of_pass(self) -> list[Any]:
        """Outputs of all batches, in a list for each loader where there are several; in `predict`, of all processes."""
        if self.stage == "predict" and self.shares_loaders and not self._has_all_outputs:
            self._has_all_outputs = True
            by_process = self.strategy.gather(self.outputs)
            self.outputs = [taken_in_turn(of_loader) for of_loader in zip(*by_process, strict=True)]
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]

    @property
    def shares_loaders(self) -> bool:
        """Whether each process has a share of the samples that the engine has given it."""
        orders = [getattr(loader, "batch_sampler", None) for loader in self.loaders]
        return any(isinstance(order, OrderedBatches) and order.world_size > 1 for order in orders)

    def close(self) -> None:
        """Compute the values of the pass and hand them to the fit run, if there is one.

        Raises:
            UsageError: an iterator was given, and an earlier pass has used it up.
        """
        self.loader_number = None
        if not self._batches_seen and any(hasattr(loader, "__next__") for loader in self.loaders):
            raise UsageError(
                f"the loader of {self.word} is used up",
                why="an iterator gives its batches only once",
                fix="a DataLoader or a list of batches",
            )
        self.agree_on_results()
        self.results_of_pass, values = self.strategy.gather(
            (self.results.epoch_values(logger_only=True), self.results.callback_values())
        )[0]
        if self.parent is not None and not self.is_sanity_check:
            self.parent.take_metrics(values)

    def metrics_of_loaders(self) -> list[dict[str, float]]:
        """The values of the last pass, a dictionary for each loader."""
        if len(self.loaders) == 1:
            return [dict(self.results_of_pass)]
        endings = [f"/dataloader_idx_{number}" for number in range(len(self.loaders))]
        return [{n: v for n, v in self.results_of_pass.items() if n.endswith(ending)} for ending in endings]

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
