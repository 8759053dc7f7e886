"""Prediction from files and images: preprocessed as in validation, in batches, streamed in the order of the input."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.folding import folded_copy
from flashtask.core.library_internals import give_own_part_table
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.worker_threads import THREAD_BATCH, fitting_threads, in_worker_threads
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


class _Images(Dataset[torch.Tensor]):
    def __init__(self, items: Sequence[Any], preprocessing: Preprocessing, cache: DecodedCache | None = None) -> None:
        self.items, self.transform = list(items), eval_transform(preprocessing)
        self.cache = cache or DecodedCache(0)
        #: Whether each image is a batch of its own, of its tiles.
        self.is_tiled = self.transform.is_tiled

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tiles(index) if self.is_tiled else self.write(index, torch.empty(self.transform.shape))

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch (B, C, H, W), decoded in threads; of tiles those of one image after the other."""
        if self.is_tiled:
            return torch.cat(list(in_threads(self.tiles, indices)))
        images = torch.empty((len(indices), *self.transform.shape))
        in_threads(lambda row: self.write(indices[row], images[row]), range(len(indices)))
        return images

    def tiles(self, index: int) -> torch.Tensor:
        """Decode one image and cut it into preprocessed tiles (T, C, H, W)."""
        return self.transform.rest(input_of(self.items[index]).read(self.transform.first, self.cache))

    def write(self, index: int, out: torch.Tensor) -> torch.Tensor:
        """Decode one image and write it, preprocessed, into `out` (C, H, W)."""
        return self.transform.rest(input_of(self.items[index]).read(self.transform.first, self.cache), out)


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
    workers = fitting_workers(len(items)) if num_workers is None else num_workers
    images = _Images(items, preprocessing)
    loader = DataLoader(
        images,
        batch_size=1 if images.is_tiled else batch_size,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    remaining: Iterable[Any] = iter(items)
    for batch in loader:
        yield batch, list(map(input_of, islice(remaining, 1 if images.is_tiled else len(batch))))


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
    """
    num_threads = _fitting_threads(task, len(items), num_workers) if num_threads is None else num_threads
    if not num_threads:
        yield from _plainly(task, items, batch_size or _BATCH_SIZE, num_workers)
        return
    remaining, images = iter(items), _Images(items, task.preprocessing, cache)
    for outputs in _in_worker_threads(task, images, batch_size or THREAD_BATCH, num_threads):
        count = 1 if images.is_tiled else len(outputs)
        yield from task.to_predictions(outputs, list(map(input_of, islice(remaining, count))))


def _fitting_threads(task: Any, num_images: int, num_workers: int | None) -> int:
    return 0 if num_workers else fitting_threads(task, num_images, num_cores())


def _plainly(task: Any, items: Sequence[Any], batch_size: int, num_workers: int | None) -> Iterator[Any]:
    """On the network as it is, one batch after the other, with all threads of the process in each."""
    precision = inference_precision(task.default_precision, task.device)
    for images, samples in image_batches(items, task.preprocessing, batch_size, num_workers):
        with evaluating(task, precision):
            # From pinned memory the copy runs beside what is still being computed.
            images = images.to(task.device, memory_format=torch.channels_last, non_blocking=images.is_pinned())
            outputs = task.predict_step(precision.convert_batch(images), 0)
        yield from task.to_predictions(outputs, samples)


def _in_worker_threads(task: Any, images: _Images, batch_size: int, num_threads: int) -> Iterator[Any]:
    """Outputs of one batch after the other, in order."""
    keep_freed_memory()
    prepare_decoders()
    precision = inference_precision(task.default_precision, task.device)
    made = task.inference_copy(precision)
    size = 1 if images.is_tiled else max(1, min(batch_size, -(-len(images) // num_threads)))

    def outputs_of(start: int) -> Any:
        rows = range(start, min(start + size, len(images)))
        if images.is_tiled:
            batch = images.tiles(start)
        else:
            batch = torch.empty((len(rows), *images.transform.shape))
            for row, index in enumerate(rows):
                images.write(index, batch[row])
        with precision.inference():
            batch = precision.convert_batch(batch.to(memory_format=torch.channels_last))
            return made.predict_step(batch, 0)

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
