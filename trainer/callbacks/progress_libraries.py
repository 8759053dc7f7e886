"""Progress bars that tqdm and rich draw, with the methods that subclasses of Lightning's change."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.progress import BarState, ProgressBar, clock, shown_value

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from flashtask.trainer.trainer import Trainer

__all__ = ["RichProgressBar", "RichProgressBarTheme", "TQDMProgressBar"]


class TQDMProgressBar(ProgressBar):
    """A bar of tqdm: one for each epoch, validation, test and prediction.

    A subclass changes a bar where it is made: `init_train_tqdm`, `init_validation_tqdm` and so on return it.

    Args:
        refresh_rate: redraw only after every so many batches, and at most ten times a second; 0 draws no bar.
        process_position: draw it so many lines further down, below bars of a script.
        leave: let a bar stay when it is done.
        stream: where to write; standard error if not given.

    Raises:
        UsageError: tqdm is not installed; another refresh rate.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(
        self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False, stream: TextIO | None = None
    ) -> None:
        super().__init__(stream, refresh_rate)
        try:
            self._tqdm: Any = import_module("tqdm").tqdm
        except ImportError as error:
            raise UsageError("TQDMProgressBar needs tqdm, which is not installed", fix="pip install tqdm") from error
        self.process_position, self.leave = process_position, leave
        self._stage = ""
        self._bar: Any = None
        self._state: BarState | None = None

    def init_train_tqdm(self) -> Any:
        """A new bar for a training epoch; override it for another look."""
        return self._new_bar()

    def init_sanity_tqdm(self) -> Any:
        """The bar of the validation batches before training."""
        return self._new_bar(leave=False)

    def init_validation_tqdm(self) -> Any:
        """The bar of validation."""
        return self._new_bar()

    def init_test_tqdm(self) -> Any:
        """The bar of a test."""
        return self._new_bar()

    def init_predict_tqdm(self) -> Any:
        """The bar of prediction."""
        return self._new_bar()

    def init_pass_tqdm(self) -> Any:
        """The bar of a pass that computes features."""
        return self._new_bar(leave=False)

    def _new_bar(self, **options: Any) -> Any:
        assert self._state is not None, "a bar is made when it is drawn first"
        given: dict[str, Any] = {
            "desc": self._state.description,
            "total": self._state.total,
            "initial": self._state.done_before,
            "position": self.process_position,
            "leave": self.leave,
            "dynamic_ncols": True,
            "file": self.stream,
            "bar_format": self.BAR_FORMAT if self._state.total else None,
        }
        return self._tqdm(**{**given, **options})

    @property
    def train_progress_bar(self) -> Any:
        """The bar of the epoch, None while there is not one; so are the next three."""
        return self._bar_of("train")

    @property
    def val_progress_bar(self) -> Any:
        """The bar of validation."""
        return self._bar_of("validation", "sanity")

    @property
    def test_progress_bar(self) -> Any:
        """The bar of a test."""
        return self._bar_of("test")

    @property
    def predict_progress_bar(self) -> Any:
        """The bar of prediction."""
        return self._bar_of("predict")

    def _bar_of(self, *stages: str) -> Any:
        return self._bar if self._stage in stages else None

    def show(self, state: BarState) -> None:
        """Make the bar of the stage if it is not there, and redraw it."""
        if self._bar is None or self._stage != state.stage:
            self.clear()
            self._state, self._stage = state, state.stage
            self._bar = getattr(self, f"init_{state.stage}_tqdm")()
            self._bar.start_t = time.time() - state.seconds
        self._bar.n = state.done
        shown = {name: shown_value(value, 4) for name, value in state.metrics.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.refresh()

    def clear(self) -> None:
        """Close the bar and let go of it."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


@dataclass(frozen=True)
class RichProgressBarTheme:
    """Styles of rich, by part of a `RichProgressBar`.

    Args:
        description: of the words before the bar.
        progress_bar: of the part that is done.
        progress_bar_finished: of a bar that is full.
        progress_bar_pulse: of a bar without a known end.
        batch_progress: of the number of batches.
        time: of the time that is over and left.
        processing_speed: of the samples per second.
        metrics: of loss and metrics.
        metrics_text_delimiter: between two metrics.
    """

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "


class RichProgressBar(ProgressBar):
    """A bar of rich, in colours.

    A subclass chooses its columns in `configure_columns`.

    Args:
        refresh_rate: redraw only after every so many batches, and at most ten times a second; 0 draws no bar.
        leave: let a bar stay when it is done.
        theme: the styles of its parts.
        console_kwargs: arguments of rich's `Console`.
        stream: where to write; standard error if not given.

    Raises:
        UsageError: another refresh rate.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        super().__init__(stream, refresh_rate)
        self.leave, self.console_kwargs = leave, console_kwargs
        self.theme = RichProgressBarTheme() if theme is None else theme
        self._progress: Progress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._trainer: Trainer | None = None

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The columns, of `rich.progress`.

        `task.fields` has `batches`, `time`, `speed` and `metrics` as texts, and `state`, the `BarState`.
        """
        from rich.progress import BarColumn, TextColumn

        theme = self.theme
        styles: dict[str, Any] = {"complete_style": theme.progress_bar, "finished_style": theme.progress_bar_finished}
        parts = {"batches": theme.batch_progress, "time": theme.time, "speed": theme.processing_speed}
        texts = {"description": theme.description, **parts, "metrics": theme.metrics}
        columns = [
            TextColumn(
                "{task.description}" if name == "description" else f"{{task.fields[{name}]}}",
                style=style or "none",
                markup=False,
            )
            for name, style in texts.items()
        ]
        return [columns[0], BarColumn(pulse_style=theme.progress_bar_pulse, **styles), *columns[1:]]

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Keep the trainer, which `configure_columns` may read."""
        super().setup(trainer, module, stage)
        self._trainer = trainer

    def show(self, state: BarState) -> None:
        """Make the bar of the stage if it is not there, and redraw it."""
        progress = self._progress or self._begin()
        if self._task is None or self._task[0] != state.stage:
            if self._task is not None and not self.leave:
                progress.remove_task(self._task[1])
            fields: dict[str, Any] = dict.fromkeys(("batches", "time", "speed", "metrics"), "")
            fields |= {"total": state.total, "state": state}
            self._task = (state.stage, progress.add_task(state.description, **fields))
        left = "" if state.seconds_left is None else f" • {clock(state.seconds_left)} left"
        metrics = [f"{name} {shown_value(value, 4)}" for name, value in state.metrics.items()]
        progress.update(
            self._task[1],
            completed=state.done,
            batches=f"{state.done}/{state.total}" if state.total else f"{state.done} batches",
            time=f"{clock(state.seconds)}{left}",
            speed=f"{state.speed:.0f} {state.noun}/s",
            metrics=self.theme.metrics_text_delimiter.join(metrics),
            state=state,
            refresh=True,
        )

    def _begin(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress

        assert self._trainer is not None, "a bar is drawn in a run"
        options = {"file": self.stream, "force_terminal": True, "force_jupyter": False, **(self.console_kwargs or {})}
        columns = self.configure_columns(self._trainer)
        console = Console(**options)
        is_stderr = self.stream is sys.stderr
        redirected = {"redirect_stderr": is_stderr, "redirect_stdout": is_stderr and sys.stdout.isatty()}
        settings: dict[str, Any] = {"auto_refresh": False, "transient": not self.leave, **redirected}
        self._progress = Progress(*columns, console=console, **settings)
        self._progress.start()
        console.show_cursor(True)  # a process that is killed could not show it again
        return self._progress

    def clear(self) -> None:
        """Remove the bar, or with `leave` let it stay as it is."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
