"""Batches of every structure reach the device and the memory format."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from flashtask.core.errors import UsageError
from flashtask.trainer.batch_transfer import channels_last, move_to_device

META = torch.device("meta")
Pair = namedtuple("Pair", ["left", "right"])


class Record(Mapping):
    """A mapping that is made from another."""

    def __init__(self, content):
        self._content = dict(content)

    def __getitem__(self, key):
        return self._content[key]

    def __iter__(self):
        return iter(self._content)

    def __len__(self):
        return len(self._content)


class Stubborn(Record):
    def __init__(self, a, b):
        super().__init__({"a": a, "b": b})


class Mover(dict):
    """A dict that knows how to move itself, as tokenizers return."""

    def to(self, device):
        return Mover({key: value.to(device) for key, value in self.items()} | {"moved": True})


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str = "x"
    size: Any = field(init=False, default=None)


def ones() -> torch.Tensor:
    return torch.ones(2, 3)


def test_a_defaultdict_keeps_its_factory():
    batch = defaultdict(list, a=ones(), b=[ones()])
    moved = move_to_device(batch, META)
    assert type(moved) is defaultdict
    assert moved.default_factory is list
    assert moved["a"].device == moved["b"][0].device == META
    assert batch["a"].device.type == "cpu"


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, Record, MappingProxyType])
def test_mappings_keep_their_kind_and_the_original_its_tensors(kind):
    batch = kind({"b": ones(), "a": {"inner": (ones(), "text")}})
    moved = move_to_device(batch, META)
    assert type(moved) is kind
    assert list(moved) == ["b", "a"]
    assert moved["b"].device == moved["a"]["inner"][0].device == META
    assert moved["a"]["inner"][1] == "text"
    assert batch["b"].device.type == "cpu"


def test_a_mapping_that_cannot_be_rebuilt_is_an_error_that_names_it():
    with pytest.raises(UsageError, match=r"Stubborn[\s\S]*to\(self, device\)"):
        move_to_device(Stubborn(ones(), ones()), META)


def test_what_moves_itself_is_asked_first():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to_device([packed, Mover(a=ones())], META)
    assert type(moved[0]) is type(packed)
    assert moved[0].data.device == META
    assert moved[1]["moved"] is True
    assert moved[1]["a"].device == META


def test_named_tuples_and_dataclasses_keep_their_kind():
    sample = Sample(ones())
    object.__setattr__(sample, "size", ones())
    moved = move_to_device(Pair(sample, [ones()]), META)
    assert type(moved) is Pair
    assert type(moved.left) is Sample
    assert moved.left.image.device == moved.left.size.device == moved.right[0].device == META
    assert moved.left.name == "x"
    assert sample.image.device.type == "cpu"


def test_images_anywhere_in_a_batch_become_channels_last():
    images = torch.rand(2, 3, 4, 4)
    masks = torch.ones(2, 1, 4, 4, dtype=torch.long).expand(2, 3, 4, 4).contiguous()
    batch = {"pairs": [(images, torch.tensor([0, 1]))], "named": Pair(images, masks), "text": "cat"}
    laid_out = channels_last(batch)
    for one in (laid_out["pairs"][0][0], laid_out["named"].left):
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, images)
    assert laid_out["named"].right is masks
    assert laid_out["pairs"][0][1] is batch["pairs"][0][1]
    assert laid_out["text"] == "cat"
