"""Features of the frozen part of a module: of each sample, computed once and kept for later runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from flashtask._version import __version__
from flashtask.core.allocator import keep_freed_memory
from flashtask.core.errors import UsageError
from flashtask.core.feature_store import Features, FeatureStore, content_key, row_names
from flashtask.core.library_internals import change_count
from flashtask.core.machine import num_cores
from flashtask.core.seeding import SeededDataset
from flashtask.core.worker_threads import THREAD_BATCH, fitting_threads, in_worker_threads
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.data_loaders import OrderedBatches, order_of, with_order
from flashtask.trainer.distribution.sharded_tensors import of_this_process
from flashtask.trainer.module import Module
from flashtask.trainer.signals import RunInterruptedError

if TYPE_CHECKING:
    from flashtask.trainer.distribution.process_strategies import Strategy
    from flashtask.trainer.run import Run

__all__ = ["FrozenFeatures", "FrozenPart", "SampleFeatures", "key_parts", "rows_of_all", "weights_hash"]

#: Samples in a batch of the pass on an accelerator, at the least: without gradients larger ones cost little memory.
_BATCH = 32
#: Batches after which the processes agree again to go on.
_ROUND = 8
#: Batches of each thread from which the time of a whole pass is estimated.
_MEASURED = 8
#: Bytes that one process sends to the others at a time.
_PIECE = 1 << 25
#: Raised when the same parts of a key would mean other features.
_FORM = 2


class FrozenFeatures(NamedTuple):
    """Features in a batch, in the place of the inputs that they were computed from.

    Args:
        values: the features, (B, ...).
    """

    values: Tensor


class FrozenPart:
    """What computes the features of a run's loaders: its weights, and a copy of the module for inference.

    Args:
        run: whose module it is.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        #: a hash of weights and buffers, the same in every process; known after `renew`
        self.weights = ""
        #: the data whose features it computes
        self.sources: list[SampleFeatures] = []
        # How often torch has written to the weights.
        self._writes = -1
        self._copy: Any = None

    def renew(self) -> None:
        """Find out whether the weights have changed; for every process."""
        parts, strategy = self.run.module.parts_to_freeze(), self.run.strategy
        if not strategy.reduce(int(_writes(parts) != self._writes), "max"):
            return
        with strategy.whole_weights(self.run.module):
            hashed = weights_hash(parts)
            if len(set(strategy.gather(hashed))) > 1:
                # Statistics of BatchNorm, for one, are each process's own until its next step.
                _take_first(parts, strategy)
                hashed = weights_hash(parts)
        if hashed != self.weights:
            self._copy = None
        self._writes, self.weights = _writes(parts), hashed

    def inference_copy(self) -> Any:
        """The module's `inference_copy`: made once, and kept until all sources have their features."""
        if self._copy is None:
            self._copy = self.run.module.inference_copy(self.run.inference_precision)
        return self._copy

    def release_copy(self) -> None:
        """Drop the copy, which is as large as the module, if all sources have their features."""
        if all(source.is_complete for source in self.sources):
            self._copy = None


