"""`ImageFileDataset`: image files, decoded in threads and transformed, a batch or a sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from flashtask.core.errors import UsageError
from flashtask.core.seeding import SampleKey, SeededDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import Pixels
from flashtask.data.geometry import Geometry
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.inputs import Input
from flashtask.data.samples import WeightedTargets
from flashtask.data.spatial import SpatialReader
from flashtask.data.threads import in_threads
from flashtask.data.transforms import Augmentation, Evaluation, Transform, description, first_steps, is_fixed

__all__ = ["ImageFileDataset", "Samples", "collate"]

Sample = torch.Tensor | tuple[torch.Tensor, Any]


class Samples(list[Sample]):
    """The samples of a batch whose images lie one after the other in one tensor (B, C, H, W) already.

    Args:
        samples: one by one.
        images: theirs.
        targets: theirs, as the batch has them; None if there are none.
    """

    def __init__(self, samples: Iterable[Sample], images: torch.Tensor, targets: Any) -> None:
        super().__init__(samples)
        self.images, self.targets = images, targets


def collate(samples: Any) -> Any:
    """A batch from samples, as torch makes it, without copying images that lie together already."""
    if not isinstance(samples, Samples):
        return default_collate(samples)
    return samples.images if samples.targets is None else [samples.images, samples.targets]


class ImageFileDataset(SeededDataset):
    """Samples `(image, target)`, or `image` alone where there are no targets.

    An image is a float32 tensor (C, H, W); a target is an int, a float32 tensor, or what `spatial` makes of it. With
    weights it is a `WeightedTargets` of both. It can be pickled for spawned workers.

    Args:
        paths: the image files, or the names that `images` has for pictures.
        targets: one row a picture: class indices (N,), (N, ...) floats, or rows for `spatial`; None for prediction.
        transform: what turns a PIL image into a tensor; an `Augmentation` for training.
        channels: 3 (RGB) or 1 (grey).
        cache: where decoded pictures are kept; by default they are not.
        spatial: makes targets that move with the image; None if they do not depend on it.
        weights: (N,) float32, of the samples in training.
        images: where the pictures are read.

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
        *,
        spatial: SpatialReader | None = None,
        weights: np.ndarray[Any, Any] | None = None,
        images: ImageSource = FILES,
    ) -> None:
        if targets is not None and len(targets) != len(paths):
            raise UsageError(f"{len(paths)} paths but {len(targets)} targets")
        self.paths = paths
        self.targets = None if targets is None else np.asarray(targets)
        self.channels = channels
        self._images = images
        if isinstance(transform, Augmentation):
            self.augmentation = transform
        else:
            self.augmentation = Augmentation(transform, transform, ())
        self.generators = self.augmentation.generators
        self._cache = cache or DecodedCache(0)
        self._spatial = spatial if targets is not None else None
        self._weights = None if targets is None or weights is None else torch.from_numpy(weights.astype(np.float32))
        self._sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, index: int) -> Input:
        """The picture of a sample, not decoded yet."""
        return self._images.input(self.paths[index])

    def repeats_itself(self) -> bool:
        """Whether the transform of frozen epochs draws nothing."""
        return is_fixed(self.augmentation.frozen)

    def targets_of(self, indices: Sequence[int]) -> Sequence[Any] | np.ndarray[Any, Any] | None:
        """The targets of files, one each; None where they depend on the image."""
        if self.targets is None or self._spatial is not None:
            return None
        rows = np.asarray(indices, dtype=np.intp)
        if self._weights is None:
            return self.targets[rows]
        return [WeightedTargets(self.targets[row], self._weights[row]) for row in rows]

    def contents_of(self, indices: Sequence[int]) -> list[str] | None:
        """The hash of each picture, with how it is read and transformed in frozen epochs; None if that has no name."""
        how, read_by = description(self.augmentation.frozen), self._images.description
        if how is None or read_by is None:
            return None
        hashes = self._images.hashes([self.paths[index] for index in indices])
        return [f"{hashed} {self.channels} {how}{read_by}" for hashed in hashes]

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
        samples = [self._drawn(key, pixels) for key, pixels in zip(keys, decoded, strict=True)]
        if self._spatial is None:
            return samples
        images, targets = zip(*samples, strict=True)
        return Samples(samples, torch.stack(images), self._collated(targets))

    def _evaluated(self, keys: Sequence[SampleKey | int], transform: Any) -> Samples:
        if transform.is_tiled:
            return self._tiles(keys, transform)
        images = torch.empty((len(keys), *transform.shape))

        def write(row: int) -> None:
            transform.rest(self._decode(keys[row]), images[row])

        in_threads(write, range(len(keys)))
        if self.targets is None:
            return Samples(images, images, None)
        targets = list(in_threads(self._target, keys)) if self._spatial else [self._target(one) for one in keys]
        return Samples(zip(images, targets, strict=True), images, self._collated(targets))

    def _tiles(self, keys: Sequence[SampleKey | int], transform: Any) -> Samples:
        """The tiles of pictures, each a sample, those of one picture after the other."""
        images = torch.cat(list(in_threads(lambda key: transform.rest(self._decode(key)), keys)))
        if self.targets is None:
            return Samples(images, images, None)
        targets = [one for of_picture in in_threads(self._targets_of_tiles, keys) for one in of_picture]
        return Samples(zip(images, targets, strict=True), images, self._collated(targets))

    def _targets_of_tiles(self, key: SampleKey | int) -> list[Any]:
        """The target of a picture as it lies in each of its tiles."""
        assert self._spatial is not None
        whole, target = self._in_the_file(key)
        places = self._transform(key).first.tiles(whole)  # type: ignore[attr-defined]  # an Evaluation
        return [self._weighted(key, self._spatial.finished(one.apply(target, self._spatial.fill))) for one in places]

    def _collated(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch from those of its samples."""
        if self._spatial is None:
            return default_collate(list(targets))
        if self._weights is None:
            return self._spatial.collate(targets)
        values, weights = zip(*targets, strict=True)
        return WeightedTargets(self._spatial.collate(values), torch.stack(weights))

    def _drawn(self, key: SampleKey | int, pixels: Pixels) -> Sample:
        """The rest of the transform, with the generators set as around any sample."""
        with self.drawing(key) as key:
            return self._transformed(key, pixels)

    def _decode(self, key: SampleKey | int) -> Pixels:
        first = first_steps(self._transform(key), self.channels)
        return self._cache.read(first, self.paths[_index(key)], self._images)

    def _transform(self, key: SampleKey | int) -> Transform:
        is_frozen = isinstance(key, SampleKey) and key.frozen
        return self.augmentation.frozen if is_frozen else self.augmentation.trained

    def _transformed(self, key: SampleKey, pixels: Pixels) -> Sample:
        transform = self._transform(key)
        if isinstance(transform, Evaluation):
            values = transform.rest(pixels)
            if self.targets is None:
                return values
            if transform.is_tiled:
                return values, self._collated(self._targets_of_tiles(key))
            return values, self._target(key)
        image = Image.fromarray(pixels)
        image = image if self.channels == 1 else image.convert("RGB")
        if self._spatial is None:
            values = transform(image)
            return values if self.targets is None else (values, self._target(key))
        whole, target = self._in_the_file(key)
        # The picture may have been decoded at a fraction of its size.
        target = Geometry(whole, image.size, 0, 0, image.size).apply(target)
        values, target = transform.joint(image, target, self._spatial.fill)  # type: ignore[attr-defined]
        return values, self._weighted(key, self._spatial.finished(target))

    def _target(self, key: SampleKey | int) -> Any:
        """The target of a sample; a key in the image as the evaluation transform leaves it."""
        if self._spatial is not None:
            whole, target = self._in_the_file(key)
            transform = self._transform(key)
            assert isinstance(transform, Evaluation)
            target = transform.first.geometry(whole).apply(target, self._spatial.fill)
            return self._weighted(key, self._spatial.finished(target))
        assert self.targets is not None
        value = self.targets[_index(key)]
        return self._weighted(key, torch.from_numpy(value.copy()) if value.ndim else value.item())

    def _in_the_file(self, key: SampleKey | int) -> tuple[tuple[int, int], Any]:
        """The size of a picture, and the target that is a key in it."""
        assert self._spatial is not None
        assert self.targets is not None
        index = _index(key)
        if index not in self._sizes:
            self._sizes[index] = self.picture(index).size()
        return self._sizes[index], self._spatial.target(self.targets[index], self._sizes[index])

    def _weighted(self, key: SampleKey | int, target: Any) -> Any:
        return target if self._weights is None else WeightedTargets(target, self._weights[_index(key)])


def _index(key: SampleKey | int) -> int:
    return key.index if isinstance(key, SampleKey) else int(key)
