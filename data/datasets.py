"""`ImageFileDataset`: image files, decoded and transformed one sample at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashtask.core.errors import UsageError
from flashtask.core.known_files import content_hashes
from flashtask.core.seeding import Place, SeededDataset
from flashtask.data.images import load_image
from flashtask.data.transforms import Augmentation, Transform, description, is_fixed

__all__ = ["ImageFileDataset"]


class ImageFileDataset(SeededDataset):
    """Samples `(image, label)`, or `image` alone where there are no targets.

    An image is a float32 tensor (C, H, W); a label is an int. It can be pickled for spawned workers.

    Args:
        paths: the image files.
        targets: one class index a file, or None for prediction.
        transform: what turns a PIL image into a tensor; an `Augmentation` for training.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        UsageError: there are not as many targets as paths.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | None,
        transform: Transform | Augmentation,
        channels: int = 3,
    ) -> None:
        if targets is not None and len(targets) != len(paths):
            raise UsageError(f"{len(paths)} paths but {len(targets)} targets")
        self.paths = list(paths)
        self.targets = None if targets is None else list(targets)
        self.channels = channels
        if isinstance(transform, Augmentation):
            self.augmentation = transform
        else:
            self.augmentation = Augmentation(transform, transform, ())
        self.generators = self.augmentation.generators

    def __len__(self) -> int:
        return len(self.paths)

    def repeats_itself(self) -> bool:
        """Whether the transform of frozen epochs draws nothing."""
        return is_fixed(self.augmentation.frozen)

    def targets_of(self, indices: Sequence[int]) -> list[int] | None:
        """The class index of each file."""
        return None if self.targets is None else [self.targets[index] for index in indices]

    def contents_of(self, indices: Sequence[int]) -> list[str] | None:
        """The hash of each file, with the transform of frozen epochs; None for a transform of the user's own."""
        how = description(self.augmentation.frozen)
        if how is None:
            return None
        hashes = content_hashes([self.paths[index] for index in indices])
        return [f"{hashed} {self.channels} {how}" for hashed in hashes]

    def sample(self, place: Place) -> torch.Tensor | tuple[torch.Tensor, int]:
        """Decode and transform one sample."""
        image = load_image(self.paths[place.index], self.channels)
        transform = self.augmentation.frozen if place.frozen else self.augmentation.trained
        values = transform(image)
        return values if self.targets is None else (values, self.targets[place.index])
