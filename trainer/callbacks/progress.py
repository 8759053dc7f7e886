"""The progress bar, for a terminal or a notebook, and the line that a run prints for each epoch."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

import torch

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from rich.live import Live

    from flashtask.trainer.module import Module
    from flashtask.trainer.run import EvaluationRun
    from flashtask.trainer.trainer import Trainer

__all__ = ["BarState", "ProgressBar", "clock", "shown_value"]

_REFRESH_SECONDS = 0.1
#: Metrics in the line of an epoch.
_MOST_SHOWN = 8
#: In a notebook, where each drawing is a message that the browser keeps.
_NOTEBOOK_SECONDS = 0.5
#: What is shown before the numbers, by the stage of a run.
_EVALUATIONS = {"validate": "validating", "test": "testing", "predict": "predicting"}


class BarState(NamedTuple):
    """What a bar shows.

    Args:
        stage: `train`, `sanity`, `validation`, `test`, `predict`, or `pass` for one that computes features.
        description: of it in words: `epoch 3`, `validating`.
        done: batches of the epoch or pass.
        total: its batches; None for a stream that does not know its length.
        done_before: batches of an epoch that was resumed in its middle.
        seconds: since its clock was started.
        speed: samples per second.
        noun: what the samples are: `images`.
        metrics: loss and metrics by name.
        first: how many of these are loss and metrics of the last validation; the others asked for the bar.
    """

    stage: str
    description: str
    done: int
    total: int | None
    done_before: int
    seconds: float
    speed: float
    noun: str
    metrics: Mapping[str, Any]
    first: int

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end of the epoch or pass; None where that is not known."""
        if not self.total or self.done <= self.done_before:
            return None
        return self.seconds / (self.done - self.done_before) * (self.total - self.done)


