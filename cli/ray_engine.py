"""Prediction on a Ray cluster: actors that hold the model predict blocks of images, and one process writes the rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtask.core.errors import UsageError

if TYPE_CHECKING:
    from flashtask.data.pictures import Pictures

__all__ = ["require_ray", "results_of_ray"]

#: Images that an actor is given at a time.
_BLOCK = 512


def require_ray() -> None:
    """Require the library.

    Raises:
        UsageError: it is not installed.
    """
    if not find_spec("ray"):
        raise UsageError("--engine ray needs Ray Data", fix='pip install "flashtask[ray]"')


class _Predictor:
    """What an actor does.

    Args:
        given: references to the task and the pictures.
        options: of `predictions_of`.
        device: that it computes on.
    """

    def __init__(self, given: tuple[Any, Any], options: Mapping[str, Any], device: str) -> None:
        import ray

        task, self._pictures = ray.get([*given])
        self._task, self._options = task.to(device), options

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        from flashtask.tasks.prediction import predictions_of

        found = np.empty(len(block["id"]), dtype=object)
        found[:] = [*predictions_of(self._task, self._pictures.at(block["id"]), **self._options)]
        return {"result": found}


def results_of_ray(
    task: Any, pictures: Pictures, options: Mapping[str, Any], actors: int | None, has_gpu: bool
) -> Iterator[Any]:
    """What `predictions_of` gives, one result after the other in the order of the pictures.

    The cluster is the one that `$RAY_ADDRESS` names, or this machine. Files must be found by the same paths everywhere;
    the model is sent.

    Args:
        task: that predicts, on the CPU.
        pictures: to predict.
        options: of `predictions_of`.
        actors: how many; None means one for each core, or each GPU.
        has_gpu: each has a GPU; otherwise a core.
    """
    if not len(pictures):
        return
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports its plan, and each stage of it
    if not ray.is_initialized():
        ray.init(logging_level="WARNING", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    kind = "GPU" if has_gpu else "CPU"
    actors = actors or max(1, int(ray.cluster_resources().get(kind, 1)))
    blocks = max(1, -(-len(pictures) // min(_BLOCK, -(-len(pictures) // actors) or 1)))
    given = (ray.put(task), ray.put(pictures))
    results = ray.data.range(len(pictures), override_num_blocks=blocks).map_batches(
        _Predictor,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if has_gpu else 0,
        num_cpus=0 if has_gpu else 1,
        fn_constructor_args=(given, dict(options), "cuda" if has_gpu else "cpu"),
    )
    for row in results.iter_rows():
        yield row["result"]
