"""How many images per second this machine does with a backbone, option by option, and which of them `auto` takes."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.errors import UsageError
from flashtask.core.library_internals import is_from_compiler
from flashtask.core.worker_threads import fitting_threads
from flashtask.data.images import prepare_decoders
from flashtask.data.threads import in_threads, num_cores
from flashtask.data.transforms import eval_transform
from flashtask.tasks.batches import StepOutput
from flashtask.tasks.image_classification import ImageClassifier
from flashtask.tasks.prediction import evaluating, predictions_of
from flashtask.trainer.batch_transfer import channels_last
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.devices.precision import Precision, resolve_precision
from flashtask.trainer.optimizers import make_optimizer
from flashtask.trainer.trainer import Trainer

__all__ = ["PHOTOGRAPH", "AutoChoice", "Rate", "Speed", "auto_choice", "prepared_speed"]

#: (width, height) of the pictures that are decoded: a photograph of a data set, and one of a camera.
PHOTOGRAPH, _CAMERA = (500, 375), (4000, 3000)
_ROUNDS = 3
_CLASSES = 10
#: Images that are predicted in a round, however long that takes: prediction computes them in batches.
_LEAST_PREDICTED = 64
#: More than anything predicts in a round.
_ENDLESS = 1_000_000
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class AutoChoice:
    """What a Trainer that is told nothing takes.

    Args:
        device: it computes on.
        precision: name of the number format of training steps.
        inference_precision: that of evaluation and prediction.
        memory_format: `contiguous` or `channels_last`.
        has_bfloat16: the device computes bfloat16 itself.
    """

    device: torch.device
    precision: str
    inference_precision: str
    memory_format: str
    has_bfloat16: bool


@dataclass
class Rate:
    """One option and its images per second, a number a round.

    Args:
        work: `forward`, `train`, `predict` or `decode`.
        option: what is varied.
        run: works for at least so many seconds, and says how many images that were and how long it took.
        is_auto: flashtask takes this option by itself.
    """

    work: str
    option: str
    run: Callable[[float], tuple[int, float]]
    is_auto: bool = False
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Images per second."""
        return median(self.rounds)


@dataclass
class Speed:
    """All that is measured for one backbone.

    Args:
        task: with random weights.
        auto: what a Trainer takes.
        num_threads: threads in which prediction computes; 0 if it takes the plain path.
        keeps_memory: the C library was told to keep freed memory, as prediction tells it.
        rates: in the order of the table; those without rounds have not been measured.
    """

    task: ImageClassifier
    auto: AutoChoice
    num_threads: int
    keeps_memory: bool
    rates: list[Rate]

    def measure(self, seconds: float) -> None:
        """Measure every option in turn, three times over, after a first call that does not count.

        Args:
            seconds: for each option, over all rounds.
        """
        for rate in self.rates:
            rate.run(0)
        for _ in range(_ROUNDS):
            for rate in self.rates:
                images, spent = rate.run(seconds / _ROUNDS)
                rate.rounds.append(images / spent)

    @property
    def measured(self) -> list[Rate]:
        """Those that have been measured at least once."""
        return [rate for rate in self.rates if rate.rounds]

    def seconds_per_image(self, work: str) -> float | None:
        """Of decoding a photograph and then `forward` or `train`, as `auto` does both; None if not measured."""
        parts = [rate for rate in self.measured if rate.is_auto and rate.work in (work, "decode")]
        by_work = {rate.work: 1 / rate.median for rate in reversed(parts)}  # of two that decode, the photograph
        return sum(by_work.values()) if len(by_work) == 2 else None


