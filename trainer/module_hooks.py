"""The hooks of `Module`, each of which does nothing until a subclass writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["ModuleHooks"]


class ModuleHooks:
    """What a module may write beside its steps; `super().on_...()` always finds something to call.

    A run calls only what is written, and keeps the outputs of steps only if there is a `*_epoch_end(outputs)`.
    """

    # ---- around a run

    def prepare_data(self) -> None:
        """Download and unpack, for loaders of the module; called once per node. Set no state here."""

    def configure_model(self) -> None:
        """Make layers that depend on the data, after `setup` and before `configure_optimizers`."""

    def setup(self, stage: str) -> None:
        """A stage starts; called on every process."""

    def teardown(self, stage: str) -> None:
        """A stage ends, also after an error; called on every process."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written: add to it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read, nothing has been restored yet."""

    def on_exception(self, exception: BaseException) -> None:
        """The run ends with an exception (Ctrl-C included)."""

    # ---- loaders, for a stage that is given none

    def train_dataloader(self) -> Any:
        """The loader to train on, or None."""

    def val_dataloader(self) -> Any:
        """The loader (or a list of them) to validate on, or None."""

    def test_dataloader(self) -> Any:
        """The loader (or a list of them) to test on, or None."""

    def predict_dataloader(self) -> Any:
        """The loader (or a list of them) to predict on, or None."""

    # ---- training

    def on_fit_start(self) -> None:
        """Optimizers exist, a checkpoint has been restored, nothing has run yet."""

    def on_fit_end(self) -> None:
        """After `on_train_end`: the last hook of a fit that ends well."""

    def on_sanity_check_start(self) -> None:
        """Before the few validation batches that run before training."""

    def on_sanity_check_end(self) -> None:
        """After the few validation batches, whose metrics are not kept."""

    def on_train_start(self) -> None:
        """Before the first epoch, after the sanity check."""

    def on_train_end(self) -> None:
        """After the last epoch, before best weights are put back."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of an epoch; what is frozen has been settled."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a batch; return -1 to skip the rest of the epoch."""

    def training_step_end(self, outputs: Any) -> Any:
        """Change what `training_step` returned; None leaves it."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before the backward pass; of an accumulation group, the loss is the batch's share."""

    def on_after_backward(self) -> None:
        """After the backward pass; of an accumulation group, gradients are the sum so far."""

    def on_before_optimizer_step(self, optimizer: Optimizer, *older: Any, **options: Any) -> None:
        """Before gradients are clipped and the optimizer steps; in Lightning 1.x also with the optimizer's number."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """After an optimizer's step, before its gradients are cleared."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch and, at the end of an accumulation group, the optimizer's step."""

    def training_epoch_end(self, outputs: list[Any]) -> None:
        """After an epoch, with what its steps returned; where there are several optimizers, a list for each batch."""

    def on_train_epoch_end(self) -> None:
        """After an epoch and its validation; its values so far are in `trainer.callback_metrics`."""

    def on_epoch_end(self) -> None:
        """After everything of an epoch: its values are in `trainer.callback_metrics` and in the log."""

    # ---- validation

    def on_validation_start(self) -> None:
        """Before validation; the module is in eval mode."""

    def on_validation_end(self) -> None:
        """After validation, whose metrics have been computed."""

    def on_validated(self) -> None:
        """After a validation inside an epoch; its row is in the log."""

    def on_validation_epoch_start(self) -> None:
        """Before the first batch, after `on_validation_start`."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a batch of validation, which is on the device."""

    def validation_step_end(self, outputs: Any) -> Any:
        """Change what `validation_step` returned; None leaves it."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a batch of validation; `outputs` is what `validation_step` returned."""

    def validation_epoch_end(self, outputs: list[Any]) -> None:
        """After the last batch, with what all steps returned; where there are several loaders, a list for each."""

    def on_validation_epoch_end(self) -> None:
        """After the last batch of validation; the last place to log values of the pass."""

    # ---- test

    def on_test_start(self) -> None:
        """Before a test; the module is in eval mode."""

    def on_test_end(self) -> None:
        """After a test, whose metrics have been computed."""

    def on_test_epoch_start(self) -> None:
        """Before the first batch, after `on_test_start`."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a batch of a test, which is on the device."""

    def test_step_end(self, outputs: Any) -> Any:
        """Change what `test_step` returned; None leaves it."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a batch of a test; `outputs` is what `test_step` returned."""

    def test_epoch_end(self, outputs: list[Any]) -> None:
        """After the last batch, with what all steps returned; where there are several loaders, a list for each."""

    def on_test_epoch_end(self) -> None:
        """After the last batch of a test; the last place to log values of the pass."""

    # ---- prediction

    def on_predict_start(self) -> None:
        """Before prediction; the module is in eval mode."""

    def on_predict_end(self) -> None:
        """After prediction."""

    def on_predict_epoch_start(self) -> None:
        """Before the first batch, after `on_predict_start`."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a batch of prediction, which is on the device."""

    def predict_step_end(self, outputs: Any) -> Any:
        """Change what `predict_step` returned; None leaves it."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a batch of prediction; `outputs` is what `predict_step` returned."""

    def predict_epoch_end(self, outputs: list[Any]) -> None:
        """After the last batch, with what all steps returned; where there are several loaders, a list for each."""

    def on_predict_epoch_end(self, *older: Any, **options: Any) -> None:
        """After the last batch of prediction; in Lightning 1.x also with all predictions."""
