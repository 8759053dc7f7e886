"""Prediction from files and images: preprocessed as in validation, in batches, streamed in the order of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.images import in_mode, load_image
from flashtask.data.loaders import fitting_workers
from flashtask.data.transforms import eval_transform
from flashtask.trainer.placement.precision import Precision

__all__ = ["Prediction", "as_items", "evaluating", "image_batches"]


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about one image.

    Args:
        path: of the image, None if it was not a file.
        labels: most probable first.
        scores: their probabilities, in the same order.
    """

    path: str | None
    labels: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[0]

    @property
    def probabilities(self) -> dict[str, float]:
        """Every label with its probability, most probable first."""
        return dict(zip(self.labels, self.scores, strict=True))


def as_items(inputs: Any) -> tuple[list[Any], bool]:
    """The images as a list, and whether a single one was given.

    Raises:
        UsageError: something that is neither a path nor a PIL image.
    """
    single = isinstance(inputs, (str, Path, Image.Image))
    items = [inputs] if single else list(inputs)
    for item in items:
        if not isinstance(item, (str, Path, Image.Image)):
            raise UsageError(f"predict takes paths and PIL images, not {type(item).__name__}")
    return items, single


class _Images(Dataset[torch.Tensor]):
    def __init__(self, items: Sequence[Any], preprocessing: Preprocessing) -> None:
        self.items, self.transform = list(items), eval_transform(preprocessing)
        self.channels = preprocessing.input_size[0]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.items[index]
        if isinstance(item, Image.Image):
            return self.transform(in_mode(item, "RGB" if self.channels == 3 else "L"))
        return self.transform(load_image(item, self.channels))


def image_batches(
    items: Sequence[Any], preprocessing: Preprocessing, batch_size: int, num_workers: int | None
) -> Iterator[tuple[torch.Tensor, list[str | None]]]:
    """Preprocessed batches (B, C, H, W) with the paths of their images (None for a PIL image), in order.

    Args:
        items: paths and PIL images.
        preprocessing: of the backbone.
        batch_size: images in a batch.
        num_workers: processes that load; None decides by the number of images.
    """
    workers = fitting_workers(len(items)) if num_workers is None else num_workers
    loader = DataLoader(
        _Images(items, preprocessing), batch_size=batch_size, num_workers=workers, generator=torch.Generator()
    )
    remaining: Iterable[Any] = iter(items)
    for batch in loader:
        yield batch, [None if isinstance(i, Image.Image) else str(i) for i in islice(remaining, len(batch))]


@contextmanager
def evaluating(module: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients and the given precision; every part's own mode comes back afterwards.

    Not inference mode: what comes out may be what another model is trained on.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), precision.forward():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
