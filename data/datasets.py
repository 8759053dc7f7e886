"""`ImageFileDataset`: image files, decoded in threads and transformed, a batch or a sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from flashtask.core.errors import UsageError
from flashtask.core.known_files import content_hashes
from flashtask.core.seeding import SampleKey, SeededDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import Pixels
from flashtask.data.threads import in_threads
from flashtask.data.transforms import Augmentation, Evaluation, Transform, description, first_steps, is_fixed

__all__ = ["ImageFileDataset", "Samples", "collate"]

Sample = torch.Tensor | tuple[torch.Tensor, int | torch.Tensor]


class Samples(list[Sample]):
    """The samples of a batch whose images lie one after the other in one tensor (B, C, H, W) already."""

    images: torch.Tensor
    targets: np.ndarray[Any, Any] | None


def collate(samples: Any) -> Any:
    """A batch from samples, as torch makes it, without copying images that lie together already."""
    if not isinstance(samples, Samples):
        return default_collate(samples)
    return samples.images if samples.targets is None else [samples.images, torch.from_numpy(samples.targets)]


class ImageFileDataset(SeededDataset):
    """Samples `(image, target)`, or `image` alone where there are no targets.

    An image is a float32 tensor (C, H, W); a target is an int, or a float32 tensor. It can be pickled for spawned
    workers.

    Args:
        paths: the image files.
        targets: one row a file: class indices (N,), or (N, ...) floats; None for prediction.
        transform: what turns a PIL image into a tensor; an `Augmentation` for training.
        channels: 3 (RGB) or 1 (grey).
        cache: where decoded pictures are kept; by default they are not.

    Raises:
        UsageError: there are not as many targets as paths.
    """

    def __init__(
        self,
        paths: Sequence[str] | np.ndarray[Any, Any],
        targets: Sequence[int] | np.ndarray[Any, Any] | None,
        transform: Transform | Augmentation,
        channels: int = 3,
        cache: DecodedCache | None = None,
    ) -> None:
        if targets is not None and len(targets) != len(paths):
            raise UsageError(f"{len(paths)} paths but {len(targets)} targets")
        self.paths = paths
        self.targets = None if targets is None else np.asarray(targets)
        self.channels = channels
        if isinstance(transform, Augmentation):
            self.augmentation = transform
        else:
            self.augmentation = Augmentation(transform, transform, ())
        self.generators = self.augmentation.generators
        self._cache = cache or DecodedCache(0)

    def __len__(self) -> int:
        return len(self.paths)

    def repeats_itself(self) -> bool:
        """Whether the transform of frozen epochs draws nothing."""
        return is_fixed(self.augmentation.frozen)

    def targets_of(self, indices: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """The targets of files, a row each."""
        return None if self.targets is None else self.targets[np.asarray(indices, dtype=np.intp)]

    def contents_of(self, indices: Sequence[int]) -> list[str] | None:
        """The hash of each file, with the transform of frozen epochs; None for a transform of the user's own."""
        how = description(self.augmentation.frozen)
        if how is None:
            return None
        hashes = content_hashes([self.paths[index] for index in indices])
        return [f"{hashed} {self.channels} {how}" for hashed in hashes]

    def sample(self, key: SampleKey) -> Sample:
        """Decode and transform one sample."""
        return self._transformed(key, self._decode(key))

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Sample]:
        """The samples of a batch. Threads do what draws no random numbers: decoding, and the evaluation transform."""
        whole = [self._transform(key) for key in keys]
        if len(keys) and all(isinstance(transform, Evaluation) for transform in whole):
            return self._evaluated(keys, whole[0])
        # The rest draws from global generators, which one thread at a time can set.
        decoded = in_threads(self._decode, keys)
        return [self._drawn(key, pixels) for key, pixels in zip(keys, decoded, strict=True)]

    def _evaluated(self, keys: Sequence[SampleKey | int], transform: Any) -> Samples:
        images = torch.empty((len(keys), *transform.shape))

        def write(row: int) -> None:
            transform.rest(self._decode(keys[row]), images[row])

        in_threads(write, range(len(keys)))
        samples = Samples(self._with_target(key, image) for key, image in zip(keys, images, strict=True))
        samples.images = images
        samples.targets = self.targets_of([_index(key) for key in keys])
        return samples

    def _drawn(self, key: SampleKey | int, pixels: Pixels) -> Sample:
        """The rest of the transform, with the generators set as around any sample."""
        with self.drawing(key) as key:
            return self._transformed(key, pixels)

    def _decode(self, key: SampleKey | int) -> Pixels:
        first = first_steps(self._transform(key), self.channels)
        return self._cache.read(first, self.paths[_index(key)])

    def _transform(self, key: SampleKey | int) -> Transform:
        is_frozen = isinstance(key, SampleKey) and key.frozen
        return self.augmentation.frozen if is_frozen else self.augmentation.trained

    def _transformed(self, key: SampleKey, pixels: Pixels) -> Sample:
        transform = self._transform(key)
        if isinstance(transform, Evaluation):
            return self._with_target(key, transform.rest(pixels))
        image = Image.fromarray(pixels)
        return self._with_target(key, transform(image if self.channels == 1 else image.convert("RGB")))

    def _with_target(self, key: SampleKey | int, image: torch.Tensor) -> Sample:
        if self.targets is None:
            return image
        target = self.targets[_index(key)]
        return image, torch.from_numpy(target.copy()) if target.ndim else target.item()


def _index(key: SampleKey | int) -> int:
    return key.index if isinstance(key, SampleKey) else int(key)
