"""`Tuner`: the finders of `trainer.tune` under the names that Lightning 2 has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashtask.core.files import PathLike
from flashtask.core.keywords import named_arguments
from flashtask.trainer.tuning.learning_rate_curve import LearningRateCurve
from flashtask.trainer.tuning.learning_rate_finder import learning_rate_of

if TYPE_CHECKING:
    from flashtask.trainer.datamodule import DataModule, Loaders
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["FoundRate", "Tuner"]


@dataclass(frozen=True)
class FoundRate:
    """What `Tuner.lr_find` saw.

    Args:
        curve: rates and losses of all steps.
    """

    curve: LearningRateCurve

    @property
    def results(self) -> dict[str, list[float]]:
        """`lr` and `loss` of each step."""
        return {"lr": list(self.curve.rates), "loss": list(self.curve.losses)}

    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls most steeply."""
        return self.curve.suggestion

    def plot(self, path: PathLike) -> None:
        """Write a picture of the curve, as `LearningRateCurve.plot`."""
        self.curve.plot(path)


class Tuner:
    """Finds a learning rate or a batch size by short trial runs; the same as `trainer.tune`, which finds both at once.

    Args:
        trainer: whose settings the trial runs have.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        update_attr: bool = True,
        attr_name: str = "",
        **options: Any,
    ) -> FoundRate:
        """Find a learning rate and, unless `update_attr` is false, set it on the module.

        Loaders are those of `trainer.tune`, options those of `RangeTest`, such as `min_lr` and `num_training`.

        Raises:
            UsageError: the loss does not fall at any rate, or the module has no learning rate.
        """
        rate = learning_rate_of(model, attr_name or None)
        before, loaders = rate.value, (train_dataloaders, val_dataloaders, datamodule)
        test = {**options, "attribute": attr_name or None}
        found = self.trainer.tune(model, *loaders, learning_rate=test, batch_size=False)
        if not update_attr:
            rate.give(before)
        assert found.learning_rate is not None
        return FoundRate(found.learning_rate)

    @named_arguments
    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Loaders | None = None,
        val_dataloaders: Loaders | None = None,
        datamodule: DataModule | None = None,
        mode: str = "power",
        max_val: int = 8192,
        batch_arg_name: str = "batch_size",
    ) -> int:
        """Find a batch size that fits into memory, and set it on the module or its data.

        Arguments are those of `trainer.tune` and of `BatchSizeOptions`, where `max_val` is called `max_batch_size` and
        `batch_arg_name` `attribute`.

        Raises:
            UsageError: neither the module nor the data has such a number.
            OutOfMemoryError: not even small batches fit.
        """
        options: dict[str, Any] = {"mode": mode, "max_batch_size": max_val, "attribute": batch_arg_name}
        loaders = (train_dataloaders, val_dataloaders, datamodule)
        found = self.trainer.tune(model, *loaders, learning_rate=False, batch_size=options)
        assert found.batch_size is not None
        return found.batch_size.batch_size
