"""A profiler at a run: an extension that puts a watch around what the run calls. Without a profiler there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from flashtask.trainer.profiling.profilers import PassThrough, Profiler
from flashtask.trainer.run_extension import RunExtension, Wrapped

if TYPE_CHECKING:
    from flashtask.trainer.run import Run

__all__ = ["profiling"]

#: names of parts that are unclear in a profile -> what the action is called
_ACTIONS = {
    "to_device": "batch_to_device",
    "count_step": "schedules_and_logs",
    "close_epoch": "values_of_epoch",
}
#: parts that a profile leaves out
_TOO_SMALL = ("finish_pass",)


@contextmanager
def profiling(profiler: Profiler, run: Run) -> Iterator[None]:
    """Watch a prepared run for the length of the block, and report at its end, also after an error.

    A stage in a hook of another is a part of that one's profile.
    """
    if isinstance(profiler, PassThrough):
        yield
        return
    if profiler.filename is not None:
        profiler.folder(run)  # an error before the run, not after it
    is_outermost = profiler.depth == 0
    run.extend(_Watch(profiler))
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


class _Watch(RunExtension):
    """A watch around every hook, step, part of a step and fetched batch."""

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The action has the name of the part, or a clearer one."""
        return call if name in _TOO_SMALL else _watched(self.profiler, call, _ACTIONS.get(name, name))

    def wrap_listener(self, run: Run, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The action is named after the hook and its owner."""
        return _watched(self.profiler, call, _name_of(call, hook))

    def wrap_loader(self, run: Run, loader: Any) -> Any:
        """The fetching of batches, and the start of the loader."""
        return _WatchedLoader(loader, self.profiler, f"{run.word}_batch")


def _watched(profiler: Profiler, call: Callable[..., Any], action: str) -> Callable[..., Any]:
    def watched(*arguments: Any, **named: Any) -> Any:
        with profiler.profile(action):
            return call(*arguments, **named)

    return watched


def _name_of(call: Callable[..., Any], hook: str) -> str:
    """`on_train_batch_end of ProgressBar`, `validation_epoch_end of Net`."""
    method = call.func if isinstance(call, partial) else call
    name = method.__name__ if hook.endswith("_outputs") else f"on_{hook}"
    owner = getattr(method, "__self__", None)
    return f"{name} of {'a function' if owner is None else type(owner).__name__}"


class _WatchedLoader(Wrapped):
    """A loader whose fetching of batches is watched; its start, which makes workers, is an action of its own."""

    def __init__(self, inner: Any, profiler: Profiler, action: str) -> None:
        super().__init__(inner, {})
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
