"""The feature cache of a run: whether its loaders give features that are computed once, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import SeededDataset
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.data_loaders import OrderedBatches, order_of
from flashtask.trainer.features import FrozenPart, SampleFeatures
from flashtask.trainer.hooks import is_written
from flashtask.trainer.module import Module

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.run import EvaluationRun, Run

__all__ = ["FeatureLoader", "plan_of_features", "seconds_of_features", "use_features", "use_known_features", "why_not"]

#: Hooks that are given a batch as the loader made it, by stage.
_BATCH_HOOKS = {
    stage: tuple(f"on_{word}_batch_{end}" for word in words for end in ("start", "end"))
    for stage, words in {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}.items()
}
#: Bytes of features that `feature_cache="auto"` keeps.
_MOST_BYTES = 1 << 30
#: Multiplications in the forward pass of a step; with the gradients, some milliseconds of one thread.
_SMALL = 1 << 25


def use_features(run: FitRun) -> None:
    """Let the loaders of a fit give features while its backbone is frozen, if they can be computed once.

    Raises:
        UsageError: `feature_cache` is not "auto", and they cannot.
    """
    wanted = run.trainer.feature_cache
    if wanted is False or not run.is_frozen(run.epoch):
        return
    if reason := _of_any(run, why_not(run, run.callbacks)):
        if wanted == "auto":
            if run.trainer.enable_model_summary and not run.trainer.fast_dev_run:
                run.trainer.say(f"features are computed again in each epoch: {reason}")
            return
        raise UsageError(f"feature_cache={wanted!r} cannot be used: {reason}", fix='feature_cache="auto"')
    views = wanted if is_whole(wanted) else 1
    noun = run.module.sample_noun
    part, epoch = FrozenPart(run), partial(_frozen_epoch, run)
    run.read_from(_wrapped(part, run.loader, views, f"training {noun}", epoch))
    if run.validation is None:
        return
    validation = [_wrapped(part, one, 1, f"validation {noun}", epoch) for one in run.validation.loaders]
    run.validation.read_from(validation)
    if run.sanity is not None:
        # The features that it computes are those of the first validation; without one, its few batches need no pass.
        only_known = not _validates_while_frozen(run)
        run.sanity.read_from(
            [
                FeatureLoader(one.loader, one.features, one.epoch, only_known)
                if isinstance(one, FeatureLoader)
                else one
                for one in run.validation.loaders
            ]
        )


def use_known_features(run: EvaluationRun) -> None:
    """Let the loaders of `validate` and `test` give features that the store has for the backbone's present weights.

    Features that are missing are computed and stored if there are some of other samples: then the backbone was frozen
    in an earlier run, and is likely to be used again. A backbone that was trained is not.
    """
    if run.trainer.feature_cache is False or run.stage == "predict":
        return
    if _of_any(run, _not_by_itself(run, run.callbacks)):
        return
    whole = all(limit is None for limit in run.limits)
    noun = f"{run.word} {run.module.sample_noun}"
    part = FrozenPart(run)
    loaders = [_wrapped(part, loader, 1, noun, lambda: 0) for loader in run.loaders]
    for loader in loaders:
        if isinstance(loader, FeatureLoader):
            loader.only_known = not (whole and loader.features.are_of_a_known_part())
    run.read_from(loaders)


def plan_of_features(run: FitRun, callbacks: Sequence[Callback]) -> tuple[bool, str]:
    """Whether a fit that is ready would compute features once, and a sentence about it that gives the reason.

    Args:
        run: of the fit.
        callbacks: those that it would have.
    """
    wanted = run.trainer.feature_cache
    if not run.is_frozen(run.epoch):
        return False, "features are computed again in each epoch: the backbone trains from the first epoch on"
    reason = "feature_cache=False" if wanted is False else why_not(run, callbacks)
    if reason:
        return False, f"features are computed again in each epoch: {reason}"
    views = f" in {wanted} views" if is_whole(wanted) else ""
    return True, f"features of the frozen backbone are computed once{views} unless they are in the cache already"


def seconds_of_features(run: FitRun) -> float:
    """An estimate of how long a fit that is ready computes features; those that are in the cache take no time."""
    use_features(run)
    loaders = [run.loader, *(run.validation.loaders if run.validation is not None else ())]
    return sum(one.features.estimated_seconds() for one in loaders if isinstance(one, FeatureLoader))


def why_not(run: FitRun, callbacks: Sequence[Callback]) -> str:
    """Why features cannot be computed once for all epochs of a fit, in words; empty if they can.

    Args:
        run: of the fit.
        callbacks: whose hooks are given its batches.
    """
    wanted, loader, order = run.trainer.feature_cache, run.loader, run.ordered
    if reason := _not_by_itself(run, callbacks):
        return reason
    if run.trainer.reload_dataloaders_every_n_epochs:
        return "loaders are made again in the course of the run"
    if order is None or not isinstance(loader.dataset, SeededDataset):
        return "whether a sample is the same in every epoch is only known of flashtask's own datasets"
    if not is_whole(wanted) and not loader.dataset.repeats_itself():
        return "the training data is augmented at random, so every epoch sees other inputs"
    if wanted == "auto" and (size := 4 * run.module.feature_size() * order.length) > _MOST_BYTES:
        return f"they would take {size / 1e9:.1f} GB"
    if _samples_wanted(run, order) < order.length:
        return "the run sees fewer samples than there are"
    return ""


def _not_by_itself(run: Run, callbacks: Sequence[Callback]) -> str:
    """Why the steps of a run cannot work on features, whatever the data is."""
    if not run.module.takes_features(run.stage):
        return str(run.module.why_no_features(run.stage))
    if any(hook is not None for hook in run.transfer):
        return "batches are changed on their way to the device"
    if watching := _watching(run, callbacks):
        return f"{watching} reads batches"
    return ""


def _of_any(run: Run, reason: str) -> str:
    """The reason of the first process that has one: all must decide alike, or they would wait for each other."""
    return next(filter(None, run.strategy.gather(reason)), "")


def _validates_while_frozen(run: FitRun) -> bool:
    """Whether the whole backbone is frozen until the first epoch that ends with validation is over."""
    epochs = 1 if run.solving is not None else run.trainer.check_val_every_n_epoch or 1
    return (run.max_epochs is None or epochs <= run.max_epochs) and all(map(run.is_frozen, range(epochs)))


def _wrapped(part: FrozenPart, loader: Any, views: int, what: str, epoch: Callable[[], int | None]) -> Any:
    dataset = getattr(loader, "dataset", None)
    if order_of(loader) is None or not isinstance(dataset, SeededDataset):
        return loader
    if views == 1 and not dataset.repeats_itself():
        return loader
    return FeatureLoader(loader, SampleFeatures(part, loader, views, what), epoch)


def _frozen_epoch(run: FitRun) -> int | None:
    """The epoch of a fit if the whole backbone is frozen in it."""
    return run.epoch if run.is_frozen(run.epoch) else None


def _watching(run: Run, callbacks: Sequence[Callback]) -> str:
    """The first hook, of the user's module or callbacks, that is given batches; empty if there is none."""
    for owner, base in [(run.module, Module), *((one, Callback) for one in callbacks)]:
        if type(owner).__module__.partition(".")[0] == "flashtask":
            continue  # the engine's own read only the number of a batch
        for name in _BATCH_HOOKS[run.stage]:
            if is_written(owner, name, base):
                return f"{type(owner).__name__}.{name}"
    return ""


