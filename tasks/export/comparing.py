"""Whether an exported model gives what the task gives: the same pictures through both, and the metric of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.machine import num_cores
from flashtask.core.worker_threads import fitting_threads, in_worker_threads
from flashtask.data.decoding import Fitting
from flashtask.data.inputs import Input
from flashtask.data.transforms import eval_transform
from flashtask.tasks.batches import StepOutput, images_and_targets
from flashtask.tasks.export.outputs import Arrays, MaskOutputs, Outputs
from flashtask.tasks.prediction import evaluating, image_batches
from flashtask.trainer.batch_transfer import in_dtype
from flashtask.trainer.devices.precision import inference_precision
from flashtask.trainer.metric_order import direction_of

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["Agreement", "Reference", "Run"]

#: What a runtime does: pictures (N, H, W, C) uint8, or inputs (N, C, h, w) float32, to outputs by name.
Run = Callable[[np.ndarray[Any, Any]], Arrays]

_BATCH = 16
#: Sides of the made-up pictures, as shares of the input's, so that they are enlarged, reduced, low and tall.
_SIDES = ((1.0, 1.0), (1.31, 1.87), (0.61, 0.47), (2.9, 1.13), (1.05, 3.3), (4.7, 5.1), (1.14, 1.14), (0.8, 2.0))


@dataclass(frozen=True)
class Agreement:
    """How an exported model compares with its task.

    Args:
        images: that both were given.
        are_random: whether the images were made up, because no data was given.
        differing: of how many the result is not the same: another label, or numbers beyond the tolerance.
        largest: the largest difference, in `unit`.
        unit: of the difference.
        metric: the name of the metric; None without data.
        ours: its value for the task.
        theirs: its value for the exported model.
    """

    images: int
    are_random: bool
    differing: int
    largest: float
    unit: str
    metric: str | None = None
    ours: float | None = None
    theirs: float | None = None

    def lines(self) -> Iterator[str]:
        """What is printed of it."""
        kind = "made-up pictures" if self.are_random else "images"
        yield f"results that differ: {self.differing} of {self.images} {kind}"
        yield f"largest difference: {self.largest:.2g} ({self.unit})"
        if self.metric is not None:
            yield f"{self.metric}: {self.theirs:.4f} (checkpoint: {self.ours:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of the file."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def loss_of_metric(self) -> float:
        """How much worse the metric became, above 0 if it did; of errors in a unit of their own as a share."""
        assert self.metric is not None
        assert self.ours is not None
        assert self.theirs is not None
        if direction_of(self.metric) != "min":
            return self.ours - self.theirs
        return (self.theirs - self.ours) / max(abs(self.ours), 1e-12)


@dataclass(frozen=True)
class _Batch:
    pictures: list[Input]
    ours: list[Tensor]
    true: Any = None


class Reference:
    """What the task itself says about images, computed once.

    Args:
        task: on the CPU.
        outputs: what the exported model gives.
        datamodule: connected with the task and set up for validation; None for made-up pictures.
        has_one_size: whether the exported model takes pictures of one size: that of the first; of made-up ones that of
            the input.
        has_preprocessing: whether the exported model takes pictures, else inputs.
    """

    def __init__(
        self,
        task: Task,
        outputs: Outputs,
        datamodule: Any,
        has_one_size: bool,
        *,
        has_preprocessing: bool = True,
    ) -> None:
        self.task, self.outputs, self.has_data = task, outputs, datamodule is not None
        self.has_preprocessing = has_preprocessing
        self._fitting = Fitting(task.preprocessing)
        # The class of a pixel is given in pixels of the file, which a picture that was decoded smaller does not have.
        is_whole = isinstance(outputs, MaskOutputs)
        self._decoding = Fitting(replace(task.preprocessing, decode="whole")) if is_whole else self._fitting
        self.precision = inference_precision("32", task.device)
        made_up = self._made_up(task.preprocessing.input_size[1:] if has_one_size else None)
        self.batches = list(made_up if datamodule is None else self._of_data(datamodule))
        #: (height, width) of all pictures; None if they may have several.
        self.size = self.picture(self.pictures[0])[0].shape[:2] if has_one_size and has_preprocessing else None
        # Metrics of places count in pixels of the files, to which a graph without preprocessing does not lead back.
        is_measured = self.has_data and (has_preprocessing or not outputs.is_spatial)
        self.metric: str | None = None
        self._metric: Any = None
        if is_measured:
            self.metric, self._metric = self._own_metric()

    @property
    def pictures(self) -> list[Input]:
        """All images, in order."""
        return [one for batch in self.batches for one in batch.pictures]

    def _of_data(self, datamodule: Any) -> Iterator[_Batch]:
        loader = datamodule.val_dataloader()
        if loader is None or not hasattr(loader.dataset, "picture"):
            raise BadDataError("the data has no validation images that can be read one by one", fix="give a folder")
        start = 0
        pairs = (images_and_targets(batch[:2]) for batch in loader)
        threads = max(1, fitting_threads(self.task, len(loader.dataset), num_cores()))
        for count, outputs, targets in in_worker_threads(self._outputs_of, pairs, threads):
            with evaluating(self.task, self.precision):
                step = StepOutput(torch.zeros(()), outputs, self.task.to_targets(targets))
                true = self.task.metric_inputs(step)[1]
                postprocessed = self.task.postprocess(outputs)
            pictures = [loader.dataset.picture(index) for index in range(start, start + count)]
            start += count
            yield _Batch(pictures, self._ours(postprocessed, pictures), true)

    def _outputs_of(self, pair: tuple[Tensor, Any]) -> tuple[int, Any, Any]:
        """The number of images in a batch, the outputs of the network, which is in eval mode, and the targets."""
        images, targets = pair
        with self.precision.inference():
            outputs = self.task(images.contiguous(memory_format=torch.channels_last))
        return len(images), in_dtype(outputs, torch.float32), targets

    def _made_up(self, size: tuple[int, int] | None) -> Iterator[_Batch]:
        channels, *sides = self.task.preprocessing.input_size
        generator = np.random.default_rng(0)
        pictures = []
        for share in _SIDES:
            height, width = size or tuple(max(2, round(side * part)) for side, part in zip(sides, share, strict=True))
            coarse = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
            noisy = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
            pictures.append(Input("a made-up picture", noisy if channels == 3 else noisy[..., 0]))
        for images, own in image_batches(pictures, self.task.preprocessing, _BATCH, 0):
            with evaluating(self.task, self.precision):
                postprocessed = self.task.predict_step(images, 0)
            yield _Batch(own, self._ours(postprocessed, own))

    def _ours(self, postprocessed: Any, pictures: Sequence[Input]) -> list[Tensor]:
        in_files = self.has_preprocessing and self.outputs.is_spatial
        places = [self._fitting.geometry(one.size()) if in_files else None for one in pictures]
        return self.outputs.of_task(postprocessed, places)

    def _own_metric(self) -> tuple[str | None, Any]:
        """The metric that decides which epoch is best, or the first."""
        self.task._add_metrics()
        of_parts: Any = self.task.metrics
        metrics: dict[str, Any] = dict(of_parts["val"].items()) if "val" in of_parts else {}
        if not metrics:
            return None, None
        name = self.task.monitor.removeprefix("val_")
        name = name if name in metrics else next(iter(metrics))
        return f"val_{name}", metrics[name]

    def compared(self, run: Run, num_threads: int = 1) -> Agreement:
        """Give the same images to a runtime.

        Args:
            run: what it does.
            num_threads: that may call it at the same time.
        """
        differing, largest, count = 0, 0.0, 0
        ours, theirs = copy.deepcopy(self._metric), copy.deepcopy(self._metric)
        results = in_worker_threads(partial(self._run_on, run), self.pictures, num_threads)
        for batch in self.batches:
            found = [one for _ in batch.pictures for one in next(results)]
            for own, other in zip(batch.ours, found, strict=True):
                differing += not self.outputs.is_same(own, other)
                largest = max(largest, self.outputs.difference(own, other))
            count += len(found)
            if self.metric is not None:
                ours.update(self.outputs.batch(batch.ours), batch.true)
                theirs.update(self.outputs.batch(found), batch.true)
        values = (None, None) if self.metric is None else (float(ours.compute()), float(theirs.compute()))
        return Agreement(count, not self.has_data, differing, largest, self.outputs.unit, self.metric, *values)

    def _run_on(self, run: Run, picture: Input) -> list[Tensor]:
        if not self.has_preprocessing:
            return self.outputs.of_runtime(run(self.inputs(picture)), (1.0, 1.0))
        pixels, whole = self.picture(picture)
        self._require_size(pixels.shape[:2], picture.name)
        return self.outputs.of_runtime(run(pixels[None]), (whole[0] / pixels.shape[1], whole[1] / pixels.shape[0]))

    def _require_size(self, found: tuple[int, ...], name: str) -> None:
        if self.size in (None, found):
            return
        raise UsageError(
            f"{name} has {found[0]} x {found[1]} pixels, but the exported model takes {self.size[0]} x {self.size[1]}",
            why="without `size` among `dynamic`, all pictures have the size of the first",
            fix='dynamic=["batch", "size"]',
        )

    def picture(self, given: Input) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
        """The pixels (H, W, C) of an image as the exported model takes them, and the (width, height) of its file."""
        seen: list[tuple[Image.Image, tuple[int, int]]] = []
        given.read(self._decoding, seen=lambda image, whole: seen.append((image.copy(), whole)))
        image, whole = seen[0]
        channels = self.task.preprocessing.input_size[0]
        pixels = np.asarray(image.convert("RGB") if channels == 3 else image)
        return pixels if pixels.ndim == 3 else pixels[..., None], whole

    def inputs(self, given: Input) -> np.ndarray[Any, Any]:
        """The normalised input (1, C, h, w) that the task itself is given."""
        transform = eval_transform(self.task.preprocessing)
        return transform.rest(given.read(transform.first))[None].numpy()
