"""Loaders of a run: an order computed from (seed, epoch), seeds that travel with the index, a position to resume from.

Only a plain `DataLoader` with a sequential or random sampler, or an `EpochSampler`, is rebuilt; subclasses, samplers of
the user's own and iterable datasets are left alone. (`overfit_batches` takes the dataset's first samples, whatever the
sampler.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, Subset

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import let_workers_go
from flashtask.core.seeded_sampler import EpochSampler
from flashtask.core.seeding import SampleKey, SeededDataset, derive_seed, permutation, sample_seeds
from flashtask.trainer.restarting_loader import RestartingLoader

__all__ = ["OrderedBatches", "batch_size_of", "begin_at", "end_workers", "known_shares", "length_of", "order_of"]
__all__ += ["rebuild_loader", "shares_of_group", "taken_in_turn", "with_order"]


class OrderedBatches(Sampler[list[Any]]):
    """Batches of indices in the order of (seed, epoch), from a position in the epoch that is counted in samples.

    Args:
        samples: the indices to go through; a number means all from 0.
        batch_size: samples in a batch.
        shuffle: a permutation of (seed, epoch), else the dataset's own order.
        drop_last: leave out a last batch that is not full.
        seed: of the run.
        seeded: give `SampleKey`s (with seeds) instead of bare indices.
        process: which of how many processes this is. `batch_size` is that of one process: the processes take the
            parts of a batch that is as many times as large, one after the other.
        fills: a process that nothing is left for is given samples of another's, so that it can take part in a step.
        joins_single: a process never has one sample alone where its batches have more: the last one joins the batch
            before it, or that of the process before.
        sampler: draws the order of each epoch among `samples`, in place of a permutation.
    """

    def __init__(
        self,
        samples: int | np.ndarray[Any, Any],
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        seeded: bool,
        process: tuple[int, int] = (0, 1),
        fills: bool = False,
        joins_single: bool = False,
        sampler: EpochSampler | None = None,
    ) -> None:
        self.samples = np.arange(samples) if isinstance(samples, int) else np.asarray(samples, dtype=np.int64)
        self.length = len(self.samples) if sampler is None else len(sampler)
        self.shuffle, self.drop_last, self.fills, self.sampler = shuffle, drop_last, fills, sampler
        self.rank, self.world_size = process
        self.joins_single = joins_single and batch_size > 1
        #: samples in a batch of this process, and of all processes together
        self.own_size, self.batch_size = batch_size, batch_size * self.world_size
        self.seed, self.seeded = seed, seeded
        # A sample that occurs twice in an epoch is augmented differently each time.
        self._occurrences = _occurrences(self.samples)
        self.epoch, self.start, self.frozen = 0, 0, False

    def set_position(self, epoch: int, *, start: int = 0, frozen: bool = False) -> None:
        """Where the next iterator begins: epoch, samples already consumed, whether the backbone is frozen."""
        self.epoch, self.start, self.frozen = epoch, start, frozen

    def share_out(self, batch_size: int) -> None:
        """Let the batches of one process be of this size."""
        self.own_size, self.batch_size = batch_size, batch_size * self.world_size

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        if self.joined is not None:
            rest = 0
        is_given = not self.drop_last and (rest > self.rank * self.own_size or (rest > 0 and self.fills))
        return whole + is_given

    def share(self, start: int) -> tuple[int, int]:
        """Samples of the batch that begins at a position in the epoch: those of this process, and of all of them."""
        whole = self.length - start
        if whole != self.joined:
            whole = min(self.batch_size, whole)
        own = min(self.own_size, max(0, whole - self.rank * self.own_size))
        if self.joins_single and whole > self.own_size and whole % self.own_size == 1:
            single = whole // self.own_size  # the process that would have one sample
            own += (self.rank == single - 1) - (self.rank == single)
        return own, whole

    @property
    def joined(self) -> int | None:
        """Samples of the last batch, if one that would be left over has joined it; else None."""
        is_single = self.length > self.batch_size and self.length % self.batch_size == 1
        return self.batch_size + 1 if self.joins_single and is_single and not self.drop_last else None

    def __iter__(self) -> Iterator[list[Any]]:
        if self.sampler is not None:
            drawn = self.sampler.indices(self.seed, self.epoch)
            if len(drawn) and not 0 <= drawn.min() <= drawn.max() < len(self.samples):
                given = type(self.sampler.sampler).__name__
                raise UsageError(
                    f"{given} gave the index {drawn.min() if drawn.min() < 0 else drawn.max()}, and there are "
                    f"{len(self.samples)} training samples",
                    why="a validation split makes them fewer than the data that was given",
                )
            indices = self.samples[drawn]
            occurrences = _occurrences(indices)
        else:
            order = permutation(self.length, self.seed, self.epoch) if self.shuffle else np.arange(self.length)
            indices, occurrences = self.samples[order], self._occurrences[order]
        seeds = sample_seeds(indices, self.seed, self.epoch, occurrences) if self.seeded else None
        first = self.start
        while first < self.length:
            own, whole = self.share(first)
            if (self.drop_last and whole < self.batch_size) or not (own or self.fills):
                return
            begin = first + self.rank * self.own_size if own else first
            # What only fills a step is two samples where there are two: BatchNorm refuses one alone.
            part = slice(begin, begin + (own or min(2, whole)))
            chunk = indices[part].tolist()
            if seeds is None:
                yield chunk
            else:
                own_seeds = seeds[part].tolist()
                yield [SampleKey(i, self.epoch, s, self.frozen) for i, s in zip(chunk, own_seeds, strict=True)]
            first += whole


def taken_in_turn(by_process: tuple[list[Any], ...]) -> list[Any]:
    """The order of the data from the shares of processes: the parts of the first batch of each, then of the second, ...

    Args:
        by_process: what each process has for its batches, in the order of ranks.
    """
    return [part for parts in zip_longest(*by_process, fillvalue=_MISSING) for part in parts if part is not _MISSING]


_MISSING = object()


def order_of(loader: object) -> OrderedBatches | None:
    """The engine's own order of a loader's samples; None for a loader of the user's that was left alone."""
    order = getattr(loader, "batch_sampler", None)
    return order if isinstance(order, OrderedBatches) else None


