"""`Module`: a model, its loss and its optimizers, as the engine trains them."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.trainer.hyperparameters import HyperparametersMixin
from flashtask.trainer.wrapping import keep_own_names, own_name, unwrapped

__all__ = ["Module"]


class Module(HyperparametersMixin, nn.Module):
    """An `nn.Module` with the steps of training. At least `training_step` and `configure_optimizers` must be written.

    Every `on_<moment>` of `Callback` can be written here too, without the arguments `trainer` and `module`.
    """

    _hparams_are_stored = True

    #: Set by the trainer for the length of a run.
    trainer: Any = None
    #: The metric by which checkpoints are ranked, and whether more is better (`max`) or less (`min`).
    monitor: str = "val_loss"
    monitor_mode: str = "min"
    #: What `Trainer(precision=None)` means for this module.
    default_precision: str = "32"
    #: What `Trainer(memory_format=None)` means for this module: `contiguous`, `channels_last` or `auto`.
    default_memory_format: str = "contiguous"
    #: What logs call a sample.
    sample_noun: str = "samples"

    def __init__(self) -> None:
        super().__init__()
        keep_own_names(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch: a scalar tensor, or a dictionary with `loss`; None skips the batch."""
        raise UsageError(f"{type(self).__name__} has no training_step", fix="def training_step(self, batch, batch_idx)")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """What is done with a batch of validation; usually logs metrics."""
        raise UsageError(f"{type(self).__name__} has no validation_step")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """What is done with a batch of a test; usually logs metrics."""
        raise UsageError(f"{type(self).__name__} has no test_step", fix="def test_step(self, batch, batch_idx)")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """What `Trainer.predict` collects for a batch: `forward`, unless you write something else."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """Optimizers and schedulers, in any form that `trainer.optimizers.read_optimizers` names."""
        raise UsageError(
            f"{type(self).__name__} has no configure_optimizers",
            fix="def configure_optimizers(self): return torch.optim.Adam(self.parameters())",
        )

    def connect(self, datamodule: Any) -> None:
        """Meet the data: called once per verb before `setup` and before optimizers are made."""

    def setup(self, stage: str) -> None:
        """A verb starts; called on every process."""

    def teardown(self, stage: str) -> None:
        """A verb ends."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written: add to it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read, nothing has been restored yet."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about the module beside its weights (a task: name, labels, preprocessing)."""
        return {}

    def recipe(self) -> dict[str, Any] | None:
        """The recipe's sections about the module, or None if it cannot be rebuilt from names and numbers."""
        return None

    def modules_to_freeze(self) -> list[nn.Module]:
        """What a finetuning strategy may freeze: the attribute `backbone`."""
        backbone = getattr(self, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise UsageError(
                f"a finetuning strategy needs to know what to freeze, and {type(self).__name__} has no `backbone`",
                fix="write modules_to_freeze(self) -> list of modules",
            )
        return [backbone]

    def layer_groups(self) -> list[list[str]]:
        """Names of the parameters of `modules_to_freeze()`, in groups from the input to the output.

        The default takes each child of a frozen module that has parameters as one group.
        """
        names = {id(parameter): own_name(name) for name, parameter in self.named_parameters()}
        groups = []
        for root in map(unwrapped, self.modules_to_freeze()):
            parts = list(root.children()) or [root]
            direct = [names[id(p)] for p in root.parameters(recurse=False)] if list(root.children()) else []
            groups += [direct, *([names[id(p)] for p in part.parameters()] for part in parts)]
        return [group for group in groups if group]

    def freeze(self) -> Self:
        """No gradients, and eval mode that training does not undo."""
        self.requires_grad_(False)
        self.eval()
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Gradients and train mode again."""
        self.requires_grad_(True)
        self._frozen = False
        self.train()
        return self

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that what `freeze()` froze stays in eval mode."""
        return super().train(mode and not getattr(self, "_frozen", False))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        first = next(self.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far in the fit run."""
        return self.trainer.global_step if self.trainer is not None else 0

    @property
    def current_epoch(self) -> int:
        """The epoch of the fit run, counted from 0."""
        return self.trainer.current_epoch if self.trainer is not None else 0

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str = "mean",
        batch_size: int | None = None,
    ) -> None:
        """Log a number, a scalar tensor or a torchmetrics object.

        Args:
            name: of the metric.
            value: epoch values are means weighted by batch size; a metric object is computed and reset for you.
            prog_bar: show it on the progress bar.
            logger: give it to the loggers.
            on_step: keep each step's value; the default depends on the hook.
            on_epoch: keep the value over the epoch; the default depends on the hook.
            reduce_fx: `mean`, `sum`, `max` or `min` over the epoch.
            batch_size: weight of the value; found from the batch if not given.

        Raises:
            UsageError: nothing can be logged here, or not like this.
        """
        if self.trainer is None:
            raise UsageError(f"log({name!r}) outside of a run", fix="log inside training_step or another hook")
        self.trainer.active_run.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, batch_size)

    def log_dict(self, values: dict[str, Any], **options: Any) -> None:
        """Log several values with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    @classmethod
    def rebuild(cls, arguments: dict[str, Any]) -> Self:
        """The module that takes a checkpoint's weights, from the constructor arguments that the checkpoint holds."""
        return cls(**arguments)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, strict: bool = True, **given: Any
    ) -> Self:
        """The module that a checkpoint holds, in eval mode; no data is needed and no code from the file runs.

        Args:
            checkpoint_path: of a file written by `save_checkpoint` or a run.
            map_location: device for the tensors.
            strict: every weight must be there and nothing else.
            given: constructor arguments; they win over the stored ones, and stand in for those that could not be
                stored.

        Raises:
            UsageError: an argument is needed that the file does not hold.
            IntegrityError: the file is damaged.
        """
        from flashtask.trainer.restoring import module_from_checkpoint

        module: Self = module_from_checkpoint(cls, checkpoint_path, map_location, strict, given)
        return module
