"""Randomness and order: seeds derived from (seed, epoch, sample), never from the state of a process.

The order of samples is a permutation computed from (seed, epoch). Around `dataset[i]` the generators that its
transforms draw from are set from the sample's own seed and put back, so that the number of workers, prefetching,
a worker that died or a resumed run cannot change a pixel.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from flashtask.core.errors import UsageError

__all__ = [
    "GENERATORS",
    "SampleKey",
    "SeededDataset",
    "derive_seed",
    "fresh_seed",
    "generator_states",
    "last_seed",
    "permutation",
    "sample_seeds",
    "seed_everything",
    "seed_generators",
    "seeded",
    "seeded_generators",
    "set_generator_states",
]

GENERATORS = ("torch", "random", "numpy")

_last_seed: int | None = None


def seed_everything(seed: int = 0, workers: bool = True, verbose: bool = True) -> int:
    """Seed torch (all devices), `random` and NumPy, and make it the default seed of trainers made afterwards.

    Args:
        seed: 0 to 2**32 - 1.
        workers: accepted for compatibility; data workers are always seeded per sample.
        verbose: print the seed.

    Returns:
        The seed.
    """
    global _last_seed
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UsageError(f"seed must be a whole number from 0 to 4294967295, not {seed!r}")
    _last_seed = seed
    seed_generators(seed)
    if verbose:
        print(f"seed: {seed}")
    return seed


def seed_generators(seed: int) -> None:
    """Seed the process's default generators: torch (all devices), `random` and NumPy."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def last_seed() -> int | None:
    """The seed of the last `seed_everything`, or None."""
    return _last_seed


def fresh_seed() -> int | None:
    """The seed that torch's default generator has just been given; None if something has been drawn from it since."""
    seed = torch.initial_seed()
    is_fresh = torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
    return seed if is_fresh else None


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts (SHA-256), the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    content = text.encode("utf-8", "surrogateescape")  # names of files may not be UTF-8
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def permutation(length: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of samples of one epoch: int64 indices, computed from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64(derive_seed("order", seed, epoch))).permutation(length)