class ProgressBar(Callback):
    """One line that is rewritten in place: epoch, batches, time left, loss, metrics, samples per second.

    The metrics are those of the last validation, and what the module logs with `prog_bar=True`. The line is never wider
    than the terminal: numbers get shorter first, then the last values are left out. What is printed meanwhile appears
    above the line. Also the base of other bars: a subclass changes `get_metrics`, or draws in `show` and `clear`.

    Args:
        stream: where to write; standard error if not given. Only a terminal or a notebook gets a bar, anything else a
            line for each epoch.
        refresh_rate: redraw only after every so many batches, and at most ten times a second; 0 draws no bar.

    Raises:
        UsageError: another refresh rate.
    """

    def __init__(self, stream: TextIO | None = None, refresh_rate: int = 1) -> None:
        if not is_whole(refresh_rate, 0):
            kind = type(self).__name__
            raise UsageError(f"{kind}(refresh_rate={refresh_rate!r}): a whole number of at least 0 is needed")
        self.refresh_rate = refresh_rate
        self.stream = stream if stream is not None else sys.stderr
        self._in_notebook = _is_in_notebook(self.stream)
        is_terminal = _is_terminal(self.stream) and os.environ.get("TERM") != "dumb"
        self._live = (is_terminal or self._in_notebook) and refresh_rate > 0
        self._enabled = True
        self._shown_at = 0.0
        self._started_at = 0.0
        #: the line that is rewritten, while there is one; in a notebook, how long it is
        self._line: Live | None = None
        self._line_length = 0
        #: (batches, samples) of the epoch that were done when its clock started
        self._before = (0, 0)
        #: the metrics of the last validation
        self._validated: dict[str, float] = {}
        #: what the last step returned
        self._outputs: Any = None

    # ---- what a subclass may change, and others call

    def get_metrics(self, trainer: Trainer, module: Module) -> dict[str, Any]:
        """What a bar shows of training: the loss of the last step, then metrics by name; numbers or texts."""
        last = self._outputs[-1] if isinstance(self._outputs, list) and self._outputs else self._outputs
        loss = last.get("loss") if isinstance(last, dict) else last  # of several optimizers: of the last
        # With manual optimization a step may return anything.
        values = {"loss": float(loss.detach())} if isinstance(loss, torch.Tensor) and loss.numel() == 1 else {}
        others = trainer.current_fit.results.bar_values()
        return values | self._validated | {name: v for name, v in others.items() if name not in self._validated}

    def show(self, state: BarState) -> None:
        """Draw a state in the place of what was drawn before."""
        head = [state.description, f"{state.done}/{state.total}" if state.total else f"{state.done} batches"]
        if state.total is None:
            head.append(clock(state.seconds))
        elif (left := state.seconds_left) is not None:
            head.append(f"{clock(left)} left")
        width = self._columns() - 1  # a full line would move the cursor to the next one
        metrics = list(state.metrics.items())
        for digits, gap, noun in ((4, "  ", f" {state.noun}"), (3, " ", "")):
            shown = [f"{name} {shown_value(value, digits)}" for name, value in metrics]
            parts = [*head, *shown[: state.first], f"{state.speed:.0f}{noun}/s", *shown[state.first :]]
            if len(gap.join(parts)) <= width:
                break
        while len(parts) > 1 and len(gap.join(parts)) > width:
            parts.pop()
        self._show(gap.join(parts)[:width])

    def clear(self) -> None:
        """Remove what is drawn; a later `show` draws it again."""
        if self._line_length:
            self.stream.write(f"\r{' ' * self._line_length}\r")
            self._line_length = 0
        if self._line is not None:
            self._line.update("")
            self._line.stop()
            self._line = None

    def print(self, *values: Any, sep: str = " ") -> None:
        """Write a line above the bar, in place of the `print` of Python."""
        self.clear()
        self.stream.write(sep.join(map(str, values)) + "\n")
        self.stream.flush()

    def disable(self) -> None:
        """Draw and write nothing from now on; processes other than the first do not."""
        self.clear()
        self._enabled = False

    def enable(self) -> None:
        """Draw again after `disable`."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether it draws, on a terminal or in a notebook."""
        return self._enabled and self.refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is drawn: the opposite of `is_enabled`."""
        return not self.is_enabled

    # ---- hooks

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Switch the bar off in all processes but the first."""
        if not trainer.is_global_zero:
            self.disable()

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of the epoch, which may be one that is resumed in its middle."""
        run = trainer.current_fit
        self._started_at, self._before = time.monotonic(), (run.batch_idx, run.samples)
        self._validated = next((found for row in reversed(run.history) if (found := _metrics(row, "val_"))), {})

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Redraw, at most ten times a second; the loss is read only then, so that no step waits for a device."""
        if not self._is_due(batch_idx):
            return
        run = trainer.current_fit
        self._outputs = outputs
        metrics = self.get_metrics(trainer, module)
        self._outputs = None
        asked = run.results.bar_values().keys() - self._validated.keys()
        first = sum(name not in asked for name in metrics)
        metrics = dict(sorted(metrics.items(), key=lambda item: item[0] in asked))
        position = (run.batch_idx, run.batches_in_epoch, run.samples)
        self._draw("train", f"epoch {run.epoch}", *position, module, metrics, first)

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
        stage = "sanity" if run.is_sanity_check else run.word
        self._draw(stage, _EVALUATIONS[run.stage], done, total, run.samples_seen + run.batch_size, module)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of validation, from which its rate is computed."""
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
                self._draw("pass", what, done, batches, samples, module)

        try:
            yield draw
        finally:
            self.clear()
            self._started_at, self._before = outer[0] + time.monotonic() - began, outer[1]

    def on_validated(self, trainer: Trainer, module: Module) -> None:
        """Write a line for a validation inside an epoch."""
        if not self._enabled:
            return
        row = trainer.current_fit.validations[-1]
        self._validated = _metrics(row, "val_")
        parts = [f"epoch {row['epoch']} step {row['step']}"]
        parts += _words(self._validated)
        self.print(_in_lines(parts, self._columns()))

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Write the line of the epoch; what does not fit continues, indented, in the next."""
        if not self._enabled:
            return
        run = trainer.current_fit
        row = run.history[-1]
        last = f"/{run.max_epochs - 1}" if run.max_epochs is not None else ""
        parts = [f"epoch {run.epoch}{last}"]
        parts += _words(_metrics(row, "train_", "val_"))
        parts.append(f"{row['seconds']:.1f} s")
        speed = f"{row.get(f'{module.sample_noun}_per_second', 0):.0f} {module.sample_noun}/s"
        width = self._columns()
        if len("  ".join([*parts, speed])) <= width:
            parts.append(speed)
        self.print(_in_lines(parts, width))

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """Remove the bar, so that the error has a line of its own."""
        self.clear()

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """Remove the bar, so that what is printed next begins a line."""
        self.clear()

    on_validation_end = on_test_end = on_predict_end = on_fit_end

    def _is_due(self, batch_idx: int) -> bool:
        """Whether the bar is redrawn for a batch."""
        if not self._live or not self._enabled or (batch_idx + 1) % self.refresh_rate:
            return False
        now = time.monotonic()
        if now - self._shown_at < (_NOTEBOOK_SECONDS if self._in_notebook else _REFRESH_SECONDS):
            return False
        self._shown_at = now
        return True

    def _draw(
        self,
        stage: str,
        description: str,
        done: int,
        total: int | None,
        samples: int,
        module: Module,
        metrics: Mapping[str, Any] = {},
        first: int = 0,
    ) -> None:
        spent = max(time.monotonic() - self._started_at, 1e-9)
        before, samples_before = self._before
        speed = (samples - samples_before) / spent
        state = (stage, description, done, total, before, spent, speed, module.sample_noun, metrics, first)
        self.show(BarState(*state))

    def _show(self, line: str) -> None:
        """Draw the line where it is, and begin one if there is none."""
        if self._in_notebook:  # whose output obeys a carriage return and no other control character
            self.stream.write(f"\r{line:<{self._line_length}}")
            self.stream.flush()
            self._line_length = len(line)
            return
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
        """The width of the terminal that is written to, else $COLUMNS, else 80."""
        if self._live:
            with suppress(AttributeError, OSError, ValueError):
                if own := os.get_terminal_size(self.stream.fileno()).columns:
                    return own
        return shutil.get_terminal_size().columns if self._live or "COLUMNS" in os.environ else 80


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _is_in_notebook(stream: TextIO) -> bool:
    """Whether a stream is shown by a notebook: Jupyter, Colab, VS Code and others run an IPython kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None and stream in (sys.stdout, sys.stderr)


def _metrics(row: dict[str, float], *beginnings: str) -> dict[str, float]:
    """The metrics of an epoch whose names begin so, without times and speeds."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith(beginnings) and not name.endswith(("_seconds", "_per_second"))
    }


def _words(metrics: dict[str, float]) -> list[str]:
    """Names with values; of many the first, and how many there are besides, which `metrics.csv` has."""
    words = [f"{name} {shown_value(value, 4)}" for name, value in metrics.items()]
    return words if len(words) <= _MOST_SHOWN else [*words[:_MOST_SHOWN], f"and {len(words) - _MOST_SHOWN} more"]


def shown_value(value: Any, digits: int) -> str:
    """Fixed digits where they are significant, else as few as a number needs; a text as it is."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.{digits}f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.{digits - 1}g}"


def _in_lines(parts: list[str], width: int) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Minutes and seconds, `1:05`, from an hour on with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