def begin_at(loader: Any, epoch: int, *, sample: int | None = None, batch: int = 0, frozen: bool = False) -> bool:
    """Where the next iterator of a loader begins.

    Args:
        loader: of the engine's order, of several loaders, or of the user's own.
        epoch: whose order it has.
        sample: samples of the epoch that are left out; None where batches are counted.
        batch: batches that are left out.
        frozen: whether the backbone is frozen in the epoch.

    Returns:
        Whether it begins there; the order of a loader of the user's own begins with the first batch.
    """
    order = order_of(loader)
    if order is not None:
        order.set_position(epoch, start=batch * order.batch_size if sample is None else sample, frozen=frozen)
        return True
    if hasattr(loader, "begin_at"):
        return bool(loader.begin_at(epoch, batch, frozen))
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    for one in {id(one): one for one in (sampler, batches, getattr(batches, "sampler", None))}.values():
        set_epoch = getattr(one, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    return not batch


def known_shares(loader: Any, sample: int, batch: int, count: int, num_processes: int) -> list[tuple[int, int]] | None:
    """For the next batches of a loader: samples of this process, and of all; None if each process has its own samples.

    Args:
        loader: of the engine's order, of several loaders, or of the user's own.
        sample: the place of the first batch in the epoch, in samples.
        batch: the same in batches.
        count: how many batches.
        num_processes: that train together.
    """
    order = order_of(loader)
    if order is not None:
        # The sampler knows how many samples it handed out; a batch may not look like its number of samples.
        whole = [order.share(sample + number * order.batch_size) for number in range(count)]
        return whole if order.world_size == num_processes else None
    if num_processes == 1 or not hasattr(loader, "share"):
        return None
    found = [loader.share(batch + number) for number in range(count)]
    return None if None in found else found


def shares_of_group(
    sizes: Sequence[int], known: Sequence[tuple[int, int]] | None, num_processes: int
) -> list[tuple[int, int, float]]:
    """For each batch of an accumulation group: its samples, those that all processes take, how much its loss counts.

    Processes add up what they have and divide it by their number, so a loss counts that number of times more.

    Args:
        sizes: of the batches, as they look.
        known: what `known_shares` gives for them.
        num_processes: that train together.
    """
    if known is not None and num_processes > 1:
        total = sum(whole for _, whole in known)
        return [(own, whole, num_processes * own / total) for own, whole in known]
    own_total = sum(sizes)
    of_all = sizes if known is None else [whole for _, whole in known]
    shares = [1 if size == own_total else size / own_total for size in sizes]
    return list(zip(sizes, of_all, shares, strict=True))


def _occurrences(samples: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often each sample occurs before its position in the list: 0 everywhere where none occurs twice."""
    by_sample = np.argsort(samples, kind="stable")
    _, first, counts = np.unique(samples[by_sample], return_index=True, return_counts=True)
    found = np.empty(len(samples), dtype=np.int64)
    found[by_sample] = np.arange(len(samples)) - np.repeat(first, counts)
    return found


def rebuild_loader(
    loader: Any,
    *,
    seed: int,
    training: bool,
    in_order: bool = False,
    joins_single: bool = False,
    process: tuple[int, int] = (0, 1),
) -> Any:
    """The same loader with the run's order, or the loader itself where that cannot be done.

    Args:
        loader: what a `*_dataloader` method returned.
        seed: of the run.
        training: a training loader; it is shuffled only if the user's own was.
        in_order: do not shuffle, whatever the user's own does.
        joins_single: as in `OrderedBatches`.
        process: which of how many processes this is; each is given its share.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    if type(loader.sampler) not in (SequentialSampler, RandomSampler, EpochSampler) and not in_order:
        return loader
    if _has_options(loader.sampler) and not in_order:
        return loader
    dataset, samples = _through_subsets(loader.dataset)
    batches = OrderedBatches(
        samples,
        loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler) and not in_order,
        drop_last=loader.drop_last,
        seed=seed if training else derive_seed("evaluation", seed),
        seeded=isinstance(dataset, SeededDataset),
        process=process,
        fills=training,
        joins_single=joins_single,
        sampler=loader.sampler if isinstance(loader.sampler, EpochSampler) and not in_order else None,
    )
    return with_order(
        loader,
        dataset,
        batches,
        # Of its own: a new iterator would otherwise draw from the stream that dropout uses.
        generator=torch.Generator().manual_seed(derive_seed("loader", seed)),
        timeout=loader.timeout,
        in_order=loader.in_order,
        persistent_workers=loader.persistent_workers,
    )


def with_order(loader: DataLoader[Any], dataset: Any, order: OrderedBatches, **options: Any) -> DataLoader[Any]:
    """A loader that loads like another one, in another order.

    Args:
        loader: whose processes and functions it has.
        dataset: to load.
        order: of the batches.
        options: further arguments of `DataLoader`.
    """
    return RestartingLoader(
        dataset,
        batch_sampler=order,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **options,
    )


def end_workers(loader: Any) -> None:
    """End the processes of a loader that `rebuild_loader` made, or of several; the user's own are left alone."""
    for one in getattr(loader, "flattened", [loader]):
        if order_of(one) is not None:
            let_workers_go(one)


def _through_subsets(dataset: Any) -> tuple[Any, int | np.ndarray[Any, Any]]:
    """The seeded dataset that a `Subset` (of a `Subset`) takes its samples from, and which; else the dataset itself.

    A key cannot pass through a `Subset`, which only maps bare indices.
    """
    inner, samples = dataset, np.arange(len(dataset))
    while type(inner) is Subset:
        samples = np.asarray(inner.indices, dtype=np.int64)[samples]
        inner = inner.dataset
    return (inner, samples) if isinstance(inner, SeededDataset) else (dataset, len(dataset))


def _has_options(sampler: Any) -> bool:
    """A random sampler with replacement or a number of samples is the user's own choice of order."""
    if not isinstance(sampler, RandomSampler):
        return False
    return sampler.replacement or sampler.num_samples != len(sampler.data_source)


def length_of(loader: Any) -> int | None:
    """How many batches a loader has, or None if it does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def batch_size_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor in it, 1 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for part in batch:
            if isinstance(part, (torch.Tensor, dict, list, tuple)):
                return batch_size_of(part)
        return max(1, len(batch))
    return 1