def sample_seeds(
    indices: Sequence[int] | np.ndarray[Any, Any],
    seed: int,
    epoch: int,
    occurrences: Sequence[int] | np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """One seed a sample from (seed, epoch, sample, nth occurrence in the epoch): uint64, below 2**63.

    The mixing function is SplitMix64 (Steele, Lea and Flood 2014).
    """
    base = np.uint64(derive_seed("sample", seed, epoch))
    with np.errstate(over="ignore"):
        x = np.asarray(indices, dtype=np.uint64)
        if occurrences is not None:
            x = x + (np.asarray(occurrences, dtype=np.uint64) << np.uint64(40))
        x = base + x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray[Any, np.dtype[np.uint64]] = (x ^ (x >> np.uint64(31))) >> np.uint64(1)
    return mixed


class SampleKey(NamedTuple):
    """What the sampler hands to a seeded dataset instead of a bare index: it crosses to workers with the index.

    Args:
        index: which sample.
        epoch: counted from 0.
        seed: the sample's own seed, from (run seed, epoch, sample, occurrence).
        frozen: whether the whole frozen-able part of the module (the backbone) is frozen in this epoch.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which is never called on a key
    epoch: int
    seed: int
    frozen: bool = False


@contextmanager
def seeded_generators(seed: int, generators: Sequence[str] = GENERATORS) -> Iterator[None]:
    """Set the named global generators from `seed`, and put them back as they were.

    Args:
        seed: below 2**63.
        generators: any of `torch` (the default CPU generator), `random`, `numpy`. Each costs time: 2 us a sample
            for torch alone, 74 for all three, so name only what the code inside uses.
    """
    torch_state = torch.default_generator.get_state() if "torch" in generators else None
    python_state = random.getstate() if "random" in generators else None
    numpy_state = np.random.get_state() if "numpy" in generators else None
    if torch_state is not None:
        torch.default_generator.manual_seed(seed)
    if python_state is not None:
        random.seed(seed)
    if numpy_state is not None:
        np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        if torch_state is not None:
            torch.default_generator.set_state(torch_state)
        if python_state is not None:
            random.setstate(python_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)


def generator_states() -> dict[str, Any]:
    """The states of the process's default generators: torch (CPU, every CUDA device, MPS), `random` and NumPy."""
    return {
        "torch": torch.default_generator.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if _cuda_is_used() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "random": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


def _cuda_is_used() -> bool:
    """Whether this process computes on CUDA; asking for its generators would otherwise start it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what `generator_states` gave; states of devices that are not here are left out.

    Raises:
        ValueError: the state of NumPy's generator is not valid.
    """
    _check_numpy_state(states["numpy"])
    torch.default_generator.set_state(states["torch"])
    devices = torch.cuda.device_count() if states["cuda"] else 0
    for device, state in zip(range(devices), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
    if states.get("mps") and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"][0])
    version, internal, gauss = states["random"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])


def _check_numpy_state(state: Any) -> None:
    """NumPy takes any place in its table of numbers for good, and then reads beside it."""
    inner = state["state"]
    key, place = inner["key"], inner["pos"]
    whole = isinstance(key, np.ndarray) and key.shape == (624,) and type(place) is int and 0 <= place <= 624
    if state["bit_generator"] != "MT19937" or not whole or state["has_gauss"] not in (0, 1):
        raise ValueError("the state of NumPy's generator is not valid")


class SeededDataset(Dataset[Any]):
    """A map-style dataset whose random draws depend on the sample's key alone.

    The sampler of the engine yields `SampleKey`s. For a bare integer (a loop, sampler or `ConcatDataset` of the user)
    the seed is drawn from the default generator of torch, so that the sample varies as in any other dataset.
    Subclasses define `__len__` and `sample(key)`, and name in `generators` what their transforms draw from.
    """

    generators: Sequence[str] = GENERATORS

    def sample(self, key: SampleKey) -> Any:
        """One sample; global generators are already set from `key.seed`."""
        raise NotImplementedError

    def repeats_itself(self) -> bool:
        """Whether a sample's inputs are the same in every epoch in which the whole backbone is frozen."""
        return not self.generators

    def targets_of(self, indices: Sequence[int]) -> Any:
        """The targets of samples, one row each, without their inputs; None if only the samples themselves hold them."""
        return None

    def contents_of(self, indices: Sequence[int]) -> list[str] | None:
        """What the inputs of samples are made from and how, a text each; None if that is not known."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: SampleKey | int) -> Any:
        with self.drawing(key) as key:
            return self.sample(key)

    @contextmanager
    def drawing(self, key: SampleKey | int) -> Iterator[SampleKey]:
        """Around what draws for one sample: the generators are set from its key, and put back."""
        if not isinstance(key, SampleKey):
            key = SampleKey(int(key), 0, int(torch.empty((), dtype=torch.int64).random_()))
        if not self.generators:
            yield key
            return
        with seeded_generators(key.seed, self.generators):
            yield key


class _Seeded(SeededDataset):
    def __init__(self, dataset: Dataset[Any], generators: Sequence[str]) -> None:
        self.dataset, self.generators = dataset, generators

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def sample(self, key: SampleKey) -> Any:
        return self.dataset[key.index]


def seeded(dataset: Dataset[Any], generators: Sequence[str] = GENERATORS) -> SeededDataset:
    """Wrap a map-style dataset so that its random transforms do not depend on workers, prefetching or resuming.

    Args:
        dataset: has `__len__` and `__getitem__`.
        generators: the global generators its transforms draw from: `torch`, `random`, `numpy`.

    Raises:
        UsageError: the dataset has no length, or a generator's name is unknown.
    """
    if not hasattr(dataset, "__len__"):
        raise UsageError(f"seeded() needs a map-style dataset with a length, not {type(dataset).__name__}")
    unknown = set(generators) - set(GENERATORS)
    if unknown:
        raise UsageError(f"seeded() knows the generators torch, random and numpy, not {sorted(unknown)}")
    return _Seeded(dataset, tuple(generators))
