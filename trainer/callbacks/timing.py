"""`Timer`: how long a run takes, and the end of a fit whose time is up."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Duration", "TimeLimit", "Timer", "read_duration"]

#: the stages that have a clock of their own
_STAGES = ("train", "validate", "test", "predict")
_PARTS = ("weeks", "days", "hours", "minutes", "seconds")

_UNITS = {"s": "seconds", "min": "minutes", "h": "hours"}

#: A length of time: `"90s"`, `"10min"`, `"1.5h"`, `"DD:HH:MM:SS"`, a timedelta, or its parts such as
#: `{"hours": 1, "minutes": 30}`.
Duration = str | timedelta | dict[str, float]


def read_duration(duration: Duration) -> timedelta:
    """A length of time from `"10min"`, `"DD:HH:MM:SS"`, a timedelta, or a dictionary such as `{"hours": 1}`.

    Raises:
        UsageError: anything else, or a length below zero.
    """
    found: Duration | None = duration
    if isinstance(duration, str):
        matched = re.fullmatch(r"(\d+):([01]\d|2[0-3]):([0-5]\d):([0-5]\d)", duration.strip())
        if matched is not None:
            days, hours, minutes, seconds = map(int, matched.groups())
            found = _length({"days": days, "hours": hours, "minutes": minutes, "seconds": seconds})
        elif (matched := re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", duration.strip())) is not None:
            found = _length({_UNITS[matched[2]]: float(matched[1])})
    elif isinstance(duration, dict):
        for part, value in duration.items():
            if part not in _PARTS:
                raise UnknownNameError("part of a duration", str(part), _PARTS)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise UsageError(f"a duration's {part} are a number, not {value!r}", fix=f'{{"{part}": 1}}')
        found = _length(duration)
    if not isinstance(found, timedelta) or found < timedelta(0):
        raise UsageError(
            f"{duration!r} is not a length of time",
            why='it is "90s", "10min", "1.5h", "DD:HH:MM:SS", a timedelta or a dictionary of its parts, not below zero',
            fix='"12h", or "00:12:00:00" for twelve hours',
        )
    return found


def _length(parts: dict[str, float]) -> timedelta | None:
    try:
        return timedelta(**parts)
    except (OverflowError, ValueError):  # infinite, NaN, or longer than a timedelta can be
        return None


class Timer(Callback):
    """Measures how long training, validation, test and prediction take, and ends a fit when its time is up.

    The time of training runs from `on_train_start` to `on_train_end`, validation within it included; what a resumed
    run had used before counts. A fit that is ended in the middle of an epoch keeps its place, so that it can be
    continued with more time.

    Args:
        duration: of training at the most: `"DD:HH:MM:SS"`, a timedelta, or a dictionary of its parts; zero ends the fit
            before its first step, None only measures.
        interval: look at the clock after each `step` or each `epoch`.
        verbose: print a line when the time is up.

    Raises:
        UsageError: an invalid argument.
    """

    def __init__(self, duration: Duration | None = None, interval: str = "step", verbose: bool = True) -> None:
        if interval not in ("step", "epoch"):
            raise UsageError(f'Timer(interval={interval!r}): "step" or "epoch" is needed', fix='interval="step"')
        self.duration = None if duration is None else read_duration(duration)
        self.interval, self.verbose = interval, verbose
        self._spent = dict.fromkeys(_STAGES, 0.0)
        self._started: dict[str, float] = {}
        self._stop_reason = ""

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that a stage (`train`, `validate`, `test`, `predict`) has taken so far."""
        if stage not in _STAGES:
            raise UnknownNameError("stage", stage, _STAGES)
        running = time.monotonic() - self._started[stage] if stage in self._started else 0.0
        return self._spent[stage] + running

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left of the duration, not below 0; None without one."""
        elapsed = self.time_elapsed(stage)
        return None if self.duration is None else max(0.0, self.duration.total_seconds() - elapsed)

    def state_dict(self) -> dict[str, Any]:
        """What has been used so far, and whether that ended the fit."""
        return {"elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}, "stop_reason": self._stop_reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self._spent |= state["elapsed"]
        self._stop_reason = state["stop_reason"]

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """The clocks of the stages that come now begin at zero."""
        for name in ("train", "validate") if stage == "fit" else (stage,):
            self._spent[name] = 0.0
            self._started.pop(name, None)
        if stage == "fit":
            self._stop_reason = ""

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """A fit whose time was up goes on if it is resumed with more of it; without, it ends at once."""
        run = trainer.current_fit
        if self._stop_reason and run.stop_reason == self._stop_reason and self.time_remaining() != 0:
            self._stop_reason = ""
            run.go_on()
        self._look(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the clock; the step that is being accumulated is still taken."""
        if self.interval == "step" and self._look(trainer):
            trainer.current_fit.leave()

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Look at the clock after an epoch."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> bool:
        """Whether the time is up; the first time, the fit is asked to stop."""
        if self.time_remaining() != 0:
            return False
        run = trainer.current_fit
        if not run.stop_reason:
            self._stop_reason = f"the time of {self.duration} is up"
            run.stop(self._stop_reason)
            if self.verbose:
                trainer.say(f"epoch {run.epoch}: stopping, {self._stop_reason}")
        return True

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of the stage that starts; the sanity check does not count."""
        if not trainer.sanity_checking:
            self._started[_stage_of(trainer)] = time.monotonic()

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Stop the clock of the stage that ends."""
        self._stop(_stage_of(trainer))

    on_validation_start = on_test_start = on_predict_start = on_train_start
    on_validation_end = on_test_end = on_predict_end = on_train_end

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """Stop the clocks of all stages, so that the time of a failed one counts."""
        for stage in _STAGES:
            self._stop(stage)

    def _stop(self, stage: str) -> None:
        self._spent[stage] = self.time_elapsed(stage)
        self._started.pop(stage, None)


def _stage_of(trainer: Trainer) -> str:
    stage = trainer.current_run.stage
    return "train" if stage == "fit" else stage


class TimeLimit(Timer):
    """The timer behind `Trainer(max_time=...)`; the user may add a `Timer` beside it."""

    @property
    def state_key(self) -> str:
        """Not that of a `Timer`, which may be there too."""
        return "max_time"
