"""Datasets of others, of torch, torchvision or Hugging Face, as pictures and targets.

Targets are taken from what a dataset says of itself (`targets`, a column, the tensors of a `TensorDataset`); only a
dataset that says nothing is gone through once. Pictures are made by the dataset's items when they are needed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, Subset, TensorDataset

from flashtask.core.errors import BadDataError, FlashtaskError, UsageError
from flashtask.data.image_source import MemoryImages

__all__ = ["DatasetPart", "Items", "read_dataset"]

_IMAGE_KEYS = ("image", "img", "input", "pixel_values", "jpg", "png")
_TARGET_KEYS = ("label", "target", "labels", "targets", "cls")


class Items(Protocol):
    """A dataset with a length whose items are got by their place, as those of torch and Hugging Face."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


@dataclass(frozen=True)
class DatasetPart:
    """What a dataset holds.

    Args:
        images: the pictures, made when they are asked for.
        targets: one each; None for a dataset without targets.
        labels: names of the classes, which the targets are numbers of; None if it does not say.
    """

    images: Sequence[Any]
    targets: Any
    labels: tuple[str, ...] | None


class _Images(Sequence[Any]):
    """The pictures of a dataset, read by one thread at a time: the code is the user's."""

    def __init__(self, dataset: Any, field: str | None) -> None:
        self._dataset, self._field, self._lock = dataset, field, threading.Lock()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Any) -> Any:
        with self._lock:
            item = self._dataset[place]
        if isinstance(item, Mapping):
            return item[_key_of(item, self._field, _IMAGE_KEYS, "input_field")]
        return item[0] if isinstance(item, (tuple, list)) else item

    def __reduce__(self) -> tuple[Any, ...]:
        return _Images, (self._dataset, self._field)  # a lock stays in its process


def read_dataset(
    dataset: Any, argument: str, input_field: str | None, target_field: str | None, *, has_targets: bool
) -> DatasetPart:
    """The pictures and targets of a dataset.

    Args:
        dataset: has `__len__` and `__getitem__`; an item is (image, target), a mapping, or an image for prediction.
        argument: that gave it, such as `train_dataset`.
        input_field: the key of the image, for items that are mappings; by default one of the usual names.
        target_field: the key of the target.
        has_targets: whether targets are needed.

    Raises:
        UsageError: it has no length or items, or its items are not images with targets.
        BadDataError: an item differs from one reading to the next.
    """
    has_items = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (IterableDataset, str, bytes)) or not has_items:
        raise UsageError(
            f"{argument} must be a dataset with a length and items, not {type(dataset).__name__}",
            fix="trainer.finetune(model, DataLoader(...)), which takes any loader",
        )
    if not len(dataset):
        raise BadDataError(f"{argument} is empty")
    images = _Images(dataset, input_field)
    _require_fixed(images, argument)
    if not has_targets:
        return DatasetPart(images, None, None)
    targets, labels = _whole_targets(dataset, target_field)
    if targets is None:
        targets = [_target_at(dataset, place, target_field, argument) for place in range(len(dataset))]
    return DatasetPart(images, targets, labels)


def _require_fixed(images: Sequence[Any], argument: str) -> None:
    one, two = (MemoryImages({argument: images}).hashes([f"{argument}[0]"]) for _ in range(2))
    if one != two:
        raise BadDataError(
            f"{argument}: the first image differs from one reading to the next",
            why="a dataset with random transforms cannot be checked, cached or resumed",
            fix="give it without transforms, and these as augment=..., or wrap it in flashtask.seeded and a DataLoader",
        )


def _whole_targets(dataset: Any, target_field: str | None) -> tuple[Any, tuple[str, ...] | None]:
    """The targets and names of classes that a dataset gives as a whole; None for what it does not."""
    if isinstance(dataset, Subset):
        targets, labels = _whole_targets(dataset.dataset, target_field)
        places = list(dataset.indices)
        if targets is None:
            return None, labels
        return targets[places] if hasattr(targets, "shape") else [targets[place] for place in places], labels
    if isinstance(dataset, TensorDataset):
        return (dataset.tensors[1], None) if len(dataset.tensors) > 1 else (None, None)
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, (list, tuple)):  # of Hugging Face
        field = _key_of(dict.fromkeys(columns), target_field, _TARGET_KEYS, "target_field")
        feature = (getattr(dataset, "features", None) or {}).get(field)
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        return list(dataset[field]), None if names is None else tuple(names)
    classes = getattr(dataset, "classes", None)
    labels = tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else None
    targets = next((found for name in ("targets", "labels") if _is_column(found := getattr(dataset, name, None))), None)
    is_whole = targets is not None and len(targets) == len(dataset) and not getattr(dataset, "target_transform", None)
    return (targets if is_whole else None), labels


def _is_column(found: Any) -> bool:
    return isinstance(found, (list, tuple, np.ndarray)) or hasattr(found, "detach")


def _target_at(dataset: Any, place: int, field: str | None, argument: str) -> Any:
    """The target of one item.

    Raises:
        UsageError: an item without a target.
        BadDataError: the dataset fails.
    """
    try:
        item = dataset[place]
    except (FlashtaskError, MemoryError):
        raise
    except Exception as error:  # the code is the user's
        raise BadDataError(f"cannot read {argument}[{place}]", why=f"{type(error).__name__}: {error}") from error
    return _target(item, field, argument)


def _target(item: Any, field: str | None, argument: str) -> Any:
    if isinstance(item, Mapping):
        return item[_key_of(item, field, _TARGET_KEYS, "target_field")]
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return item[1]
    raise UsageError(
        f"{argument}: an item must be (image, target) or a mapping, not {type(item).__name__}",
        fix="predict_dataset=..., for images without targets",
    )


def _key_of(item: Mapping[str, Any], given: str | None, usual: Sequence[str], argument: str) -> str:
    if given is not None and given in item:
        return given
    found = [key for key in usual if key in item] if given is None else []
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"the dataset has {', '.join(map(repr, item))}: which one is meant by {argument}?",
        fix=f'{argument}="{next(iter(item), "image")}"',
    )
