"""`EarlyStopping`: ends a fit when the monitored metric no longer gets better."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.metric_value import MetricValue
from flashtask.core.number_checks import is_number, is_whole
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.metric_order import best_mode, rank, tie_break

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["EarlyStopping"]

#: What a resume needs.
_STATE = ("wait_count", "best_score", "best_loss", "stopped_epoch", "stopping_reason", "stopping_reason_message")


class EarlyStopping(Callback):
    """Looks at a metric after each epoch in which it was measured, and ends the fit after too many bad ones.

    With `Trainer(val_check_interval=...)` it looks after each validation, which then counts as an epoch does below.

    An epoch is good if the metric is at least `min_delta` better than the best so far, so with the default 0 an equal
    value is good too; for the module's own metric (a task's `val_accuracy`), `val_loss` decides between equal values as
    it does for `best.ckpt`: only a lower one is good.

    Args:
        monitor: the metric; None means the module's own.
        min_delta: by how much it must be better, at least 0.
        patience: bad epochs in a row after which the fit ends; only epochs in which the metric is measured count.
        verbose: report the metric and the bad epochs after each look; the end of the fit and its reason always are.
        mode: `min` (less is better) or `max`; None means the module's own for the module's own metric, and for any
            other what its name implies (`val_f1`: more, `val_loss`: less).
        strict: a metric that was not logged is an error, else a warning.
        check_finite: end the fit if the metric is NaN or infinite.
        stopping_threshold: end the fit once the metric is as good as this.
        divergence_threshold: end the fit once the metric is worse than this.
        check_on_train_epoch_end: None looks whenever the metric was measured, True insists on it at the end of every
            epoch, False looks only at validations.

    Attributes:
        stopped_epoch: the epoch after which it ended the fit, or None.
        stopping_reason: `patience`, `stopping_threshold`, `divergence_threshold`, `not_finite`, or empty.
        stopping_reason_message: the same in a sentence.
        best_score: the best value so far, or None.
        best_loss: the `val_loss` of that epoch, or None.
        wait_count: bad epochs in a row.

    Raises:
        UsageError: an invalid argument; `mode` is missing and the name of the metric does not imply it.
        UnknownNameError: nothing of the monitored name was logged.
    """

    def __init__(
        self,
        monitor: str | None = None,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str | None = None,
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise UsageError(f'EarlyStopping(mode={mode!r}): "min" or "max" is needed', fix='mode="min"')
        if not is_number(min_delta) or min_delta < 0:
            raise UsageError(f"EarlyStopping(min_delta={min_delta!r}): a number of at least 0 is needed")
        if monitor is not None and not isinstance(monitor, str):
            raise UsageError(
                f"EarlyStopping(monitor={monitor!r}): the name of a metric is needed", fix='monitor="val_loss"'
            )
        for argument, value in (("stopping", stopping_threshold), ("divergence", divergence_threshold)):
            if value is not None and not is_number(value):
                raise UsageError(f"EarlyStopping({argument}_threshold={value!r}): a number is needed")
        if not is_whole(patience, 0):
            raise UsageError(f"EarlyStopping(patience={patience!r}): a whole number of at least 0 is needed")
        self.monitor, self.mode = monitor, mode
        self.min_delta, self.patience, self.verbose = min_delta, patience, verbose
        self.strict, self.check_finite = strict, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self._forget()

    def _forget(self) -> None:
        self.wait_count = 0
        self._unknown: UnknownNameError | None = None
        self.best_score = None
        self.best_loss: float | None = None
        self._go_on()

    def _go_on(self) -> None:
        self.stopped_epoch: int | None = None
        self.stopping_reason = ""
        self.stopping_reason_message = ""

    @property
    def best_score(self) -> float | None:
        """The best value so far, a `MetricValue`, or None."""
        return self._best_score

    @best_score.setter
    def best_score(self, score: float | None) -> None:
        self._best_score = None if score is None else MetricValue(score)

    @property
    def state_key(self) -> str:
        """The class and the monitored metric: two may watch different metrics."""
        return f"EarlyStopping({self.monitor or ''})"

    def state_dict(self) -> dict[str, Any]:
        """The best value, the bad epochs in a row, and why the fit was ended, if it was."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        for name in _STATE:
            setattr(self, name, state.get(name))  # a checkpoint of 0.1 does not have all of them

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Settle what is watched, and forget an earlier fit."""
        if stage != "fit":
            return
        self._forget()
        self._name: str = self.monitor or module.monitor
        self._mode = best_mode("EarlyStopping", self._name, self.mode, module)
        self._loss_decides = self._name == module.monitor and self._name != "val_loss"

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """A fit that ended for lack of patience goes on if it is resumed with more of it."""
        run = trainer.current_fit
        ended_here = self.stopping_reason == "patience" and run.stop_reason == self.stopping_reason_message
        if ended_here and self.wait_count < self.patience:
            run.go_on()
            self._go_on()
        every, epochs = trainer.check_val_every_n_epoch, run.max_epochs
        if every is None or epochs is None or every <= epochs:
            return
        if self._name.startswith("val_") and run.validation is not None:
            trainer.say(f"EarlyStopping never looks: check_val_every_n_epoch={every}, and the run has {epochs} epochs")

    def on_validated(self, trainer: Trainer, module: Module) -> None:
        """Look at a metric that was measured inside an epoch."""
        run = trainer.current_fit
        if self._name in run.new_metrics and not self.check_on_train_epoch_end:
            self._look(trainer, run)

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Look at the metric; checkpoints are written after this, so they know the outcome."""
        run = trainer.current_fit
        try:
            if self._is_due(run):
                self._look(trainer, run)
        except UnknownNameError as error:
            self._unknown = error  # raised when the checkpoint of this epoch has been written

    def _look(self, trainer: Trainer, run: FitRun) -> None:
        self._counts_epochs = run.validation_times.interval is None
        score = float(run.metrics[self._name])
        self.stopping_reason, message = self._judge(score, tie_break(run.metrics))
        if self.stopping_reason:
            self.stopped_epoch, self.stopping_reason_message = run.epoch, message
            run.stop(message)
            trainer.say(f"epoch {run.epoch}: stopping, {message}")
        elif self.verbose:
            bad = f"{self.wait_count} of {self.patience} bad epochs" if self.wait_count else "the best so far"
            trainer.say(f"epoch {run.epoch}: {self._name} {score:.6g}, {bad}")

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Nothing of the monitored name was logged: the fit ends here, and can be continued from its last epoch."""
        self._raise_unknown()

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Raise the error for a metric that was missing in the last epoch too."""
        self._raise_unknown()

    def _raise_unknown(self) -> None:
        if self._unknown is not None:
            raise self._unknown

    def _is_due(self, run: FitRun) -> bool:
        """Whether there is a value of this epoch to look at.

        Raises:
            UnknownNameError: it should have been logged and was not.
        """
        if not run.epoch_is_complete:
            return False  # cut short: it is looked at when it has been continued
        validated = run.validation is not None and run.validation_times.was_in_epoch
        if self.check_on_train_epoch_end is False and not validated:
            return False
        if self._name in run.fresh_metrics:  # perhaps a validation inside the epoch was the last to measure it
            return self.check_on_train_epoch_end is True or self._name in run.new_metrics
        if self.check_on_train_epoch_end is None and run.validation is not None and not validated:
            return False
        error = UnknownNameError("metric to monitor", self._name, sorted(run.fresh_metrics))
        if self.strict:
            raise error
        warnings.warn(f"EarlyStopping does not look at epoch {run.epoch}: {error}", stacklevel=2)
        return False

    def _judge(self, score: float, loss: float) -> tuple[str, str]:
        """Count the epoch as good or bad: (why the fit ends, in a sentence), both empty if it goes on."""
        name, sign = self._name, 1 if self._mode == "max" else -1
        if self.check_finite and not math.isfinite(score):
            return "not_finite", f"{name} became {score}"
        is_good = not math.isnan(score) and self._is_good(score, loss)
        if is_good:
            self.best_score, self.best_loss, self.wait_count = score, loss if math.isfinite(loss) else None, 0
        else:
            self.wait_count += 1
        limit = self.stopping_threshold
        if limit is not None and sign * score >= sign * limit:
            return "stopping_threshold", f"{name} {score:.6g} has reached {limit:g}"
        limit = self.divergence_threshold
        if limit is not None and sign * score < sign * limit:
            return "divergence_threshold", f"{name} {score:.6g} is worse than {limit:g}"
        if not is_good and self.wait_count >= self.patience:
            best = "" if self.best_score is None else f"; the best was {self.best_score:.6g}"
            if self.best_loss is not None and self._loss_decides and score == self.best_score:
                best += f" with val_loss {self.best_loss:.6g}"
            looks = "epochs" if self._counts_epochs else "validations"
            return "patience", f"{name} did not improve in {self.wait_count} {looks}{best}"
        return "", ""

    def _is_good(self, score: float, loss: float) -> bool:
        """Whether an epoch is better than the best so far, or as good where that counts."""
        if self.best_score is None:
            return True
        if score == self.best_score and self._loss_decides and self.best_loss is not None:
            return not self.min_delta and rank(score, loss, self._mode) > rank(score, self.best_loss, self._mode)
        return (1 if self._mode == "max" else -1) * (score - self.best_score) >= self.min_delta
