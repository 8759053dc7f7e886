"""`DataModule`: where the data of a run comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from flashtask.core.errors import UsageError
from flashtask.trainer.hyperparameters import HyperparametersMixin
from flashtask.trainer.lightning1.older_arguments import ArgparseMixin

if TYPE_CHECKING:
    import torch

    from flashtask.core.files import PathLike
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["BatchTransfer", "DataModule", "GivenLoaders", "Loaders", "transfer_hooks"]


class BatchTransfer:
    """What is done with a batch on its way to the device; written in a data module or in a module."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; override it for types of your own."""
        from flashtask.trainer.batch_transfer import move_to_device

        return move_to_device(batch, device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch that is on the device, before a step takes it."""
        return batch


class DataModule(BatchTransfer, ArgparseMixin, HyperparametersMixin):
    """Loaders for each stage, and what has to happen before and after them.

    A stage is `fit`, `validate`, `test` or `predict`. Override what you need; a loader that is not there means that
    the stage has no data.
    """

    #: Set by the trainer for the length of a run; None outside of one.
    trainer: Trainer = None  # type: ignore[assignment]

    @property
    def augments_while_frozen(self) -> bool:
        """Whether training samples are changed at random even in an epoch in which the whole backbone is frozen."""
        return False

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **options: Any,
    ) -> Self:
        """A data module around datasets; training samples are shuffled unless they come from an `IterableDataset`.

        Args:
            train_dataset: a dataset, or a list or dictionary of datasets, each of which has a loader of its own.
            val_dataset: the same, as the other two.
            test_dataset: see `val_dataset`.
            predict_dataset: see `val_dataset`.
            batch_size: samples in a batch.
            num_workers: processes that load, for each loader.
            options: what the class itself takes.

        Raises:
            UsageError: the class cannot be made with these options.
        """
        try:
            inspect.signature(cls).bind(**options)
        except TypeError as error:
            raise UsageError(
                f"{cls.__name__}.from_datasets cannot make a {cls.__name__}: {error}",
                fix="DataModule.from_datasets(train_dataset=..., val_dataset=...)",
            ) from None
        made = cls(**options)
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for stage, dataset in given.items():
            if dataset is not None:
                make = partial(_loaders_of, dataset, stage == "train", batch_size, num_workers)
                setattr(made, f"{stage}_dataloader", make)
        return made

    def prepare_data(self) -> None:
        """Download and unpack; called once per node. Set no state here."""

    def setup(self, stage: str) -> None:
        """Make datasets; called on every process, before the loaders are asked for."""

    def teardown(self, stage: str) -> None:
        """Undo what `setup` did; called on every process."""

    def train_dataloader(self) -> Any:
        """The loader (or a list or dictionary of them) to train on, or None."""
        return None

    def val_dataloader(self) -> Any:
        """The loader (or a list or dictionary of them) to validate on, or None."""
        return None

    def test_dataloader(self) -> Any:
        """The loader (or a list or dictionary of them) to test on, or None."""
        return None

    def predict_dataloader(self) -> Any:
        """The loader (or a list or dictionary of them) to predict on, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume; stored in the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""

    def split_rows(self) -> Iterable[tuple[str, str]]:
        """Part and name of each sample of a split that was drawn, for `split.csv`; by default none was."""
        return ()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written: add to it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read, nothing has been restored yet."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: PathLike, **given: Any) -> Self:
        """A data module made with the hyper-parameters that the one of a run had saved, and with its state.

        Args:
            checkpoint_path: a file of a run, or its folder.
            given: constructor arguments; they win over the stored ones.

        Raises:
            MissingInputError: there is no such file.
            UsageError: an argument is needed that the file does not hold.
        """
        from flashtask.trainer.checkpoints.restoring import data_from_checkpoint

        return data_from_checkpoint(cls, checkpoint_path, given)

    def on_exception(self, exception: BaseException) -> None:
        """The run ends with an exception, which is raised after this (Ctrl-C included)."""


def _loaders_of(dataset: Any, shuffles: bool, batch_size: int, num_workers: int) -> Any:
    """A loader, or a list or dictionary of loaders, in the structure of the datasets."""
    from torch.utils.data import DataLoader, IterableDataset

    if isinstance(dataset, Mapping):
        return {name: _loaders_of(one, shuffles, batch_size, num_workers) for name, one in dataset.items()}
    if isinstance(dataset, (list, tuple)):
        return [_loaders_of(one, shuffles, batch_size, num_workers) for one in dataset]
    shuffle = shuffles and not isinstance(dataset, IterableDataset)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)


#: What a verb takes as data: a loader, any other iterable of batches, a structure of loaders, or a data module.
Loaders = Iterable[Any] | Mapping[str, Any] | DataModule


class GivenLoaders(DataModule):
    """Loaders that were passed to a stage; what was not passed is asked of the module, if it has such a method."""

    def __init__(self, module: Module, **given: Any) -> None:
        self._module, self._given = module, given

    def prepare_data(self) -> None:
        """The module's own, for loaders of its own."""
        self._module.prepare_data()

    def has(self, stage: str) -> bool:
        """Whether a loader was passed for `train`, `val`, `test` or `predict`."""
        return self._given.get(stage) is not None

    def given(self, stage: str) -> Any:
        """The loader that was passed for a stage, or None."""
        return self._given.get(stage)

    def _loader(self, stage: str) -> Any:
        loader = self._given.get(stage)
        return getattr(self._module, f"{stage}_dataloader")() if loader is None else loader

    def train_dataloader(self) -> Any:
        """The loader that the trainer was given, else the module's own."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """The loader that the trainer was given, else the module's own."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """The loader that the trainer was given, else the module's own."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """The loader that the trainer was given, else the module's own."""
        return self._loader("predict")


def transfer_hooks(data: DataModule, module: Module) -> tuple[Any, Any, Any]:
    """The hooks around moving a batch: those that the data module overrides, else the module's, else None."""
    found: list[Any] = []
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        empty = getattr(BatchTransfer, name)
        own = (getattr(owner, name) for owner in (data, module) if getattr(type(owner), name) is not empty)
        found.append(next(own, None))
    before, move, after = found
    return before, move, after
