"""What a model says about samples for an audit: features from the cache, and scores by cross-fitted heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtask.core.feature_store import FeatureStore, content_key
from flashtask.core.seeding import permutation
from flashtask.core.worker_threads import THREAD_BATCH, fitting_threads, in_worker_threads
from flashtask.data.audit import Examined
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.threads import num_cores
from flashtask.data.transforms import eval_transform
from flashtask.heads import build_head
from flashtask.tasks.prediction import evaluating
from flashtask.trainer.batch_transfer import channels_last
from flashtask.trainer.devices.precision import inference_precision
from flashtask.trainer.features import key_parts, weights_hash
from flashtask.trainer.run_preparation import memory_format_of

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["cross_fitted_scores", "examine", "features_of"]

_FOLDS = 5


def examine(
    task: Task, paths: Sequence[str], targets: Any, groups: Sequence[int], images: ImageSource = FILES
) -> Examined:
    """See `Examiner.examine`."""
    features = features_of(task, paths, images)
    features = features.reshape(len(features), -1) if features.ndim == 2 else features.mean(axis=1)
    scores = None if targets is None else cross_fitted_scores(features, targets, groups)
    return Examined(features, scores)


def features_of(task: Task, paths: Sequence[str], images: ImageSource = FILES) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The features of the backbone, as a run computes them in which it is frozen: from the same cache, and kept there.

    Args:
        task: whose backbone it is.
        paths: of images, or the names that `images` has for them.
        images: where the pictures are read.
    """
    dataset = ImageFileDataset(
        paths, None, eval_transform(task.preprocessing), task.preprocessing.input_size[0], images=images
    )
    precision = inference_precision(task.default_precision, task.device)
    layout = memory_format_of(task, task.device)
    contents, frozen = dataset.contents_of(range(len(paths))), task.describe_frozen()
    weights = weights_hash(task.parts_to_freeze())
    store, key = FeatureStore(), None
    if frozen is not None and contents is not None:
        key = content_key(key_parts(frozen, weights, contents, [], precision.name, layout, task.device))
        known = store.open(key)
        if known is not None and len(known) == len(paths):
            return known
    num_threads = fitting_threads(task, len(paths), num_cores())
    model = task.inference_copy(precision) if num_threads else task

    def of_batch(batch: Any) -> Any:
        batch = channels_last(batch) if layout is torch.channels_last else batch
        with precision.inference():
            return model.frozen_features((batch.to(task.device), torch.zeros(len(batch))))[0].cpu().float()

    rows = range(len(paths))
    batches = (dataset.__getitems__(rows[start : start + THREAD_BATCH]).images for start in rows[::THREAD_BATCH])  # type: ignore[attr-defined]
    with evaluating(task, precision):
        found = in_worker_threads(of_batch, batches, num_threads) if num_threads else map(of_batch, batches)
        features: np.ndarray[Any, np.dtype[np.float32]] = torch.cat(list(found)).numpy()
    if key is not None:
        about = {"backbone": str((frozen or {}).get("backbone")), "samples": len(paths), "precision": precision.name}
        store.keep(key, features, {**about, "what": f"the features of {len(paths):,} images", "weights": weights})
    return features


def cross_fitted_scores(features: Any, targets: Any, groups: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The probability of each class by ridge heads that were fitted to the other folds, (N, classes).

    Samples of a group are in the same fold: a head that has seen a copy would repeat its label, wrong or not.

    Args:
        features: (N, F).
        targets: (N,) class indices.
        groups: (N,) whole numbers.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    folds = (permutation(int(group.max()) + 1, 0, 0) % _FOLDS)[group]
    classes = int(targets.max()) + 1
    values, wanted = torch.from_numpy(np.array(features)), torch.from_numpy(np.asarray(targets, dtype=np.int64))
    scores = np.full((len(values), classes), 1 / classes)
    for fold in np.unique(folds).tolist():
        own = torch.from_numpy(folds == fold)
        if own.all():
            break  # all are copies of each other
        head: Any = build_head("ridge", values.shape[1], classes)
        head.solve(values[~own], wanted[~own])
        with torch.no_grad():
            scores[own.numpy()] = head(values[own]).double().softmax(dim=1).numpy()
    return scores