def _samples_wanted(run: FitRun, order: OrderedBatches) -> float:
    """How many samples the frozen epochs of a run see at the most."""
    per_epoch = order.length if run.limit is None else run.limit * order.batch_size
    batches = float("inf") if run.max_steps < 0 else run.max_steps * run.accumulation(0)
    epochs = 0
    while run.is_frozen(epochs) and (run.max_epochs is None or epochs < run.max_epochs):
        epochs += 1
        if epochs * per_epoch >= order.length:
            break
    return float(min(epochs * per_epoch, batches * order.batch_size))


class FeatureLoader:
    """A loader that gives features in the epochs in which the whole backbone is frozen, else what `loader` gives.

    The samples of a batch and their order stay the same; all other attributes are those of `loader`.

    Args:
        loader: with the engine's own order.
        features: of its samples.
        epoch: gives the epoch whose features are wanted now; None if the inputs themselves are.
        only_known: give features only if they need not be computed.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        features: SampleFeatures,
        epoch: Callable[[], int | None],
        only_known: bool = False,
    ) -> None:
        self.loader, self.features, self.epoch, self.only_known = loader, features, epoch, only_known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch()
        if epoch is not None:
            self.features.renew()
        if epoch is None or (self.only_known and not self.features.are_known(epoch)):
            return iter(self.loader)
        return self._features_of(epoch)

    def _features_of(self, epoch: int) -> Iterator[Any]:
        order = order_of(self.loader)
        assert order is not None
        self.features.prepare(epoch)
        with _fitting_threads(self.features.run, order.own_size):
            for places in order:
                yield self.features.batch(places, epoch)


@contextmanager
def _fitting_threads(run: Run, batch_size: int) -> Iterator[None]:
    """Run steps on features in one thread if they are small: threads of a busy machine would wait for each other.

    With both cores of two in use elsewhere, a step of a linear head on a batch of 32 took 90 ms with two threads, and
    less than 3 ms with one.
    """
    threads = torch.get_num_threads()
    frozen = {p for part in run.module.parts_to_freeze() for p in part.parameters()}
    products = batch_size * sum(p.numel() for p in run.module.parameters() if p not in frozen)
    if run.device.type != "cpu" or threads == 1 or products > _SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
