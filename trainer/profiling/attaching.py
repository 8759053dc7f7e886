"""A profiler at a run: what the run calls is replaced by the same with a watch around it. Without one nothing is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.profiling.profilers import PassThrough, Profiler
from flashtask.trainer.run import EvaluationRun

__all__ = ["attach", "profiling"]

#: method of a fit run, of its precision -> what the action is called
_OF_A_FIT = {
    "training_step": "training_step",
    "to_device": "batch_to_device",
    "clip_gradients": "clip_gradients",
    "count_step": "schedules_and_logs",
    "close_epoch": "values_of_epoch",
}
_OF_PRECISION = {"backward": "backward", "unscale": "unscale", "step": "optimizer_step", "update": "scale_update"}


@contextmanager
def profiling(profiler: Profiler, run: Any) -> Iterator[None]:
    """Watch a prepared run for the length of the block, and report at its end, also after an error.

    A verb in a hook of another is a part of that one's profile.
    """
    if isinstance(profiler, PassThrough):
        yield
        return
    if profiler.filename is not None:
        profiler.folder(run)  # an error before the run, not after it
    is_outermost = profiler.depth == 0
    attach(profiler, run)
    if is_outermost:
        profiler.begin(run)
    profiler.depth += 1
    try:
        yield
    finally:
        profiler.depth -= 1
        if is_outermost:
            profiler.end(run)
            if run.trainer.is_global_zero:
                profiler.report(run)


def attach(profiler: Profiler, run: Any) -> None:
    """Put a watch around every hook, step, part of a step and fetched batch of a prepared run."""
    for moment, calls in run.listeners.items():
        run.listeners[moment] = tuple(_watched(profiler, call, _name_of(call, moment)) for call in calls)
    if isinstance(run, EvaluationRun):
        _attach_to_evaluation(profiler, run)
        return
    assert isinstance(run, FitRun)
    for name, action in _OF_A_FIT.items():
        setattr(run, name, _watched(profiler, getattr(run, name), action))
    methods = {name: _watched(profiler, getattr(run.precision, name), a) for name, a in _OF_PRECISION.items()}
    run.precision = _Watched(run.precision, **methods)  # type: ignore[assignment]
    run.loader = _WatchedLoader(run.loader, profiler, "train_batch")
    for nested in (run.validation, run.sanity):
        if nested is not None:
            _attach_to_evaluation(profiler, nested)


def _attach_to_evaluation(profiler: Profiler, run: EvaluationRun) -> None:
    for name, action in (("step", f"{run.word}_step"), ("to_device", "batch_to_device")):
        setattr(run, name, _watched(profiler, getattr(run, name), action))
    run.loaders = [_WatchedLoader(loader, profiler, f"{run.word}_batch") for loader in run.loaders]


def _watched(profiler: Profiler, call: Callable[..., Any], action: str) -> Callable[..., Any]:
    def watched(*arguments: Any, **named: Any) -> Any:
        with profiler.profile(action):
            return call(*arguments, **named)

    return watched


def _name_of(call: Callable[..., Any], moment: str) -> str:
    """`on_train_batch_end of ProgressBar`, `validation_epoch_end of Net`."""
    method = call.func if isinstance(call, partial) else call
    name = method.__name__ if moment.endswith("_outputs") else f"on_{moment}"
    owner = getattr(method, "__self__", None)
    return f"{name} of {'a function' if owner is None else type(owner).__name__}"


class _Watched:
    """An object some of whose methods are watched; everything else is its own."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner = inner
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_inner"), name)


class _WatchedLoader(_Watched):
    """A loader the fetching of whose batches is watched; its start, where workers are made, under a name of its own."""

    def __init__(self, inner: Any, profiler: Profiler, action: str) -> None:
        super().__init__(inner)
        self._profiler, self._action = profiler, action

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        with self._profiler.profile(f"{self._action}_loader_start"):
            batches = iter(self._inner)
        end = object()
        while True:
            with self._profiler.profile(self._action):
                batch = next(batches, end)
            if batch is end:
                return
            yield batch
