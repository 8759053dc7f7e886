"""The progress bar, which needs a terminal, and the line that a run prints for each epoch."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from rich.live import Live

    from flashtask.trainer.module import Module
    from flashtask.trainer.run import EvaluationRun
    from flashtask.trainer.trainer import Trainer

__all__ = ["ProgressBar"]

_REFRESH_SECONDS = 0.1
#: What is shown before the numbers, by the stage of a run.
_EVALUATIONS = {"validate": "validating", "test": "testing", "predict": "predicting"}


class ProgressBar(Callback):
    """One line that is rewritten in place: epoch, batches, time left, loss, metrics, samples per second.

    The metrics are those of the last validation, and what the module logs with `prog_bar=True`. The line is never wider
    than the terminal: numbers get shorter first, then the last values are left out. What is printed meanwhile appears
    above the line.

    Args:
        stream: where to write; standard error if not given. Without a terminal only a line for each epoch is written.
        refresh_rate: redraw only after every so many batches, and at most ten times a second; 0 draws no bar.

    Raises:
        UsageError: another refresh rate.
    """

    def __init__(self, stream: TextIO | None = None, refresh_rate: int = 1) -> None:
        if not is_whole(refresh_rate, 0):
            raise UsageError(f"ProgressBar(refresh_rate={refresh_rate!r}): a whole number of at least 0 is needed")
        self.refresh_rate = refresh_rate
        self.stream = stream if stream is not None else sys.stderr
        self._live = _is_terminal(self.stream) and os.environ.get("TERM") != "dumb" and refresh_rate > 0
        self._shown_at = 0.0
        self._started_at = 0.0
        #: the line that is rewritten, while there is one
        self._line: Live | None = None
        #: (batches, samples) of the epoch that were done when its clock started
        self._before = (0, 0)
        #: the metrics of the last validation
        self._validated: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of the epoch, which may be one that is resumed in its middle."""
        run = trainer.current_fit
        self._started_at, self._before = time.monotonic(), (run.batch_idx, run.samples)
        self._validated = next((found for row in reversed(run.history) if (found := _metrics(row, "val_"))), {})

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Redraw, at most ten times a second; the loss is read only then, so that no step waits for a device."""
        if not self._is_due(batch_idx):
            return
        last = outputs[-1] if isinstance(outputs, list) and outputs else outputs  # of several optimizers
        loss = last.get("loss") if isinstance(last, dict) else last
        run = trainer.current_fit
        # With manual optimization a step may return anything.
        values = {"loss": float(loss.detach())} if isinstance(loss, torch.Tensor) and loss.numel() == 1 else {}
        others = {name: value for name, value in run.results.bar_values().items() if name not in self._validated}
        what, shown = f"epoch {run.epoch}", values | self._validated
        self._draw(what, run.batch_idx, run.batches_in_epoch, run.samples, module, shown, others)

    def on_validation_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Redraw for validation, a test or prediction."""
        if not self._is_due(batch_idx):
            return
        run = cast("EvaluationRun", trainer.active_run)
        lengths = [run.batches_in(number) for number in range(len(run.loaders))]
        known = [length for length in lengths if length is not None]
        done = sum(length or 0 for length in lengths[:dataloader_idx]) + batch_idx + 1
        total = sum(known) if len(known) == len(lengths) else None
        self._draw(_EVALUATIONS[run.stage], done, total, run.samples_seen + run.batch_size, module)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of validation."""
        self._started_at, self._before = time.monotonic(), (0, 0)

    on_test_start = on_predict_start = on_validation_start

    @contextmanager
    def during_pass(self, what: str, batches: int, module: Module) -> Iterator[Callable[[int], None]]:
        """Show a pass in the middle of an epoch, whose clock is stopped meanwhile; the line is removed when it ends.

        Args:
            what: the name of the pass.
            batches: how many it has.
            module: whose samples they hold.

        Returns:
            A function to call after each batch with its number of samples.
        """
        outer, began = (self._started_at, self._before), time.monotonic()
        self._started_at, self._before = began, (0, 0)
        done = samples = 0

        def draw(size: int) -> None:
            nonlocal done, samples
            done, samples = done + 1, samples + size
            if self._is_due(done - 1):
                self._draw(what, done, batches, samples, module)

        try:
            yield draw
        finally:
            self._clear()
            self._started_at, self._before = outer[0] + time.monotonic() - began, outer[1]

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Write the line of the epoch; what does not fit continues, indented, in the next."""
        run = trainer.current_fit
        row = run.history[-1]
        last = f"/{run.max_epochs - 1}" if run.max_epochs else ""
        parts = [f"epoch {run.epoch}{last}"]
        parts += [f"{name} {_number(value, 4)}" for name, value in _metrics(row, "train_", "val_").items()]
        parts.append(f"{row['seconds']:.1f} s")
        speed = f"{row.get(f'{module.sample_noun}_per_second', 0):.0f} {module.sample_noun}/s"
        width = self._columns()
        if len("  ".join([*parts, speed])) <= width:
            parts.append(speed)
        self._clear()
        self.stream.write(_in_lines(parts, width) + "\n")
        self.stream.flush()

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """Remove the bar, so that the error has a line of its own."""
        self._clear()

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """Remove the bar."""
        self._clear()

    on_validation_end = on_test_end = on_predict_end = on_fit_end

    def _is_due(self, batch_idx: int) -> bool:
        """Whether the bar is redrawn for a batch."""
        if not self._live or (batch_idx + 1) % self.refresh_rate:
            return False
        now = time.monotonic()
        if now - self._shown_at < _REFRESH_SECONDS:
            return False
        self._shown_at = now
        return True

    def _draw(
        self,
        what: str,
        done: int,
        total: int | None,
        samples: int,
        module: Module,
        values: Mapping[str, float] = {},
        others: Mapping[str, float] = {},
    ) -> None:
        spent = max(time.monotonic() - self._started_at, 1e-9)
        batches_before, samples_before = self._before
        head = [what, f"{done}/{total}" if total else f"{done}"]
        if total and done > batches_before:
            head.append(f"{_clock(spent / (done - batches_before) * (total - done))} left")
        speed = f"{(samples - samples_before) / spent:.0f}"
        width = self._columns() - 1  # a full line would move the cursor to the next one
        for digits, gap, noun in ((4, "  ", f" {module.sample_noun}"), (3, " ", "")):
            shown = [[f"{name} {_number(value, digits)}" for name, value in some.items()] for some in (values, others)]
            parts = [*head, *shown[0], f"{speed}{noun}/s", *shown[1]]
            if len(gap.join(parts)) <= width:
                break
        while len(parts) > 1 and len(gap.join(parts)) > width:
            parts.pop()
        self._show(gap.join(parts)[:width])

    def _show(self, line: str) -> None:
        """Draw the line where it is, and begin one if there is none."""
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self._line is None:
            console = Console(file=self.stream, force_terminal=True, force_jupyter=False, soft_wrap=True)
            is_stderr = self.stream is sys.stderr
            self._line = Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stderr=is_stderr,
                redirect_stdout=is_stderr and _is_terminal(sys.stdout),
            )
            self._line.start()
            console.show_cursor(True)  # a process that is killed could not show it again
        self._line.update(Text(line, no_wrap=True), refresh=True)

    def _columns(self) -> int:
        """The width of the terminal that is written to, else what COLUMNS says, else 80."""
        if self._live:
            with suppress(AttributeError, OSError, ValueError):
                if own := os.get_terminal_size(self.stream.fileno()).columns:
                    return own
        return shutil.get_terminal_size().columns if self._live or "COLUMNS" in os.environ else 80

    def _clear(self) -> None:
        if self._line is not None:
            self._line.update("")
            self._line.stop()
            self._line = None


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _metrics(row: dict[str, float], *beginnings: str) -> dict[str, float]:
    """The metrics of an epoch whose names begin so, without times and speeds."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith(beginnings) and not name.endswith(("_seconds", "_per_second"))
    }


def _number(value: float, digits: int) -> str:
    """Fixed digits where they say something, else as few as a number needs."""
    return f"{value:.{digits}f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.{digits - 1}g}"


def _in_lines(parts: list[str], width: int) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
