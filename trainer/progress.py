"""The progress bar, and the line a run prints for each epoch. Quiet bars where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from flashtask.trainer.callbacks import Callback

__all__ = ["ProgressBar"]

_REFRESH_SECONDS = 0.1


class ProgressBar(Callback):
    """One line that is rewritten in place: epoch, batches, time left, samples per second, loss and chosen metrics.

    Args:
        stream: where to write; standard error if not given. Without a terminal only a line for each epoch is written.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self._live = bool(getattr(self.stream, "isatty", lambda: False)())
        self._shown_at = 0.0
        self._started_at = 0.0
        self._loss: Any = None
        self._width = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Start the clock of the epoch."""
        self._started_at = time.monotonic()
        self._loss = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Redraw, at most ten times a second; the loss is read only then, so that no step waits for a device."""
        if not self._live:
            return
        now = time.monotonic()
        if now - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = now
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        run = trainer.fit_run
        values = {"loss": float(loss.detach())} if loss is not None else {}
        values |= run.results.bar_values()
        self._draw(f"epoch {run.epoch}", run.batch_idx, run.batches_in_epoch, run.samples, module, values)

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Redraw for validation."""
        self._draw_evaluation("validating", trainer, module, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Redraw for a test."""
        self._draw_evaluation("testing", trainer, module, batch_idx, dataloader_idx)

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Redraw for prediction."""
        self._draw_evaluation("predicting", trainer, module, batch_idx, dataloader_idx)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Start the clock of validation."""
        self._started_at = time.monotonic()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_epoch_end(self, trainer: Any, module: Any) -> None:
        """Leave one line for the epoch."""
        run = trainer.fit_run
        row = run.history[-1]
        shown = [f"{name} {row[name]:.4f}" for name in row if name.startswith(("train_", "val_")) and _is_metric(name)]
        speed = f"{row.get(f'{module.sample_noun}_per_second', 0):.0f} {module.sample_noun}/s"
        last = f"/{run.max_epochs - 1}" if run.max_epochs else ""
        self._print(f"epoch {run.epoch}{last}  " + "  ".join([*shown, f"{row['seconds']:.1f} s", speed]))

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Leave the line, so that the error starts on one of its own."""
        self._clear()

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Remove the bar."""
        self._clear()

    on_validation_end = on_test_end = on_predict_end = on_fit_end

    def _draw_evaluation(self, verb: str, trainer: Any, module: Any, batch_idx: int, number: int) -> None:
        now = time.monotonic()
        if not self._live or now - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = now
        run = trainer.active_run
        self._draw(verb, batch_idx + 1, run.batches_in(number), run.samples_seen, module, {})

    def _draw(
        self, what: str, done: int, total: int | None, samples: int, module: Any, values: dict[str, float]
    ) -> None:
        spent = time.monotonic() - self._started_at
        parts = [what, f"{done}/{total}" if total else f"{done}"]
        if spent > 0:
            parts.append(f"{samples / spent:.0f} {module.sample_noun}/s")
        if total and done:
            parts.append(f"{_clock(spent / done * (total - done))} left")
        parts += [f"{name} {value:.4f}" for name, value in values.items()]
        self._rewrite("  ".join(parts))

    def _rewrite(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self._width))
        self.stream.flush()
        self._width = len(line)

    def _clear(self) -> None:
        if self._live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0

    def _print(self, line: str) -> None:
        self._clear()
        self.stream.write(line + "\n")
        self.stream.flush()


def _is_metric(name: str) -> bool:
    return not name.endswith(("_seconds", "_per_second"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
