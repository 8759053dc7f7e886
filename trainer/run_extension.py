"""What takes part in a run beyond hooks: `RunExtension` may wrap the functions, hooks and loaders that a run uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashtask.trainer.run import Run

__all__ = ["RunExtension", "Wrapped"]


class RunExtension:
    """Base of what takes part in a run where hooks do not reach: a profiler, a range test, a measurement.

    `run.extend(extension)` hands it the parts of a run that has been prepared; what a method returns takes the part's
    place. A callback that derives from this class too is applied by itself, before the first hook.
    """

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that the loop calls.

        Args:
            run: the fit run or, for `validation_step` and its like, the evaluation run.
            name: `training_step`, `validation_step`, `test_step`, `predict_step`, `to_device`, `backward`, `unscale`,
                `clip_gradients`, `optimizer_step`, `zero_grad`, `scale_update`, `count_step`, `scheduler_step`,
                `finish_pass` or `close_epoch`.
            call: what is called now.
        """
        return call

    def wrap_listener(self, run: Run, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of a callback or of the module."""
        return call

    def wrap_loader(self, run: Run, loader: Any) -> Any:
        """What the batches of a run come from."""
        return loader


class Wrapped:
    """An object some of whose methods are replaced; everything else is its own."""

    def __init__(self, inner: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._inner = inner
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_inner"), name)
