"""Profilers: where the time of a run goes, by action (`training_step`, each hook), function or operation."""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashtask.core.errors import OutputError, UsageError
from flashtask.core.files import PathLike, atomic_write_text
from flashtask.core.registry import Registry
from flashtask.trainer.by_name import Named, NamedPart, make_parts
from flashtask.trainer.text_table import text_table

if TYPE_CHECKING:
    from flashtask.trainer.run import Run

__all__ = ["PROFILERS", "AdvancedProfiler", "PassThrough", "Profiler", "PyTorchProfiler", "SimpleProfiler"]
__all__ += ["resolve_profiler"]

PROFILERS: Registry[Any] = Registry("profiler")

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Profiler(NamedPart):
    """Base of profilers: follows the actions of a stage, and prints a report at its end or writes it to a file.

    It sees a run from its first hook to its last, not how it is prepared. Parts of your own are actions too:
    `with self.trainer.profiler.profile("augment"): ...` in a module.

    Args:
        dirpath: folder of the report; None means the run folder, or `default_root_dir` where there is none.
        filename: of the report. Without one the report goes to standard error or, if there is a `dirpath`, written to
            `profile.txt` there.
    """

    dirpath: Path | None = None
    filename: str | None = None
    #: runs that it watches now: a stage that is called in a hook of another belongs to that one
    depth = 0
    _written: frozenset[Path] = frozenset()

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = "profile.txt" if filename is None and dirpath is not None else filename

    def begin(self, run: Run) -> None:
        """A stage starts: forget an earlier one."""

    def end(self, run: Run) -> None:
        """A stage ends, also with an error; `summary` is asked for after it."""

    def start(self, action: str) -> None:
        """An action starts, perhaps inside of another."""

    def stop(self, action: str) -> None:
        """The action that was started last under this name is over."""

    @contextmanager
    def profile(self, action: str) -> Iterator[None]:
        """Everything in the block is this action."""
        self.start(action)
        try:
            yield
        finally:
            self.stop(action)

    def summary(self) -> str:
        """What was found, in lines of at most 80 characters; empty if there is nothing to show."""
        return ""

    def report(self, run: Run) -> None:
        """Print the summary, or append it to the file, which has one for each stage of a trainer.

        Raises:
            OutputError: the folder cannot be made.
            StorageError: the file cannot be written.
        """
        text = self.summary()
        if not text:
            return
        text = f"profile of {run.stage}\n{text}"
        if self.filename is None:
            run.trainer.say(text)
            return
        path = self.folder(run) / self.filename
        before = path.read_text(encoding="utf-8") + "\n" if path in self._written else ""
        atomic_write_text(path, f"{before}{text}\n")
        self._written |= {path}

    def folder(self, run: Run) -> Path:
        """The folder of what is written; it is made if it is not there.

        Raises:
            OutputError: it cannot be made.
        """
        own = run.trainer.run_folder
        folder = self.dirpath or Path(run.trainer.default_root_dir if own is None else own.path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {folder}: {error.strerror}", fix="another dirpath") from error
        return folder


class PassThrough(Profiler):
    """What `trainer.profiler` is where none was asked for: it does nothing, and a run is left as it is."""


@PROFILERS.register("simple", description="calls and time of each action")
class SimpleProfiler(Profiler):
    """Counts the calls of each action and measures their time, that of actions inside of them included.

    A GPU works behind the CPU: what is measured there is the time in which work is queued for it.
    """

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None) -> None:
        super().__init__(dirpath, filename)
        self._reset()

    def begin(self, run: Run) -> None:
        """Begin a stage with empty records."""
        self._reset()

    def _reset(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        #: seconds of each action, and of the whole stage
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0
        self._started: dict[str, list[float]] = defaultdict(list)
        self._began = time.perf_counter()

    def end(self, run: Run) -> None:
        """Note how long the whole stage took."""
        self.total = time.perf_counter() - self._began

    def start(self, action: str) -> None:
        """Note the time at which the action started."""
        self._started[action].append(time.perf_counter())

    def stop(self, action: str) -> None:
        """Look at the clock again.

        Raises:
            UsageError: nothing of this name was started.
        """
        now = time.perf_counter()
        if not self._started[action]:
            raise _not_started(action)
        self.seconds[action] += now - self._started[action].pop()
        self.calls[action] += 1

    def summary(self) -> str:
        """A table of all actions, the longest first."""
        total = self.total or time.perf_counter() - self._began
        rows = [("whole run", "1", f"{total:.3f}", f"{total * 1e3:.3f}", "100.0 %")]
        for action in sorted(self.seconds, key=lambda name: -self.seconds[name]):
            calls, spent = self.calls[action], self.seconds[action]
            rows.append((action, str(calls), f"{spent:.3f}", f"{spent / calls * 1e3:.3f}", f"{spent / total:.1%}"))
        return text_table(("action", "calls", "total s", "mean ms", "share"), rows)


@PROFILERS.register("advanced", description="time of each Python function")
class AdvancedProfiler(Profiler):
    """Python's own profiler, around the whole stage; it makes every call slower.

    Args:
        dirpath, filename: as `Profiler` takes them.
        rows: functions in the table, those that took longest by themselves.
    """

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None, rows: int = 30) -> None:
        super().__init__(dirpath, filename)
        self.rows, self._profile = rows, cProfile.Profile()

    def begin(self, run: Run) -> None:
        """Begin a stage with empty records."""
        self._profile = cProfile.Profile()
        self._profile.enable()

    def end(self, run: Run) -> None:
        """Stop recording, at the end of a stage."""
        self._profile.disable()

    def summary(self) -> str:
        """A table of the functions with the most time of their own."""
        found = pstats.Stats(self._profile).stats.items()  # type: ignore[attr-defined]
        rows = [
            (f"{name} {'/'.join(Path(file).parts[-2:])}:{line}", str(calls), f"{own:.3f}", f"{total:.3f}")
            for (file, line, name), (_, calls, own, total, _) in sorted(found, key=lambda item: -item[1][2])
        ]
        return text_table(("function", "calls", "own s", "total s"), rows[: self.rows])


