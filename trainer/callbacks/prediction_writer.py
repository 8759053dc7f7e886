"""`BasePredictionWriter`: writing predictions down while they are made, or all at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.data_loaders import order_of, taken_in_turn

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import EvaluationRun
    from flashtask.trainer.trainer import Trainer

__all__ = ["BasePredictionWriter"]

#: write_interval -> the methods that it needs
_NEEDED = {
    "batch": ("write_on_batch_end",),
    "epoch": ("write_on_epoch_end",),
    "batch_and_epoch": ("write_on_batch_end", "write_on_epoch_end"),
}


class BasePredictionWriter(Callback):
    """Base of callbacks that write what `Trainer.predict` gives; write the method that the interval needs.

    The `batch_indices` of both methods are the places of a batch's samples in the order of their loader, from 0. Of
    several processes each is given its own batches, and at the end those of all.

    Args:
        write_interval: `batch` (after each), `epoch` (everything at the end) or `batch_and_epoch`.

    Raises:
        UnknownNameError: another interval.
        UsageError: the method that it needs is not written, or predictions are not kept until the end.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        if write_interval not in _NEEDED:
            raise UnknownNameError("write_interval", str(write_interval), _NEEDED)
        self.write_interval = write_interval
        self._indices: list[list[list[int]]] = []
        self._samples: list[int] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        prediction: Any,
        batch_indices: list[int],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what was predicted for a batch."""

    def write_on_epoch_end(
        self, trainer: Trainer, module: Module, predictions: list[Any], batch_indices: list[Any]
    ) -> None:
        """Write what was predicted for all batches: lists with one item a batch, within one a loader if several."""

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Look whether what the interval needs is written, before anything is predicted."""
        for name in _NEEDED[self.write_interval]:
            if getattr(type(self), name) is getattr(BasePredictionWriter, name):
                raise UsageError(
                    f"{type(self).__name__}(write_interval={self.write_interval!r}) has no {name}",
                    fix=f"def {name}(self, trainer, module, ...)",
                )

    def on_predict_start(self, trainer: Trainer, module: Module) -> None:
        """Count from the first sample of each loader."""
        run = _prediction(trainer)
        if self.write_interval != "batch" and not run.keeps_outputs:
            raise UsageError(
                f"write_interval={self.write_interval!r} needs predictions that are kept to the end",
                fix='write_interval="batch"',
            )
        self._samples = [0] * len(run.loaders)
        self._indices = [[] for _ in run.loaders]

    def on_predict_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand a batch over, with the places of its samples."""
        run = _prediction(trainer)
        start, size = self._samples[dataloader_idx], run.batch_size
        order = order_of(run.loaders[dataloader_idx])
        if order is not None:
            start = batch_idx * order.batch_size + order.rank * order.own_size
        self._samples[dataloader_idx] += size
        indices = list(range(start, start + size))
        if self.write_interval != "epoch":
            self.write_on_batch_end(trainer, module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self.write_interval != "batch":
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Hand over all predictions, with the places of their samples."""
        if self.write_interval == "batch":
            return
        run = _prediction(trainer)
        by_process = run.strategy.gather(self._indices) if run.shares_loaders else [self._indices]
        of_all = [taken_in_turn(of_loader) for of_loader in zip(*by_process, strict=True)]
        self.write_on_epoch_end(trainer, module, run.outputs_of_pass, of_all if len(of_all) > 1 else of_all[0])


def _prediction(trainer: Trainer) -> EvaluationRun:
    return cast("EvaluationRun", trainer.current_run)
