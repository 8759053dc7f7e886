"""Whether a run trains on features that are computed once, and if not, why."""

from __future__ import annotations

from typing import Any

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.core.seeding import SeededDataset
from flashtask.trainer.callbacks.base import Callback
from flashtask.trainer.feature_cache.loaders import FeatureLoader
from flashtask.trainer.feature_cache.sources import SampleFeatures
from flashtask.trainer.feature_cache.store import FeatureStore
from flashtask.trainer.loading import OrderedBatches
from flashtask.trainer.module import Module

__all__ = ["use_features", "why_not"]

#: What sees a batch as the loader gave it.
_BATCH_HOOKS = tuple(f"on_{word}_batch_{end}" for word in ("train", "validation") for end in ("start", "end"))


def use_features(run: Any) -> None:
    """Let the loaders of a run give features while its backbone is frozen, if that is right and pays.

    Raises:
        UsageError: it was asked for and cannot be.
    """
    wanted = run.trainer.feature_cache
    if wanted is False or not run.is_frozen(run.epoch):
        return
    reason = why_not(run)
    if reason:
        if wanted == "auto":
            if run.trainer.enable_model_summary and not run.trainer.fast_dev_run:
                run.trainer.say(f"features are computed anew in each epoch: {reason}")
            return
        raise UsageError(f"feature_cache={wanted!r} cannot be used: {reason}", fix='feature_cache="auto"')
    views = wanted if is_whole(wanted) else 1
    noun = run.module.sample_noun
    run.loader = _wrapped(run, run.loader, views, f"training {noun}")
    if run.validation is not None:
        loaders = run.validation.loaders
        run.validation.loaders = [_wrapped(run, one, 1, f"validation {noun}") for one in loaders]


def why_not(run: Any) -> str:
    """Why features cannot be computed once for all epochs, in words; empty if they can."""
    module, wanted = run.module, run.trainer.feature_cache
    if not module.takes_features():
        return f"the steps of {type(module).__name__} want the inputs themselves"
    order = run.ordered
    if order is None or not isinstance(run.loader.dataset, SeededDataset):
        return "whether a sample is the same in every epoch is known of flashtask's own datasets alone"
    if not is_whole(wanted) and not run.loader.dataset.repeats_itself():
        return "the training data is augmented at random, so every epoch sees other inputs"
    if any(hook is not None for hook in run.transfer):
        return "batches are changed on their way to the device"
    if watching := _watching(run):
        return f"{watching} is told of batches"
    if run.strategy.world_size > 1:
        return "several processes train"
    if _samples_wanted(run) < order.length:
        return "the run sees fewer samples than there are"
    return ""


def _wrapped(run: Any, loader: Any, views: int, what: str) -> Any:
    dataset = getattr(loader, "dataset", None)
    order = getattr(loader, "batch_sampler", None)
    if not isinstance(order, OrderedBatches) or not isinstance(dataset, SeededDataset):
        return loader
    if views == 1 and not dataset.repeats_itself():
        return loader
    return FeatureLoader(loader, SampleFeatures(run, loader, views, what, FeatureStore()), run)


def _watching(run: Any) -> str:
    """The first callback or module of the user's that wants to see batches."""
    for owner, base in [(run.module, Module), *((one, Callback) for one in run.callbacks)]:
        if type(owner).__module__.partition(".")[0] == "flashtask":
            continue  # the engine's own look at numbers of batches alone
        for name in _BATCH_HOOKS:
            method = getattr(owner, name, None)
            if method is not None and getattr(method, "__func__", method) is not vars(base).get(name):
                return f"{type(owner).__name__}.{name}"
    return ""


def _samples_wanted(run: Any) -> float:
    """How many samples the frozen epochs of a run see at the most."""
    per_epoch = run.ordered.length if run.limit is None else run.limit * run.ordered.batch_size
    batches = float("inf") if run.max_steps < 0 else run.max_steps * run.accumulation(0)
    epochs = 0
    while run.is_frozen(epochs) and (run.max_epochs is None or epochs < run.max_epochs):
        epochs += 1
        if epochs * per_epoch >= run.ordered.length:
            break
    return float(min(epochs * per_epoch, batches * run.ordered.batch_size))
