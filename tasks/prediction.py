"""Prediction from files and images: preprocessed as in validation, in batches, streamed in the order of the input."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.errors import UsageError
from flashtask.core.folding import folded_copy
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.images import prepare_decoders
from flashtask.data.loaders import fitting_workers
from flashtask.data.threads import in_order, in_threads, num_cores
from flashtask.data.transforms import eval_transform
from flashtask.trainer.placement.precision import MixedPrecision, Precision, resolve_precision

__all__ = ["Prediction", "as_items", "evaluating", "fitting_lanes", "image_batches", "paths_of", "predictions_of"]

#: Images at a time: for a lane, what fits into a core's cache; else, what keeps a device busy.
_LANE_BATCH, _BATCH_SIZE = 16, 64
#: Below this number of images a copy for inference costs more than it saves.
_FEW = 32
#: With more lanes they would wait for Python's lock.
_MOST_LANES = 8
#: Whose modules keep nothing of one forward pass for another, so that several may run at once.
_LIBRARIES = ("flashtask", "timm", "torch", "torchmetrics", "torchvision")


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
    def __init__(self, items: Sequence[Any], preprocessing: Preprocessing, cache: DecodedCache | None = None) -> None:
        self.items, self.transform = list(items), eval_transform(preprocessing)
        self.cache = cache or DecodedCache(0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.write(index, torch.empty(self.transform.shape))

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch (B, C, H, W), decoded in threads."""
        images = torch.empty((len(indices), *self.transform.shape))
        in_threads(lambda row: self.write(indices[row], images[row]), range(len(indices)))
        return images

    def write(self, index: int, out: torch.Tensor) -> torch.Tensor:
        """Decode one image and write it, preprocessed, into `out` (C, H, W)."""
        item = self.items[index]
        if isinstance(item, Image.Image):
            pixels = self.transform.first.of(item)
        else:
            pixels = self.cache.read(self.transform.first, os.fspath(item))
        return self.transform.rest(pixels, out)


def _as_it_is(images: Any) -> Any:
    return images


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
        _Images(items, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    remaining: Iterable[Any] = iter(items)
    for batch in loader:
        yield batch, paths_of(islice(remaining, len(batch)))


def paths_of(items: Iterable[Any]) -> list[str | None]:
    """The paths of images, None for a PIL image."""
    return [None if isinstance(item, Image.Image) else str(item) for item in items]


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


def predictions_of(
    task: Any,
    items: Sequence[Any],
    batch_size: int | None = None,
    num_workers: int | None = None,
    *,
    cache: DecodedCache | None = None,
    lanes: int | None = None,
) -> Iterator[Any]:
    """What `Task.predictions` gives, one result after the other, as fast as the device can.

    On a CPU each lane, a thread with its share of the cores, decodes and computes batches of its own, on a copy of the
    network with BatchNorm folded into the convolutions. Probabilities differ from those of the plain path by less than
    1e-4 in float32 and 0.05 in bfloat16, where the plain path itself is as far from float32.

    Args:
        task: what predicts.
        items: paths and PIL images.
        batch_size: images at a time; None means 16 on a CPU, whose caches hold that much, else 64.
        num_workers: processes that load, for the plain path; None decides by itself.
        cache: where decoded pictures may lie already.
        lanes: threads that compute; None decides by itself. 0 takes the plain path.
    """
    lanes = fitting_lanes(task, len(items), num_workers) if lanes is None else lanes
    if not lanes:
        yield from _plainly(task, items, batch_size or _BATCH_SIZE, num_workers)
        return
    remaining = iter(items)
    for outputs in _in_lanes(task, _Images(items, task.preprocessing, cache), batch_size or _LANE_BATCH, lanes):
        yield from task.to_predictions(outputs, paths_of(islice(remaining, len(outputs))))


def _plainly(task: Any, items: Sequence[Any], batch_size: int, num_workers: int | None) -> Iterator[Any]:
    """On the network as it is, one batch after the other, with all threads of the process in each."""
    precision = resolve_precision(task.default_precision, task.device)
    for images, paths in image_batches(items, task.preprocessing, batch_size, num_workers):
        with evaluating(task, precision):
            # From pinned memory the copy runs beside what is still being computed.
            images = images.to(task.device, memory_format=torch.channels_last, non_blocking=images.is_pinned())
            outputs = task.predict_step(precision.convert_batch(images), 0)
        yield from task.to_predictions(outputs, paths)


def fitting_lanes(task: Any, num_images: int, num_workers: int | None) -> int:
    """A lane a core, up to eight; none where there is no CPU to share or parts may not be fit for several threads."""
    parts = (*task.modules(), *(hook for part in task.modules() for hook in _hooks(part)))
    is_known = all(type(one).__module__.partition(".")[0] in _LIBRARIES for one in parts)
    if num_workers or num_images < _FEW or task.device.type != "cpu" or not is_known:
        return 0
    return min(torch.get_num_threads(), num_cores(), _MOST_LANES)


def _hooks(part: nn.Module) -> tuple[Any, ...]:
    return (*part._forward_hooks.values(), *part._forward_pre_hooks.values())


def _in_lanes(task: Any, images: _Images, batch_size: int, lanes: int) -> Iterator[torch.Tensor]:
    """Outputs of one batch after the other, in order."""
    keep_freed_memory()
    prepare_decoders()
    precision = resolve_precision(task.default_precision, task.device)
    made = _for_inference(task, precision)
    size = max(1, min(batch_size, -(-len(images) // lanes)))
    threads = torch.get_num_threads()

    def outputs_of(start: int) -> torch.Tensor:
        rows = range(start, min(start + size, len(images)))
        batch = torch.empty((len(rows), *images.transform.shape))
        for row, index in enumerate(rows):
            images.write(index, batch[row])
        with torch.no_grad(), precision.forward():
            batch = precision.convert_batch(batch.to(memory_format=torch.channels_last))
            outputs: torch.Tensor = made.predict_step(batch, 0)
        return outputs

    try:
        yield from in_order(outputs_of, range(0, len(images), size), lanes, partial(_compute_in, threads // lanes))
    finally:
        torch.set_num_threads(threads)  # what a lane has set for itself would hold for threads that start later


def _compute_in(threads: int) -> None:
    torch.get_num_threads()  # torch sets up a thread when it is first asked, and would overrule what comes before
    torch.set_num_threads(max(1, threads))


def _for_inference(task: Any, precision: Precision) -> Any:
    """A copy in eval mode, folded where that is exact; its convolutions in the format that they are computed in."""
    made = copy.copy(task)
    made.training, made._modules = False, dict(task._modules)
    for name in ("backbone", "head"):
        if isinstance(task._modules.get(name), nn.Module):
            made._modules[name] = copy.deepcopy(task._modules[name]).eval()
    if all(tensor.dtype is torch.float32 for tensor in made.backbone.parameters()):
        example = torch.randn(2, *task.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
        made._modules["backbone"] = folded_copy(made.backbone, example) or made.backbone
        if isinstance(precision, MixedPrecision):
            # Autocast would convert the weights anew for each batch.
            for part in made.backbone.modules():
                if isinstance(part, nn.Conv2d):
                    part.to(precision.computes_in)
    made.backbone.to(memory_format=torch.channels_last)
    return made
