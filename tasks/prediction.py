"""Prediction from files and images: preprocessed as in validation, in batches, streamed in the order of the input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.errors import BadDataError, HubError, IntegrityError, MissingInputError
from flashtask.core.folding import folded_copy
from flashtask.core.library_internals import give_own_part_table
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.worker_threads import THREAD_BATCH, fitting_threads, in_worker_threads
from flashtask.data.checks import BadImage, reason_of
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.images import prepare_decoders
from flashtask.data.inputs import Input, input_of
from flashtask.data.loaders import fitting_workers
from flashtask.data.threads import in_threads, num_cores
from flashtask.data.transforms import eval_transform
from flashtask.trainer.devices.precision import MixedPrecision, Precision, inference_precision

__all__ = ["evaluating", "image_batches", "inference_copy", "predictions_of"]

#: Images at a time where they are not computed in worker threads: what keeps a device busy.
_BATCH_SIZE = 64


class _Batch(NamedTuple):
    """Some images, decoded and preprocessed.

    Args:
        pixels: (B, C, H, W), of tiles those of one image; without those that are bad.
        bad: by their place among the images of the batch, those that cannot be read.
        samples: the images, also the bad ones; None where they were read by a process that only loads.
    """

    pixels: torch.Tensor
    bad: Mapping[int, BadImage]
    samples: Sequence[Input] | None

    def results(self, task: Any, outputs: Any, samples: Sequence[Input]) -> Iterator[Any]:
        """What the task says of each image, and the bad ones in their places.

        Args:
            task: that predicted.
            outputs: of the images that could be read; None if there are none.
            samples: all images of the batch.
        """
        good = [sample for place, sample in enumerate(samples) if place not in self.bad]
        found = iter(task.to_predictions(outputs, good) if good else ())
        for place in range(len(samples)):
            yield self.bad[place] if place in self.bad else next(found)


class _Images(Dataset[torch.Tensor]):
    """Images, preprocessed a batch at a time.

    Args:
        items: as for `image_batches`.
        preprocessing: of the backbone.
        cache: where decoded pictures may lie already.
        keeps_bad: an image that cannot be read becomes a `BadImage` in place of an error.
    """

    def __init__(
        self,
        items: Sequence[Any],
        preprocessing: Preprocessing,
        cache: DecodedCache | None = None,
        *,
        keeps_bad: bool = False,
    ) -> None:
        self.items, self.transform = items, eval_transform(preprocessing)
        self.cache, self.keeps_bad = cache or DecodedCache(0), keeps_bad
        #: Whether each image is a batch of its own, of its tiles.
        self.is_tiled = self.transform.is_tiled

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: Sequence[int]) -> _Batch:
        """A whole batch, decoded in threads."""
        made = self.batch(indices, in_threads)
        # A process that loads would send the content of files back, which is already in the pixels.
        return made if get_worker_info() is None else made._replace(samples=None)

    def batch(self, indices: Sequence[int], run: Callable[..., Iterable[Any]]) -> _Batch:
        """Decode a batch, or one image and cut it into tiles.

        Args:
            indices: of the images; one where they are cut into tiles.
            run: calls a function for each of several values, as `map` does.
        """
        pixels = torch.empty((0 if self.is_tiled else len(indices), *self.transform.shape))

        def decode(row: int) -> tuple[Input, torch.Tensor | BadImage]:
            sample = input_of(self.items[indices[row]])
            try:
                read = sample.read(self.transform.first, self.cache)
                return sample, self.transform.rest(read) if self.is_tiled else self.transform.rest(read, pixels[row])
            except (BadDataError, MissingInputError, HubError, IntegrityError) as error:
                if not self.keeps_bad:
                    raise
                return sample, BadImage(sample.path or sample.name, reason_of(error))

        samples, made = zip(*run(decode, range(len(indices))), strict=True)
        bad = {place: one for place, one in enumerate(made) if isinstance(one, BadImage)}
        if self.is_tiled and not bad:
            (pixels,) = made
        elif bad:
            pixels = pixels[[place for place in range(len(pixels)) if place not in bad]]
        return _Batch(pixels, bad, samples)


def _as_it_is(images: Any) -> Any:
    return images


def image_batches(
    items: Sequence[Any], preprocessing: Preprocessing, batch_size: int, num_workers: int | None
) -> Iterator[tuple[torch.Tensor, list[Input]]]:
    """Preprocessed batches (B, C, H, W) with the images that they were made of, in order; or the tiles of each image.

    Args:
        items: what `read_inputs` gave, or paths of files.
        preprocessing: of the backbone.
        batch_size: images in a batch.
        num_workers: processes that load; None decides by the number of images.
    """
    for batch, samples in _batches(_Images(items, preprocessing), batch_size, num_workers):
        yield batch.pixels, samples


def _batches(images: _Images, batch_size: int, num_workers: int | None) -> Iterator[tuple[_Batch, list[Input]]]:
    workers = fitting_workers(len(images)) if num_workers is None else num_workers
    loader = DataLoader(
        images,
        batch_size=1 if images.is_tiled else batch_size,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    remaining: Iterable[Any] = iter(images.items)
    for batch in loader:
        own = islice(remaining, 1 if images.is_tiled else len(batch.pixels) + len(batch.bad))
        yield batch, list(map(input_of, own)) if batch.samples is None else [*batch.samples]


@contextmanager
def evaluating(module: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients and the given precision; every part's own mode comes back afterwards.

    Not inference mode: what comes out may be what another model is trained on.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with precision.inference():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def predictions_of(
    task: Any,
    items: Sequence[Any],
    batch_size: int | None = None,
    num_workers: int | None = None,
    *,
    cache: DecodedCache | None = None,
    num_threads: int | None = None,
    keeps_bad: bool = False,
) -> Iterator[Any]:
    """What `Task.predictions` gives, one result after the other, as fast as the device can.

    On a CPU each worker thread, with its share of the cores, decodes and computes batches of its own, on a copy of the
    network with BatchNorm folded into the convolutions. In float32, which is what `auto` means here, scores are those
    of the plain path to 1e-5, however many images there are; in a mixed format both round, each in its own way.

    Args:
        task: what predicts.
        items: what `read_inputs` gave, or paths of files.
        batch_size: images at a time; None means 16 on a CPU, whose caches hold that much, else 64.
        num_workers: processes that load, for the plain path; None decides by itself.
        cache: where decoded pictures may lie already.
        num_threads: that compute; None decides by itself. 0 takes the plain path.
        keeps_bad: an image that cannot be read gives a `BadImage` with the reason; otherwise it is an error.
    """
    num_threads = _fitting_threads(task, len(items), num_workers) if num_threads is None else num_threads
    images = _Images(items, task.preprocessing, cache, keeps_bad=keeps_bad)
    if not num_threads:
        images.cache = DecodedCache(0)
        yield from _plainly(task, images, batch_size or _BATCH_SIZE, num_workers)
        return
    for batch, outputs in _in_worker_threads(task, images, batch_size or THREAD_BATCH, num_threads):
        assert batch.samples is not None  # None only where a process loads
        yield from batch.results(task, outputs, batch.samples)


def _fitting_threads(task: Any, num_images: int, num_workers: int | None) -> int:
    return 0 if num_workers else fitting_threads(task, num_images, num_cores())


def _plainly(task: Any, images: _Images, batch_size: int, num_workers: int | None) -> Iterator[Any]:
    """On the network as it is, one batch after the other, with all threads of the process in each."""
    precision = inference_precision(task.default_precision, task.device)
    for batch, samples in _batches(images, batch_size, num_workers):
        outputs = None
        if len(batch.pixels):
            with evaluating(task, precision):
                # From pinned memory the copy runs beside what is still being computed.
                pixels = batch.pixels.to(
                    task.device, memory_format=torch.channels_last, non_blocking=batch.pixels.is_pinned()
                )
                outputs = task.predict_step(precision.convert_batch(pixels), 0)
        yield from batch.results(task, outputs, samples)


def _in_worker_threads(task: Any, images: _Images, batch_size: int, num_threads: int) -> Iterator[tuple[_Batch, Any]]:
    """One batch after the other with its outputs, in order."""
    keep_freed_memory()
    prepare_decoders()
    precision = inference_precision(task.default_precision, task.device)
    made = task.inference_copy(precision)
    size = 1 if images.is_tiled else max(1, min(batch_size, -(-len(images) // num_threads)))

    def outputs_of(start: int) -> tuple[_Batch, Any]:
        batch = images.batch(range(start, min(start + size, len(images))), map)
        if not len(batch.pixels):
            return batch, None
        with precision.inference():
            pixels = precision.convert_batch(batch.pixels.to(memory_format=torch.channels_last))
            return batch._replace(pixels=batch.pixels[:0]), made.predict_step(pixels, 0)

    yield from in_worker_threads(outputs_of, range(0, len(images), size), num_threads)


def inference_copy(task: Any, precision: Precision) -> Any:
    """What `Task.inference_copy` gives: folded where that is exact, convolutions in the format they are computed in.

    Args:
        task: on the CPU for the folded form; it is not changed.
        precision: that the copy will compute in.
    """
    made = copy.copy(task)
    made.training = False
    parts = give_own_part_table(made)
    if isinstance(head := parts.get("head"), nn.Module):
        parts["head"] = copy.deepcopy(head).eval()
    is_float32 = all(tensor.dtype is torch.float32 for tensor in task.backbone.parameters())
    folded = None
    if is_float32:
        example = torch.randn(2, *task.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
        in_float32 = not isinstance(precision, MixedPrecision)
        folded = folded_copy(task.backbone, example.to(task.device), fuses=in_float32 and task.device.type == "cpu")
    parts["backbone"] = folded or copy.deepcopy(task.backbone).eval()
    if is_float32 and isinstance(precision, MixedPrecision):
        # Autocast would convert the weights again for each batch.
        for part in made.backbone.modules():
            if isinstance(part, nn.Conv2d):
                part.to(precision.computes_in)
    made.backbone.to(memory_format=torch.channels_last)
    return made
