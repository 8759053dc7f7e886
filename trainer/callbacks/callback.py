"""`Callback`: code beside the loop, as a class or, with `LambdaCallback`, as plain functions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.by_name import NamedPart

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Callback", "LambdaCallback", "keeps_state", "state_name"]


class Callback(NamedPart):
    """Base of callbacks: every hook is empty; `trainer` and the module are its first arguments.

    State that must survive a resume goes through `state_dict` and `load_state_dict`; it is stored under `state_key`.
    """

    #: Its hooks are called after those of the module and all other callbacks: for writing down the state they leave.
    comes_last = False
    #: Whether a recipe names it; not one that the command which runs the recipe adds.
    in_recipe = True
    #: The module of the run, set for the length of it.
    logs_for: Module | None = None

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Log a value as `Module.log` does, with the same options; outside of a run it is ignored with a warning."""
        if self.logs_for is None:
            warnings.warn(f"log({name!r}) outside of a run is ignored", stacklevel=2)
        else:
            self.logs_for.log(name, value, **options)

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """Log several values with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    @property
    def state_key(self) -> str:
        """The name that the callback's state has in a checkpoint; make it unique if you use two of a class."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, in a run that is resumed."""

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """A stage starts; the data module has been set up."""

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """A stage ends, also after an error."""

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Optimizers exist, a checkpoint has been restored, nothing has run yet."""

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """After `on_train_end`: the last hook of a fit that ends well."""

    def on_sanity_check_start(self, trainer: Trainer, module: Module) -> None:
        """Before the few validation batches that run before training."""

    def on_sanity_check_end(self, trainer: Trainer, module: Module) -> None:
        """After the few validation batches, whose metrics are not kept."""

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first epoch, after the sanity check."""

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """After the last epoch, before best weights are put back."""

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch of an epoch; what is frozen has been settled."""

    def on_validated(self, trainer: Trainer, module: Module) -> None:
        """After a validation inside an epoch (`val_check_interval`): between two steps, its values are in the log."""

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After an epoch and its validation, before the epoch's values are collected."""

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After everything of an epoch: its values are in `trainer.callback_metrics` and in the log."""

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> int | None:
        """Before a batch; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch and, at the end of an accumulation group, the optimizer's step."""

    def on_before_zero_grad(self, trainer: Trainer, module: Module, optimizer: Optimizer) -> None:
        """After an optimizer's step, before its gradients are cleared."""

    def on_before_backward(self, trainer: Trainer, module: Module, loss: Tensor) -> None:
        """Before the backward pass; of an accumulation group, the loss is the batch's share."""

    def on_after_backward(self, trainer: Trainer, module: Module) -> None:
        """After the backward pass; of an accumulation group, gradients are the sum so far."""

    def on_before_optimizer_step(
        self, trainer: Trainer, module: Module, optimizer: Optimizer, *older: Any, **options: Any
    ) -> None:
        """Before gradients are clipped and the optimizer steps; in Lightning 1.x also with the optimizer's number."""

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Before validation; the module is in eval mode."""

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        """After validation; its metrics are in `trainer.callback_metrics`."""

    def on_validation_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch of validation, after `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last batch of validation; the last place to log values of the pass."""

    def on_validation_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch of validation, which is on the device."""

    def on_validation_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a batch of validation; `outputs` is what `validation_step` returned."""

    def on_test_start(self, trainer: Trainer, module: Module) -> None:
        """Before a test; the module is in eval mode."""

    def on_test_end(self, trainer: Trainer, module: Module) -> None:
        """After a test, whose metrics have been computed."""

    def on_test_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch of a test, after `on_test_start`."""

    def on_test_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After the last batch of a test; the last place to log values of the pass."""

    def on_test_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch of a test, which is on the device."""

    def on_test_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a batch of a test; `outputs` is what `test_step` returned."""

    def on_predict_start(self, trainer: Trainer, module: Module) -> None:
        """Before prediction; the module is in eval mode."""

    def on_predict_end(self, trainer: Trainer, module: Module) -> None:
        """After prediction, after `on_predict_epoch_end`."""

    def on_predict_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Before the first batch of prediction, after `on_predict_start`."""

    def on_predict_epoch_end(self, trainer: Trainer, module: Module, *older: Any, **options: Any) -> None:
        """After the last batch, when the outputs of all processes are together; in Lightning 1.x also with them."""

    def on_predict_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a batch of prediction, which is on the device."""

    def on_predict_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a batch of prediction; `outputs` is what `predict_step` returned."""

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """The run ends with an exception (Ctrl-C included)."""

    def on_save_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written: add to it."""

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read, nothing has been restored yet."""


def keeps_state(callback: Callback) -> bool:
    """Whether a callback writes its own `state_dict`, and so has a place in checkpoints."""
    return getattr(callback.state_dict, "__func__", None) is not Callback.state_dict


def state_name(callback: Callback) -> str:
    """The name that a callback's state has in a checkpoint; a key may be a class, as in Lightning 1.4."""
    key: object = callback.state_key
    return key.__qualname__ if isinstance(key, type) else str(key)


#: Names of the hooks of `Callback`.
_HOOKS = tuple(
    name
    for name, member in vars(Callback).items()
    if inspect.isfunction(member) and (name.startswith("on_") or name in ("setup", "teardown"))
)


class LambdaCallback(Callback):
    """Calls functions as hooks: `LambdaCallback(on_train_start=lambda trainer, module: print("go"))`.

    Args:
        functions: for each hook of `Callback` by its name, a function with the hook's arguments.

    Raises:
        UnknownNameError: `Callback` has no hook of this name.
        UsageError: a value that is not a function.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            if name not in _HOOKS:
                raise UnknownNameError("hook of a callback", name, _HOOKS)
            if not callable(function):
                raise UsageError(
                    f"LambdaCallback({name}={function!r}): a function is needed",
                    fix=f"{name}=lambda {', '.join(_arguments(name))}: ...",
                )
            setattr(self, name, function)


def _arguments(name: str) -> list[str]:
    _, *arguments = inspect.signature(getattr(Callback, name)).parameters
    return arguments