@PROFILERS.register("pytorch", description="time of each operation, and a trace of them")
class PyTorchProfiler(Profiler):
    """torch's profiler: operations on CPU and GPU, in a table and as a trace for chrome://tracing or ui.perfetto.dev.

    The trace is `profile.json` (for another stage than `fit`: `profile-test.json`) in `dirpath` or the run folder.

    Args:
        dirpath, filename: as `Profiler` takes them.
        steps: recording ends after so many steps of training and evaluation: every operation is kept until then.
        rows: operations in the table, those that took longest by themselves.
    """

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        steps: int = 100,
        rows: int = 20,
    ) -> None:
        super().__init__(dirpath, filename)
        self.steps, self.rows = steps, rows
        self._profile: torch.profiler.profile | None = None
        self._records: dict[str, list[Any]] = defaultdict(list)

    def begin(self, run: Run) -> None:
        """Record the operations of CPU and GPU from here on."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if run.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # torch's recorder would else print that there is no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = torch.profiler.profile(activities=kinds)
        self._left, self._is_recording = self.steps, True
        self._profile.start()

    def end(self, run: Run) -> None:
        """End the recording, if it has not ended yet."""
        self._stop()

    def _stop(self) -> None:
        assert self._profile is not None
        if self._is_recording:
            self._is_recording = False
            self._profile.stop()

    def start(self, action: str) -> None:
        """Name what is recorded from here on; a step too many ends the recording."""
        if action in _STEPS and self._profile is not None:
            if not self._left:
                self._stop()
            self._left -= 1
        record: Any = torch.profiler.record_function(action)
        record.__enter__()
        self._records[action].append(record)

    def stop(self, action: str) -> None:
        """The named part is over.

        Raises:
            UsageError: nothing of this name was started.
        """
        if not self._records[action]:
            raise _not_started(action)
        self._records[action].pop().__exit__(None, None, None)

    def summary(self) -> str:
        """A table of the operations with the most time of their own."""
        assert self._profile is not None
        found = self._profile.key_averages()
        on_gpu = any(one.self_device_time_total for one in found)
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = [
            (one.key, str(one.count), f"{one.self_cpu_time_total / 1e3:.3f}", f"{one.self_device_time_total / 1e3:.3f}")
            for one in sorted(found, key=lambda one: -getattr(one, spent))
        ]
        heads = ("operation", "calls", "own CPU ms", "own GPU ms")[: 4 if on_gpu else 3]
        return text_table(heads, [row[: len(heads)] for row in rows[: self.rows]])

    def report(self, run: Run) -> None:
        """The table, and the trace where there is a folder for it."""
        super().report(run)
        assert self._profile is not None
        if self.dirpath is None and run.trainer.run_folder is None:
            run.trainer.say("no trace is written: there is no run folder; PyTorchProfiler(dirpath=...) names another")
            return
        path = self.folder(run) / ("profile.json" if run.stage == "fit" else f"profile-{run.stage}.json")
        self._profile.export_chrome_trace(str(path))
        run.trainer.say(f"trace of {run.stage}: {path}")


def _not_started(action: str) -> UsageError:
    return UsageError(f"profiler.stop({action!r}): it was not started", fix=f"with profiler.profile({action!r}): ...")


def resolve_profiler(profiler: Profiler | Named | None) -> Profiler:
    """The profiler that a name (`simple`, `advanced`, `pytorch`), a name with options or an object means.

    None is one that does nothing.

    Raises:
        UnknownNameError: no profiler has this name.
        UsageError: no profiler at all.
    """
    if profiler is None:
        return PassThrough()
    needed = UsageError(f"profiler={profiler!r}: a name or a Profiler is needed", fix='profiler="simple"')
    given = profiler.lower() if isinstance(profiler, str) else profiler
    made: list[Profiler] = make_parts(given, PROFILERS, Profiler, "profiler", needed)
    if len(made) != 1:
        raise needed
    return made[0]