class SampleFeatures:
    """The features of the samples that a loader goes through, each computed once for each view.

    Each of several processes computes a share and receives the others'. All of them agree on weights, keys and what
    is stored, so methods that are marked "for every process" must be called by all, in the same order.

    Args:
        part: what computes them.
        loader: of the engine's own order, over a `SeededDataset`.
        views: how many random draws of a sample there are; epoch `e` sees view `e % views`.
        what: what messages call the samples: `training images`.
    """

    def __init__(self, part: FrozenPart, loader: DataLoader[Any], views: int, what: str) -> None:
        self.run, self.part, self.loader = part.run, part, loader
        self.views, self.what, self.store = views, what, FeatureStore()
        self.dataset: SeededDataset = loader.dataset  # type: ignore[assignment]
        order = order_of(loader)
        assert order is not None
        self.order = order
        # A sample that is twice in an epoch has one row in each view, so views cannot distinguish the two.
        self.indices = np.unique(order.samples)
        self._views: dict[int, Features] = {}
        self._keys: dict[int, str | None] = {}
        # Of the frozen part, when the features were computed.
        self._weights = ""
        self._targets: Tensor | None = None
        part.sources.append(self)

    @property
    def _batch_size(self) -> int:
        return THREAD_BATCH if self.run.device.type == "cpu" else max(self.order.own_size, _BATCH)

    def prepare(self, epoch: int) -> None:
        """Find the features of an epoch, or compute them."""
        self._view(epoch % self.views)
        self.part.release_copy()

    def batch(self, places: Sequence[Any], epoch: int) -> tuple[FrozenFeatures, Any]:
        """A batch of samples: their features and targets, as a loader would give inputs and targets."""
        features = self._view(epoch % self.views)
        indices = [place if isinstance(place, int) else place.index for place in places]
        rows = np.searchsorted(self.indices, indices)
        values = torch.from_numpy(features[rows])
        return FrozenFeatures(values), self._targets_of(indices, rows)

    @property
    def _has_targets(self) -> bool:
        """Whether the dataset gives targets without inputs."""
        return self.dataset.targets_of([]) is not None

    def _targets_of(self, indices: list[int], rows: Any) -> Any:
        if (known := self.dataset.targets_of(indices)) is not None:
            return default_collate(list(known))
        assert self._targets is not None
        return self._targets[torch.from_numpy(rows)]

    def renew(self) -> None:
        """Forget the features where the frozen part has been trained since they were computed; for every process."""
        self.part.renew()
        if self.part.weights != self._weights:
            self._views.clear()
            self._keys.clear()
            self._weights = self.part.weights

    @property
    def is_complete(self) -> bool:
        """Whether the features of all views are there, of the weights as they are now."""
        return len(self._views) == self.views and self._weights == self.part.weights

    def are_known(self, epoch: int) -> bool:
        """Whether the features of an epoch are in memory or in the store; for every process."""
        number = epoch % self.views
        if number not in self._views and (known := self._stored(number)) is not None:
            self._views[number] = known
        return number in self._views

    def estimated_seconds(self) -> float:
        """An estimate of how long the features take that are not in the cache, from a few batches."""
        self.renew()
        missing = self.indices[~self._known_rows(0)[1]]
        if self.are_known(0) or not len(missing):  # other data may have all of them
            return 0.0
        threads = self._num_threads(len(self.indices))
        some = missing[: _MEASURED * self._batch_size * max(1, threads)]
        began = time.perf_counter()
        if threads:
            self.part.inference_copy()
        ready = time.perf_counter()
        self._computed_of(some, 0, -(-len(some) // self._batch_size), len(self.indices))
        spent = time.perf_counter() - ready
        return ready - began + spent * self.views * len(missing) / len(some)

    def are_of_a_known_part(self) -> bool:
        """Whether the store has features of any samples from a part with these weights; for every process."""
        self.renew()
        return bool(self.run.strategy.reduce(int(self.store.has_features_of(self._weights)), "max"))

    def _view(self, number: int) -> Features:
        if not self.are_known(number):
            self._views[number] = self._computed(number)
        return self._views[number]

    def _stored(self, number: int) -> Features | None:
        """The features of a view from the store; one machine of several may have them for all."""
        if (key := self._key(number)) is None:
            return None
        if self._targets is None and not self._has_targets:
            return None  # the pass is needed for the targets
        known = self.store.open(key)
        if known is not None and len(known) != len(self.indices):
            known = None
        have = self.run.strategy.gather(known is not None)
        if not any(have):
            return None
        self._say(f"{self._counted(number)} are in the cache")
        return known if all(have) else self._sent(number, known, have.index(True))

    def _sent(self, number: int, known: Features | None, owner: int) -> Features:
        """The features that one process has found, sent to all and stored where they were missing."""
        is_owner = self.run.strategy.global_rank == owner
        parts = rows_of_all(self.run.strategy, torch.from_numpy(np.array(known)) if is_owner else None)
        sent = parts[owner]
        assert sent is not None
        if known is not None:
            return known
        self._keep(number, sent.numpy())
        return sent.numpy()

    def _computed(self, number: int) -> Features:
        """The features of a view, computed, and stored for later runs if everything they depend on is known."""
        started = time.monotonic()
        is_fit = self.run.stage == "fit"
        times = "once for all epochs in which the backbone is frozen" if is_fit else "once for this model's backbone"
        known, is_known = self._known_rows(number)
        others = f"; {is_known.sum():,} of them are in the cache" if known is not None else ""
        if is_known.all():
            self._say(f"{self._counted(number)} are in the cache")
        else:
            self._say(f"computing {self._counted(number)}, {times}{others}")
        features = self._compute(number) if known is None else self._compute_others(number, known, is_known)
        kept = self._keep(number, features)
        spent = time.monotonic() - started
        where = f"kept in the cache ({features.nbytes / 1e6:.1f} MB)" if kept else "kept for this run"
        rate = int((~is_known).sum()) / max(spent, 1e-9)
        if not is_known.all():
            self._say(f"computed in {spent:.1f} s ({rate:.0f} {self.run.module.sample_noun} a second), {where}")
        return features

    def _keep(self, number: int, features: Features) -> bool:
        """Store features, in one process of each machine; whether this one has done so."""
        key = self._key(number)
        if key is None or self.run.strategy.local_rank:
            return False
        form = self._form(number)
        names = None if form is None else self._row_names()
        return self.store.keep(key, features, self._about(number), form=form or "", names=names)

    def _key(self, number: int) -> str | None:
        """A hash of everything that the features of a view depend on, None if that is not known.

        It is taken before the pass, so that a file that changes meanwhile does not get the old file's features. The
        first of several processes looks at the files and sends the hash to the others.
        """
        if number not in self._keys:
            strategy = self.run.strategy
            parts = self._parts(number) if strategy.global_rank == 0 else None
            self._keys[number] = strategy.gather(None if parts is None else content_key(parts))[0]
        return self._keys[number]

    def _counted(self, number: int) -> str:
        view = f" (view {number + 1} of {self.views})" if self.views > 1 else ""
        return f"the features of {len(self.indices):,} {self.what}{view}"

    def _say(self, text: str) -> None:
        if self.run.trainer.enable_model_summary:
            self.run.trainer.say(text)

    # ---- rows that other data has too

    @property
    def _num_full(self) -> int:
        """How many samples are computed in full batches; the others come last, in a smaller one."""
        return len(self.indices) // self._batch_size * self._batch_size

    def _form(self, number: int) -> str | None:
        """What features have in common that have the same bits for a sample, whatever it is computed beside.

        That holds on a CPU: each sample of a full batch is computed alike at every place of it. It does not hold for
        smaller batches, nor for samples whose transform draws at random.
        """
        run = self.run
        if run.strategy.world_size > 1 or run.device.type != "cpu" or not self.dataset.repeats_itself():
            return None
        if not self._has_targets or (parts := self._parts(number)) is None:
            return None
        is_copy = self._num_threads(len(self.indices)) > 0
        return content_key({**parts, "samples": "", "batch": self._batch_size, "copy": is_copy})

    def _row_names(self) -> Any:
        return row_names(self.dataset.contents_of(self.indices[: self._num_full].tolist()) or ())

    def _known_rows(self, number: int) -> tuple[Features | None, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Features of samples that the store has from other data, and of which samples they are."""
        is_known = np.zeros(len(self.indices), dtype=bool)
        form = self._form(number)
        if form is None:
            return None, is_known
        known, is_known[: self._num_full] = self.store.rows(form, self._row_names())
        return known, is_known

    def _compute_others(self, number: int, known: Features, is_known: Any) -> Features:
        """The features of a view, of which some rows are known; the others have the bits of a pass over all samples."""
        full, size = self._num_full, self._batch_size
        missing = np.flatnonzero(~is_known[:full])
        # The last of the full batches is filled up, so that it is computed as all of them are.
        filling = np.resize(np.flatnonzero(is_known), -len(missing) % size)
        places = np.concatenate([missing, filling, np.arange(full, len(self.indices))])
        features = np.empty((len(self.indices), *known.shape[1:]), dtype=np.float32)
        features[:full] = known
        if len(places):
            values, _ = self._computed_of(self.indices[places], number, -(-len(places) // size), len(self.indices))
            assert values is not None
            features[places] = values.numpy()
        return features

    # ---- the pass

    def _compute(self, number: int) -> Features:
        """Each process computes its share of the samples and receives the others'."""
        strategy = self.run.strategy
        share = -(-len(self.indices) // strategy.world_size)
        own = self.indices[strategy.global_rank * share : (strategy.global_rank + 1) * share]
        values, targets = self._computed_of(own, number, -(-share // self._batch_size), len(own))
        found = [part for part in rows_of_all(strategy, values) if part is not None]
        if self._targets is None and not self._has_targets:
            of_all = [part for part in rows_of_all(strategy, targets) if part is not None]
            self._targets = torch.cat(of_all)
        features: Features = (found[0] if len(found) == 1 else torch.cat(found)).numpy()
        assert len(features) == len(self.indices)
        return features

    def _computed_of(
        self, indices: Any, number: int, batches: int, num_samples: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features and targets of these samples, None if there are none of them.

        Args:
            indices: of the dataset.
            number: of the view.
            batches: that the largest share has.
            num_samples: of the whole pass, which decides how it is computed.
        """
        found: Features | None = None
        targets: list[Tensor] = []
        row = 0
        if self.run.device.type == "cpu":
            keep_freed_memory()
        module = self.run.module
        whole = self.run.strategy.whole_weights(module)
        with whole, _in_eval_mode(module), self._shown(batches) as show:
            source = self._features_of_batches(self._pass(number, indices), num_samples)
            for done in range(batches):
                if done % _ROUND == 0 or self.run.strategy.world_size == 1:
                    self._stop_if_interrupted()
                if (given := next(source, None)) is None:
                    continue
                values, of_batch = given
                if found is None:
                    found = np.empty((len(indices), *values.shape[1:]), dtype=np.float32)
                found[row : row + len(values)] = values.cpu().float().numpy()
                row += len(values)
                if not self._has_targets:
                    targets.append(of_batch)
                show(len(values) * self.run.strategy.world_size)
        self._stop_if_interrupted()
        assert row == len(indices)
        return None if found is None else torch.from_numpy(found), torch.cat(targets) if targets else None

    def _stop_if_interrupted(self) -> None:
        """Stop in every process if one of them has received a signal.

        Raises:
            RunInterruptedError: one has.
        """
        signal_number = self.run.strategy.reduce(self.run.interrupted_by or 0, "max")
        if signal_number:
            self.run.interrupt(signal_number)
            raise RunInterruptedError(signal_number)

    def _shown(self, batches: int) -> AbstractContextManager[Callable[[int], None]]:
        """The function to call after each batch of the pass: it moves the progress bar, if there is one."""
        bars = [one for one in self.run.callbacks if isinstance(one, ProgressBar)]
        return bars[0].during_pass("features", batches, self.run.module) if bars else nullcontext(lambda size: None)

    def _features_of_batches(self, batches: Iterator[Any], num_samples: int) -> Iterator[tuple[Tensor, Any]]:
        """Features and targets of one batch after the other; on a CPU each core computes batches of its own."""
        num_threads = self._num_threads(num_samples)
        if not num_threads:
            yield from (self._of_batch(self.run.module, batch) for batch in batches)
            return
        yield from in_worker_threads(partial(self._of_batch, self.part.inference_copy()), batches, num_threads)

    def _num_threads(self, num_samples: int) -> int:
        """How many threads compute; 0 for a module without an inference copy, or one that may not run in several."""
        run = self.run
        if type(run.module).inference_copy is Module.inference_copy or run.strategy.shares_weights:
            return 0
        return fitting_threads(run.module, num_samples, num_cores())

    def _of_batch(self, module: Module, batch: Any) -> tuple[Tensor, Any]:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not is_pair or not (self._has_targets or isinstance(batch[1], Tensor)):
            raise UsageError(
                "the feature cache needs batches of inputs and targets", fix="Trainer(feature_cache=False)"
            )
        moved = self.run.to_device(batch)
        with self.run.inference_precision.inference():
            features: Tensor = module.frozen_features(moved)[0]
        return features, batch[1]

    def _pass(self, number: int, indices: Any) -> Iterator[Any]:
        """Each of these samples once, in their order, as the epoch of the view would see it."""
        order = OrderedBatches(
            indices, self._batch_size, shuffle=False, drop_last=False, seed=self.order.seed, seeded=True
        )
        order.set_position(number, frozen=True)
        yield from with_order(self.loader, self.dataset, order, generator=torch.Generator())

    # ---- what features depend on

    def _parts(self, number: int) -> dict[str, Any] | None:
        """Everything that the features of a view depend on; None if that is not known."""
        run = self.run
        frozen, contents = run.module.describe_frozen(), self.dataset.contents_of(self.indices.tolist())
        if frozen is None or contents is None:
            return None
        draws = [] if self.dataset.repeats_itself() else [self.order.seed, number]
        precision = run.inference_precision.name
        return key_parts(frozen, self._weights, contents, draws, precision, run.memory_format, run.device)

    def _about(self, number: int) -> dict[str, Any]:
        """What `flashtask cache` shows."""
        frozen = self.run.module.describe_frozen() or {}
        return {
            "backbone": str(frozen.get("backbone", type(self.run.module).__name__)),
            "samples": len(self.indices),
            "precision": self.run.inference_precision.name,
            "what": self._counted(number),
            "weights": self._weights,
        }


def key_parts(
    frozen: Mapping[str, Any],
    weights: str,
    contents: Sequence[str],
    draws: Sequence[int],
    precision: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that features depend on, for `content_key`.

    Args:
        frozen: as `Module.describe_frozen` gives it.
        weights: as `weights_hash` gives it.
        contents: of the samples in their order, as `SeededDataset.contents_of` gives them.
        draws: what random transforms depend on; empty without any.
        precision: the name of that of inference.
        memory_format: of weights and images.
        device: that computes.
    """
    return {
        "form": _FORM,
        "flashtask": __version__,
        "torch": str(torch.__version__),
        "frozen": dict(frozen),
        "weights": weights,
        "samples": hashlib.sha256("\n".join(contents).encode()).hexdigest(),
        "draws": list(draws),
        "precision": precision,
        "memory_format": str(memory_format),
        "device": device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def rows_of_all(strategy: Strategy, rows: Tensor | None) -> list[Tensor | None]:
    """The rows that each process has, in the order of their ranks, sent in pieces to save memory.

    Args:
        strategy: over whose processes.
        rows: of this process, on the CPU, (N, ...), N >= 1; None if it has none.
    """
    if strategy.world_size == 1:
        return [rows]
    lengths = strategy.gather(0 if rows is None else len(rows))
    size = strategy.reduce(_PIECE if rows is None else max(1, _PIECE * len(rows) // max(1, rows.nbytes)), "min")
    parts: list[list[Tensor]] = [[] for _ in lengths]
    for first in range(0, max(lengths), size):
        # A slice would be pickled with the whole tensor behind it.
        own = None if rows is None else rows[first : first + size].clone()
        for kept, part in zip(parts, strategy.gather(own), strict=True):
            if part is not None:
                kept.append(part)
    return [torch.cat(kept) if kept else None for kept in parts]


def _writes(parts: Sequence[nn.Module]) -> int:
    """How often torch has written to the weights and buffers of modules."""
    held = (value for part in parts for value in part.state_dict(keep_vars=True).values())
    return sum(change_count(of_this_process(value)) for value in held)


@torch.no_grad()
def _take_first(parts: Sequence[nn.Module], strategy: Strategy) -> None:
    """Weights and buffers of modules become those of the first process."""
    for value in (one for part in parts for one in part.state_dict().values()):
        value.copy_(strategy.gather(value.cpu() if strategy.global_rank == 0 else None)[0])


def weights_hash(parts: Sequence[nn.Module]) -> str:
    """A hash of the weights and buffers of modules: names, formats and values."""
    found = hashlib.sha256()
    for number, part in enumerate(parts):
        for name, value in part.state_dict().items():
            found.update(f"{number} {name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
