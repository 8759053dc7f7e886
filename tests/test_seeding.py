"""Seeds of samples through subsets and bare indices, of heads, and the states of devices."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from small import digest
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from flashtask import ImageClassifier, seeded
from flashtask.core.seeding import generator_states, seed_everything, set_generator_states
from flashtask.trainer.data_loaders import rebuild_loader


class Noisy(Dataset):
    """Samples (index, noise)."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return index, float(torch.rand(()) + random.random() + np.random.rand())


def epochs(dataset, workers: int = 0, shuffle: bool = False) -> list[dict[int, list[float]]]:
    """What each of three epochs of a rebuilt loader gave, by sample."""
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = rebuild_loader(DataLoader(dataset, batch_size=2, shuffle=shuffle, **options), seed=3, training=True)
    found = []
    for epoch in range(3):
        if hasattr(loader.batch_sampler, "set_position"):
            loader.batch_sampler.set_position(epoch)
        seen: dict[int, list[float]] = {}
        for indices, noise in loader:
            for index, value in zip(indices.tolist(), noise.tolist(), strict=True):
                seen.setdefault(index, []).append(value)
        found.append(seen)
    return found


def test_a_bare_index_draws_anew_each_time_and_follows_the_torch_seed():
    dataset = seeded(Noisy())
    assert dataset[2] != dataset[2]
    torch.manual_seed(0)
    first = dataset[2]
    torch.manual_seed(0)
    assert dataset[2] == first


def test_samples_of_a_concatenation_vary_from_epoch_to_epoch():
    first, second, _ = epochs(ConcatDataset([seeded(Noisy()), seeded(Noisy())]))
    assert all(first[index] != second[index] for index in first)


@pytest.mark.long
def test_a_subset_of_a_seeded_dataset_gets_the_places_of_the_whole_one():
    """Nested too: a sample has the same noise in the subset as in the whole, with any number of workers."""
    whole = epochs(seeded(Noisy()))
    part = Subset(Subset(seeded(Noisy()), [5, 4, 3, 0]), [0, 3, 2])
    for workers in (0, 2):
        found = epochs(part, workers, shuffle=True)
        assert [set(seen) for seen in found] == [{5, 0, 3}] * 3
        assert all(seen[index] == whole[epoch][index] for epoch, seen in enumerate(found) for index in seen)
    assert whole[0][5] != whole[1][5]


def test_a_sample_that_stands_twice_in_a_subset_is_drawn_anew_each_time():
    whole, part = epochs(seeded(Noisy())), epochs(Subset(seeded(Noisy()), [4, 1, 4, 4]), shuffle=True)
    assert len(set(part[0][4])) == 3
    assert whole[0][4][0] in part[0][4]
    assert part == epochs(Subset(seeded(Noisy()), [4, 1, 4, 4]), workers=1, shuffle=True)


def test_a_subset_of_a_dataset_that_is_not_seeded_stays_as_it_is():
    part = Subset(list(range(10)), [7, 1])
    loader = rebuild_loader(DataLoader(part, batch_size=2), seed=0, training=True)
    assert loader.dataset is part
    assert next(iter(loader)).tolist() == [7, 1]


def test_more_states_of_devices_than_devices_are_no_error(monkeypatch):
    """A run that was saved on another machine: the devices that are here get theirs, the rest are left out."""
    states = generator_states()
    set_generator_states({**states, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2})
    restored = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((int(state), device)))
    set_generator_states({**states, "cuda": [torch.tensor(10), torch.tensor(11), torch.tensor(12)]})
    assert restored == [(10, 0), (11, 1)]


def test_the_state_of_mps_is_kept_where_there_is_one(monkeypatch):
    assert generator_states()["mps"] == []
    kept = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor(5))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    set_generator_states(generator_states())
    assert [int(state) for state in kept] == [5]


def test_a_head_is_drawn_from_the_seed_and_not_from_what_was_drawn_before(monkeypatch):
    monkeypatch.setattr("flashtask.core.seeding._last_seed", None)

    def head(seed: int, draws: int = 0) -> str:
        seed_everything(seed, verbose=False)
        torch.rand(draws)
        return digest(ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False).head)

    assert head(1) == head(1, draws=7)
    assert head(1) != head(2)
