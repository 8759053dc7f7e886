"""Whether a run works on features that are computed once, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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

__all__ = ["plan_of_features", "use_features", "use_known_features", "why_not"]

#: What sees a batch as the loader gave it, by stage.
_BATCH_HOOKS = {
    stage: tuple(f"on_{word}_batch_{end}" for word in words for end in ("start", "end"))
    for stage, words in {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}.items()
}


def use_features(run: Any) -> None:
    """Let the loaders of a run give features while its backbone is frozen, if that is right and pays.

    Raises:
        UsageError: it was asked for and cannot be.
    """
    wanted = run.trainer.feature_cache
    if wanted is False or not run.is_frozen(run.epoch):
        return
    if reason := _of_any(run, why_not(run, run.callbacks)):
        if wanted == "auto":
            if run.trainer.enable_model_summary and not run.trainer.fast_dev_run:
                run.trainer.say(f"features are computed anew in each epoch: {reason}")
            return
        raise UsageError(f"feature_cache={wanted!r} cannot be used: {reason}", fix='feature_cache="auto"')
    views = wanted if is_whole(wanted) else 1
    noun = run.module.sample_noun
    run.read_from(_wrapped(run, run.loader, views, f"training {noun}"))
    if run.validation is None:
        return
    run.validation.read_from([_wrapped(run, one, 1, f"validation {noun}") for one in run.validation.loaders])
    if run.sanity is not None:
        # A few batches are not worth a pass, and none goes through the backbone where that was done before.
        run.sanity.read_from(
            [
                FeatureLoader(one.loader, one.features, one.epoch, only_known=True)
                if isinstance(one, FeatureLoader)
                else one
                for one in run.validation.loaders
            ]
        )


def use_known_features(run: Any) -> None:
    """Let the loaders of `validate` and `test` give features of the backbone as it stands, where the store has some.

    Where it has none of these samples, they are computed and left there if the backbone was frozen in a run before, so
    that it has features of other samples; a backbone that was trained is not likely to be asked again.
    """
    if run.trainer.feature_cache is False or run.stage == "predict":
        return
    if _of_any(run, _not_by_itself(run, run.callbacks)):
        return
    whole = all(limit is None for limit in run.limits)
    noun = f"{run.word} {run.module.sample_noun}"
    loaders = [_wrapped(run, loader, 1, noun, epoch=lambda: 0) for loader in run.loaders]
    for loader in loaders:
        if isinstance(loader, FeatureLoader):
            loader.only_known = not (whole and loader.features.are_of_a_known_part())
    run.read_from(loaders)


def plan_of_features(run: Any, callbacks: Sequence[Any]) -> tuple[bool, str]:
    """Whether a fit that is ready would compute features once, and a sentence that says so or why not.

    Args:
        run: of the fit.
        callbacks: those that it would have.
    """
    wanted = run.trainer.feature_cache
    if not run.is_frozen(run.epoch):
        return False, "features are computed anew in each epoch: the backbone trains from the first epoch on"
    reason = "feature_cache=False" if wanted is False else why_not(run, callbacks)
    if reason:
        return False, f"features are computed anew in each epoch: {reason}"
    views = f" in {wanted} views" if is_whole(wanted) else ""
    return True, f"features of the frozen backbone are computed once{views} unless they are in the cache already"


def why_not(run: Any, callbacks: Sequence[Any]) -> str:
    """Why features cannot be computed once for all epochs of a fit, in words; empty if they can.

    Args:
        run: of the fit.
        callbacks: those that are told of its batches.
    """
    wanted, loader, order = run.trainer.feature_cache, run.loader, run.ordered
    if reason := _not_by_itself(run, callbacks):
        return reason
    if order is None or not isinstance(loader.dataset, SeededDataset):
        return "whether a sample is the same in every epoch is known of flashtask's own datasets alone"
    if not is_whole(wanted) and not loader.dataset.repeats_itself():
        return "the training data is augmented at random, so every epoch sees other inputs"
    if _samples_wanted(run) < order.length:
        return "the run sees fewer samples than there are"
    return ""


def _not_by_itself(run: Any, callbacks: Sequence[Any]) -> str:
    """Why the steps of a run cannot be given features, whatever the data is."""
    if not run.module.takes_features(run.stage):
        return f"the steps of {type(run.module).__name__} want the inputs themselves"
    if any(hook is not None for hook in run.transfer):
        return "batches are changed on their way to the device"
    if watching := _watching(run, callbacks):
        return f"{watching} is told of batches"
    return ""


def _of_any(run: Any, reason: str) -> str:
    """The reason of the first process that has one: all of them decide alike, or they would wait for each other."""
    return next(filter(None, run.strategy.gather(reason)), "")


def _wrapped(run: Any, loader: Any, views: int, what: str, epoch: Callable[[], int | None] | None = None) -> Any:
    dataset = getattr(loader, "dataset", None)
    order = getattr(loader, "batch_sampler", None)
    if not isinstance(order, OrderedBatches) or not isinstance(dataset, SeededDataset):
        return loader
    if views == 1 and not dataset.repeats_itself():
        return loader
    features = SampleFeatures(run, loader, views, what, FeatureStore())
    return FeatureLoader(loader, features, epoch or partial(_frozen_epoch, run))


def _frozen_epoch(run: Any) -> int | None:
    """The epoch of a fit if the whole backbone is frozen in it."""
    epoch: int = run.epoch
    return epoch if run.is_frozen(epoch) else None


def _watching(run: Any, callbacks: Sequence[Any]) -> str:
    """The first callback or module of the user's that wants to see batches."""
    for owner, base in [(run.module, Module), *((one, Callback) for one in callbacks)]:
        if type(owner).__module__.partition(".")[0] == "flashtask":
            continue  # the engine's own look at numbers of batches alone
        for name in _BATCH_HOOKS[run.stage]:
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
