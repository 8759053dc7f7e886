"""A model that is being served: decoding in threads, then batches of whatever is waiting.

An image waits for others only while more are being decoded, and at most a quarter of the time that a batch takes, which
is measured. So a single client gets its answer as fast as without batches, and many clients share batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.worker_threads import THREAD_BATCH, compute_in, fitting_threads
from flashtask.data.images import prepare_decoders
from flashtask.data.inputs import Input
from flashtask.data.threads import num_cores
from flashtask.data.transforms import eval_transform
from flashtask.tasks.explanation import heat_maps, heated_whole
from flashtask.tasks.loading import load
from flashtask.tasks.prediction import evaluating
from flashtask.tasks.pretrained.source import find_source
from flashtask.trainer.devices.precision import inference_precision

__all__ = ["ServedModel"]

#: The share of the measured seconds of a batch that an image waits for others.
_WAIT = 0.25
#: Batches a thread that may wait decoded; above that, decoding waits.
_MOST_BATCHES = 2
#: Images at a time on a device that is not a CPU.
_DEVICE_BATCH = 64
#: Pixels of the longer side of a picture with a heat map.
_HEATED_SIDE = 640
#: The weight of the last batch in the measured seconds of a batch.
_NEWEST = 0.2


@dataclass(eq=False)
class _Job:
    """An image on its way."""

    image: torch.Tensor
    source: Input
    answer: Future[Any]


class ServedModel:
    """A checkpoint in memory, ready to predict; several threads may ask at once.

    Args:
        name: what clients call it.
        source: what `flashtask.load` takes.
        device: where it is computed.
        precision: as for `flashtask predict --precision`; None is what the checkpoint was trained to be used with.

    Raises:
        FlashtaskError: as `flashtask.load`.
    """

    def __init__(self, name: str, source: Any, device: Any = "cpu", precision: str | None = None) -> None:
        self.name, self.source = name, source
        found = find_source(source)
        self.task = load(found.path, torch.device(device)).to(device)
        if precision is not None:
            self.task.default_precision = precision
        self.version = found.record.get("sha256") or found.record["commit"]
        self.labels: tuple[str, ...] = tuple(getattr(self.task, "labels", None) or ())
        self._transform = eval_transform(self.task.preprocessing)
        self._precision = inference_precision(self.task.default_precision, self.task.device)
        on_cpu = self.task.device.type == "cpu"
        lanes = fitting_threads(self.task, 2 * THREAD_BATCH, num_cores())
        self._network = self.task.inference_copy(self._precision) if lanes else self.task
        self.batch_size = THREAD_BATCH if on_cpu else _DEVICE_BATCH
        self._computes = ThreadPoolExecutor(max(1, lanes), "flashtask-model")
        self._threads = max(1, torch.get_num_threads() // lanes) if lanes else None
        self._decodes = ThreadPoolExecutor(num_cores(), "flashtask-decode")
        #: Heat maps one at a time, so that they take little from predictions.
        self._explains = ThreadPoolExecutor(1, "flashtask-explain")
        #: Held while the task itself computes, where predictions are not computed by a copy of it.
        self._task_is_used = threading.Lock()
        #: Whether there are heat maps of answers; known once the model is warm.
        self.has_heat_maps = False
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._num_decoding = 0
        self._most_waiting = _MOST_BATCHES * self.batch_size * max(1, lanes)
        self._seconds = 0.0
        self._is_closing = False
        keep_freed_memory()
        prepare_decoders()
        self._workers = [self._computes.submit(self._compute) for _ in range(max(1, lanes))]

    def predict(self, source: Input) -> Future[Any]:
        """The prediction of one image, when it is there.

        The future fails with a `BadDataError`, `HubError` or `IntegrityError` for an image that cannot be read.

        Args:
            source: read and decoded in another thread.
        """
        answer: Future[Any] = Future()
        with self._changed:
            self._num_decoding += 1
        self._decodes.submit(self._decode, source, answer)
        return answer

    def explain(self, source: Input) -> Future[Image.Image | None]:
        """One image with a heat map of where its label comes from; None if the model has none.

        The future fails as that of `predict`.

        Args:
            source: read and decoded in another thread.
        """
        return self._explains.submit(self._heated, source)

    def warm_up(self) -> None:
        """Predict a grey picture alone and a full batch of them, so that the first client does not wait for it."""
        _, height, width = self.task.preprocessing.input_size
        grey = Input("warm-up", np.full((height, width, 3), 127, np.uint8))
        for count in (1, self.batch_size):
            for answer in [self.predict(grey) for _ in range(count)]:
                answer.result()
        self.has_heat_maps = bool(self.labels) and self._explains.submit(self._has_heat, grey).result()

    def close(self) -> None:
        """End the threads, after everything that was accepted has been answered."""
        self._decodes.shutdown()
        self._explains.shutdown()
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._computes.shutdown()

    def about(self) -> dict[str, Any]:
        """Name, task, labels, the weights' SHA-256 (or the hub's commit) as `version`, and whether it has heat maps.

        After `flashtask operate` also the temperature of the scores, and whether predictions have a `decision`.
        """
        about: dict[str, Any] = {"name": self.name, "task": self.task.name, "labels": list(self.labels)}
        about |= {"version": self.version, "heat_maps": self.has_heat_maps}
        points = getattr(self.task, "operating", None)
        return about if points is None else {**about, "temperature": points.temperature, "decides": points.decides}

    def _has_heat(self, source: Input) -> bool:
        with self._alone():
            return heat_maps(self.task, [source]) is not None

    def _heated(self, source: Input) -> Image.Image | None:
        with self._alone():
            return heated_whole(self.task, source, _HEATED_SIDE) if self.has_heat_maps else None

    def _alone(self) -> AbstractContextManager[object]:
        """While the task itself computes: a heat map hooks its modules, and predictions may be computed by it."""
        return self._task_is_used if self._network is self.task else nullcontext()

    def _decode(self, source: Input, answer: Future[Any]) -> None:
        try:
            if answer.cancelled():
                return
            image = self._transform.rest(source.read(self._transform.first))
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) < self._most_waiting)
                self._waiting.append(_Job(image, source, answer))
        except BaseException as error:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        finally:
            with self._changed:
                self._num_decoding -= 1
                self._changed.notify_all()

    def _compute(self) -> None:
        if self._threads is not None:
            compute_in(self._threads)
        while jobs := self._next_batch():
            wanted = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if not wanted:
                continue
            start = time.perf_counter()
            try:
                predictions = self._predictions_of(wanted)
            except BaseException as error:
                for job in wanted:
                    job.answer.set_exception(error)
                continue
            for job, prediction in zip(wanted, predictions, strict=True):
                job.answer.set_result(prediction)
            seconds = time.perf_counter() - start
            self._seconds = (1 - _NEWEST) * self._seconds + _NEWEST * seconds if self._seconds else seconds

    def _next_batch(self) -> list[_Job]:
        """What is waiting, up to a batch; empty at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self.batch_size or not self._num_decoding,
                    timeout=_WAIT * self._seconds,
                )
                jobs = [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
                self._changed.notify_all()
                if jobs or self._is_closing:
                    return jobs
                # Another thread took them while this one waited.

    def _predictions_of(self, jobs: list[_Job]) -> list[Any]:
        images = [job.image for job in jobs]
        batch = torch.cat(images) if self._transform.is_tiled else torch.stack(images)
        batch = batch.to(self.task.device, memory_format=torch.channels_last)
        with self._alone(), self._inference():
            outputs = self._network.predict_step(self._precision.convert_batch(batch), 0)
        return list(self.task.to_predictions(outputs, [job.source for job in jobs]))

    def _inference(self) -> AbstractContextManager[object]:
        is_copy = self._network is not self.task
        return self._precision.inference() if is_copy else evaluating(self.task, self._precision)
