"""`FitResult`: what `fit` and `finetune` give back, and the lines that print it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.fit_run import FitRun

__all__ = ["FitResult", "best_metrics_of", "fit_result", "shown_metrics", "shown_path"]

#: Metrics in the line of the result.
_MOST_SHOWN = 6


@dataclass(frozen=True, repr=False)
class FitResult:
    """What came of a fit: which epoch's weights the model has now, their metrics, and where the files are.

    Args:
        epoch: whose weights are in the model, counted from 0; None if no epoch was trained.
        is_best: it is the best epoch, put back by `finetune`; else the last.
        metrics: of that epoch, by name: `val_loss`, `val_accuracy`, `train_loss`, ...
        num_epochs: that the run has trained, with those before it was resumed.
        stop_reason: why it ended before `max_epochs` or `max_steps`; None if it did not.
        run_folder: with recipe, logs and checkpoints; None if none was made.
        checkpoint_path: the file that holds these weights; None if there is none.
    """

    epoch: int | None
    is_best: bool
    metrics: Mapping[str, float]
    num_epochs: int
    stop_reason: str | None
    run_folder: Path | None
    checkpoint_path: Path | None

    def __str__(self) -> str:
        if self.epoch is None:
            first = "no epoch was trained"
        else:
            which = "best" if self.is_best else "last"
            first = f"the model has epoch {self.epoch}, the {which} of {self.num_epochs}"
            first += f": {shown}" if (shown := shown_metrics(self.metrics)) else ""
        return first if self.run_folder is None else f"{first}\nrun folder: {shown_path(self.run_folder)}"

    def __repr__(self) -> str:
        return f"FitResult({'; '.join(str(self).splitlines())})"


def fit_result(run: FitRun) -> FitResult:
    """The result of a fit that is over."""
    trainer = run.trainer
    checkpoint: ModelCheckpoint | None = trainer.checkpoint_callback
    last = int(run.history[-1]["epoch"]) if run.history else None
    best = None if checkpoint is None or not run.has_best else checkpoint.best_epoch
    path = "" if checkpoint is None else checkpoint.last_model_path if best is None else checkpoint.best_model_path
    return FitResult(
        epoch=last if best is None else best,
        is_best=best is not None,
        metrics=run.metrics_of_weights,
        num_epochs=len(run.history),
        stop_reason=run.stop_reason or None,
        run_folder=trainer.claimed_folder,
        checkpoint_path=Path(path) if path else None,
    )


def best_metrics_of(run: FitRun, checkpoint: ModelCheckpoint, stored: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the best checkpoint, by the names that `callback_metrics` has.

    Args:
        run: whose best epoch it is.
        checkpoint: that wrote it; what it ranked by may have been measured after a step, and not be in the file.
        stored: the metrics in the file.
    """
    ranked = {name: value for name, value in checkpoint.best_metrics.items() if name in run.metrics}
    return {**stored, **ranked}


def shown_metrics(metrics: Mapping[str, float | None]) -> str:
    """The metrics of validation, or without any the training loss, as one line shows them; None is not a number.

    Of many metrics the first are shown, without the parts of the loss, and how many there are besides.
    """
    found = {name: value for name, value in metrics.items() if name.startswith("val_")}
    found = found or {name: value for name, value in metrics.items() if name == "train_loss"}
    shown = found
    if len(found) > _MOST_SHOWN:
        shown = dict(islice(((n, v) for n, v in found.items() if not n.startswith("val_loss_")), _MOST_SHOWN))
    words = [f"{name} {math.nan if value is None else value:.4f}" for name, value in shown.items()]
    return ", ".join(words) + (f" and {len(found) - len(shown)} more" if len(shown) < len(found) else "")


def shown_path(path: Path) -> str:
    """A path as it is typed from the working folder, unless that leads upwards."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here