class _Look(Callback):
    """Keeps what the run has settled."""

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Look at the run."""
        run = trainer.active_run
        layout = next(name for name, layout in _LAYOUTS.items() if layout is run.memory_format)
        has_bfloat16 = run.device_plan.accelerator.computes_bfloat16(run.device)
        training, inference = run.device_plan.precision.name, run.device_plan.inference_precision.name
        self.found = AutoChoice(run.device, training, inference, layout, has_bfloat16)


def auto_choice(task: ImageClassifier, accelerator: str = "auto") -> AutoChoice:
    """What a Trainer takes for a task by itself: a real one predicts one image, and the task is then on its device.

    Raises:
        UsageError: there is no such device here.
    """
    look = _Look()
    trainer = Trainer(
        accelerator=accelerator,
        callbacks=[look],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.predict(task, dataloaders=[torch.zeros(1, *task.preprocessing.input_size)])
    return look.found


@contextmanager
def prepared_speed(
    backbone: str, *, batch_size: int = 32, accelerator: str = "auto", compiled: bool = False
) -> Iterator[Speed]:
    """Everything that is to be measured, with the pictures in a folder that is removed afterwards.

    Args:
        backbone: a registered name; its weights are not fetched, for they make no difference.
        batch_size: images in a batch.
        accelerator: as the Trainer takes it.
        compiled: the forward pass by torch.compile too.

    Raises:
        UnknownNameError: no backbone has this name.
        UsageError: there is no such device here.
    """
    task = ImageClassifier(backbone, num_classes=_CLASSES, pretrained=False)
    keeps_memory = keep_freed_memory()
    auto = auto_choice(task, accelerator)
    images = torch.randn(batch_size, *task.preprocessing.input_size, device=auto.device)
    with tempfile.TemporaryDirectory(prefix="flashtask-bench-") as folder:
        small, large = (_picture(Path(folder), size) for size in (PHOTOGRAPH, _CAMERA))
        num_threads = fitting_threads(task, _ENDLESS, num_cores())
        rates = [*_network(task, auto, images, compiled), *_prediction(task, small, num_threads)]
        rates += [*_decoding(task, small, PHOTOGRAPH), *_decoding(task, large, _CAMERA)]
        yield Speed(task, auto, num_threads, keeps_memory, rates)


def _network(task: ImageClassifier, auto: AutoChoice, images: torch.Tensor, compiled: bool) -> Iterator[Rate]:
    """The network alone, on a batch that is on the device."""
    device = auto.device
    names = ["32", "bf16-mixed", *(["16-mixed"] if device.type in ("cuda", "mps") else [])]
    # torch lays out 4-D weights only, and on no device but these.
    is_possible = device.type in ("cpu", "cuda") and all(p.dim() != 5 for p in task.parameters())
    layouts = ["contiguous", *(["channels_last"] if is_possible else [])]
    models = {layout: copy.deepcopy(task).to(memory_format=_LAYOUTS[layout]) for layout in layouts}
    for work, call, chosen in (("forward", _forward, auto.inference_precision), ("train", _train, auto.precision)):
        for name in names:
            for layout in layouts:
                model, precision = models[layout], resolve_precision(name, device)
                batch = channels_last(images) if layout == "channels_last" else images
                step = call(model, precision, batch)
                is_auto = (name, layout) == (chosen, auto.memory_format)
                yield Rate(work, f"{name}, {layout}", partial(_repeat, step, len(images), device), is_auto)
        if work == "forward" and compiled:
            batch = channels_last(images) if auto.memory_format == "channels_last" else images
            step = _compiled(models[auto.memory_format], resolve_precision(chosen, device), batch)
            option = f"{chosen}, {auto.memory_format}, compiled"
            yield Rate("forward", option, partial(_repeat, step, len(images), device))


def _forward(model: ImageClassifier, precision: Precision, batch: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        with evaluating(model, precision):
            model(batch)

    return step


def _compiled(model: ImageClassifier, precision: Precision, batch: torch.Tensor) -> Callable[[], object]:
    assert model.head is not None
    network = torch.compile(nn.Sequential(copy.deepcopy(model.backbone), copy.deepcopy(model.head)).eval())

    def step() -> None:
        try:
            with precision.inference():
                network(batch)
        except Exception as error:
            if not is_from_compiler(error):
                raise
            why = (str(error).strip().splitlines() or [""])[0]
            raise UsageError("torch.compile cannot compile this here", why=why, fix="leave out --compile") from error

    return step


def _train(model: ImageClassifier, precision: Precision, batch: torch.Tensor) -> Callable[[], object]:
    """Forward, loss, backward and optimizer step of the whole network, in the order of trainer/loop.py."""
    precision.convert_module(model)
    targets = torch.arange(len(batch), device=batch.device) % _CLASSES
    optimizer = make_optimizer("adamw", [{"params": list(model.parameters())}], 1e-6)

    def step() -> None:
        model.train()
        with precision.forward():
            outputs = model(batch).float()
            loss = StepOutput.of(model.loss(outputs, targets), outputs, targets).loss
        optimizer.zero_grad()
        precision.backward(loss)
        precision.unscale(optimizer)
        precision.step(optimizer)
        precision.update()

    return step


def _repeat(step: Callable[[], object], images: int, device: torch.device, seconds: float) -> tuple[int, float]:
    """Call at least once, until the time is over and the device has done it all."""
    wait = torch.get_device_module(device).synchronize
    wait()
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        step()
        count += images
        wait()
    return count, time.perf_counter() - began


def _prediction(task: ImageClassifier, path: str, num_threads: int) -> Iterator[Rate]:
    """From files to predictions, as `flashtask predict` does: decoding included."""
    yield Rate("predict", "files, plain network", partial(_predict, task, path, 0), not num_threads)
    if num_threads:
        folded = f"files, BatchNorm folded, {num_threads} {'lane' if num_threads == 1 else 'lanes'}"
        yield Rate("predict", folded, partial(_predict, task, path, num_threads), is_auto=True)


def _predict(task: ImageClassifier, path: str, num_threads: int, seconds: float) -> tuple[int, float]:
    """Timed from the first result on, so that copying the network does not count."""
    predictions = predictions_of(task, [path] * _ENDLESS, num_workers=0, num_threads=num_threads)
    with closing(cast("Generator[Any, None, None]", predictions)) as results:
        next(results)
        began, count = time.perf_counter(), 0
        for count, _ in enumerate(results, 1):
            if count >= _LEAST_PREDICTED and time.perf_counter() - began >= seconds:
                break
        return count, time.perf_counter() - began


def _decoding(task: ImageClassifier, path: str, size: tuple[int, int]) -> Iterator[Rate]:
    """From a file to the tensor that the backbone takes."""
    prepare_decoders()
    transform, cores = eval_transform(task.preprocessing), num_cores()

    def one(_: int) -> None:
        transform.rest(transform.first.read(path))

    where, cpu = f"JPEG of {size[0]}x{size[1]}", torch.device("cpu")
    yield Rate("decode", f"{where}, 1 thread", partial(_repeat, lambda: one(0), 1, cpu), is_auto=cores == 1)
    if cores > 1:
        several = partial(in_threads, one, range(4 * cores))
        yield Rate("decode", f"{where}, {cores} threads", partial(_repeat, several, 4 * cores, cpu), is_auto=True)


def _picture(folder: Path, size: tuple[int, int]) -> str:
    """A JPEG with large shapes and some grain, about as many bytes a pixel as a photograph has."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size)
    grain = generator.normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
    pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    path = os.fspath(folder / f"{size[0]}.jpg")
    Image.fromarray(pixels).save(path, quality=90)
    return path
