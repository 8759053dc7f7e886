"""Batches as tasks take them, and what loaders of a user's own tell about the images and classes in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.features import FrozenFeatures

__all__ = [
    "StepOutput",
    "batch_row",
    "classes_stated",
    "describe_prediction",
    "images_and_targets",
    "images_of",
    "in_a_line",
    "preprocessing_for",
]


class StepOutput(NamedTuple):
    """What `shared_step` makes of a batch.

    Args:
        loss: a scalar.
        outputs: of the head, float32.
        targets: that the loss compared them with.
        loss_parts: what the loss is the sum of, by name; empty if it has no parts.
    """

    loss: torch.Tensor
    outputs: Any
    targets: Any
    loss_parts: Mapping[str, torch.Tensor] = MappingProxyType({})

    @classmethod
    def of(cls, loss: torch.Tensor | Mapping[str, torch.Tensor], outputs: Any, targets: Any) -> StepOutput:
        """With the sum of the parts, if the loss is given in parts."""
        if not isinstance(loss, Mapping):
            return cls(loss, outputs, targets)
        return cls(torch.stack(list(loss.values())).sum(), outputs, targets, dict(loss))


def batch_row(batch: Any, row: int, size: int | None = None) -> Any:
    """A batch of one sample of another batch, in the same structure.

    Args:
        batch: tensors (B, ...) in lists, tuples and dictionaries.
        row: which sample.
        size: B, if a list of this length holds an element for each sample; else lists are structure.
    """
    if isinstance(batch, torch.Tensor) or (isinstance(batch, list) and len(batch) == size):
        return batch[row : row + 1]
    if isinstance(batch, Mapping):
        return {name: batch_row(value, row, size) for name, value in batch.items()}
    rows = [batch_row(value, row, size) for value in batch]
    return type(batch)(*rows) if hasattr(batch, "_fields") else type(batch)(rows)


_FIX = "DataLoader(dataset, batch_size=32) over a dataset whose samples are (image, label)"


def images_and_targets(batch: Any) -> tuple[Any, Any]:
    """The images (B, C, H, W), or the features in their place, and the targets of a batch.

    Raises:
        UsageError: the batch is not such a pair, or it is a single sample.
    """
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        raise _wrong(_described(batch))
    images, targets = batch
    if isinstance(images, torch.Tensor) and images.ndim == 3 and _is_scalar(targets):
        raise _wrong("a single sample")
    if isinstance(images, (str, bytes, int, float, list, tuple)) and not isinstance(images, FrozenFeatures):
        raise _wrong(f"images that are {_described(images)}")
    return images, targets


def _is_scalar(value: Any) -> bool:
    return not getattr(value, "ndim", 0) and not isinstance(value, (list, tuple, dict))


def images_of(batch: Any, channels: int) -> torch.Tensor:
    """The images of a batch for prediction: the batch itself, or the first of a tuple.

    Args:
        batch: as the loader gave it.
        channels: of the images.

    Raises:
        UsageError: it is not a tensor, or it is a single image (C, H, W).
    """
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, torch.Tensor):
        raise _wrong(_described(images))
    if images.ndim == 3 and images.shape[0] == channels:
        raise _wrong(f"a single image {tuple(images.shape)}")
    return images


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dictionary ({', '.join(map(repr, list(value)[:5]))})"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return repr(value)[:80]


def _wrong(given: str) -> UsageError:
    return UsageError(f"a batch must be images (B, C, H, W) and targets (B,), but this one is {given}", fix=_FIX)


def preprocessing_for(images: Any, preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing that gives pictures the size of the images that a model is trained on.

    Of images of another size than the preprocessing's, nothing is cropped: a picture of their size stays as it is.

    Args:
        images: of a batch (B, C, H, W); features in their place tell nothing.
        preprocessing: the model's own.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        return preprocessing
    channels, height, width = preprocessing.input_size
    if tuple(images.shape[-2:]) == (height, width):
        return preprocessing
    return replace(preprocessing, input_size=(channels, *images.shape[-2:]), crop_pct=1.0)


def describe_prediction(preprocessing: Preprocessing) -> str:
    """A line for those who bring loaders of their own: what happens to files that are predicted later."""
    _, height, width = preprocessing.input_size
    size = f"{height} x {width}" + (" without a crop" if preprocessing.crop_pct == 1 else ", centre crop")
    return (
        f"your loader's own preprocessing is not known; files will be predicted at {size}, "
        "with the model's mean and std (model.preprocessing = ... changes it)"
    )


def classes_stated(loader: Any) -> tuple[str, ...]:
    """The names of the classes that a loader's dataset states in `classes`, as torchvision's do; empty if none."""
    dataset = getattr(loader, "dataset", None)
    while (inner := getattr(dataset, "dataset", None)) is not None and not hasattr(dataset, "classes"):
        dataset = inner  # a Subset, or another wrapper
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if len(set(names)) == len(names) > 1 else ()


def in_a_line(labels: Sequence[str], most: int = 60) -> str:
    """Names in a row, cut after so many characters, with how many more there are."""
    shown: list[str] = []
    for name in labels:
        if shown and len(", ".join([*shown, name])) > most:
            return f"{', '.join(shown)} and {len(labels) - len(shown)} more"
        shown.append(name)
    return ", ".join(shown)
