"""Every backbone there is, built on the meta device: features of the promised shape, layers that hold each parameter.

A spread sample runs with the suite; all of them run with `make test-long`.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.func import functional_call

from flashtask.backbones import BACKBONES
from flashtask.backbones.building import build_without_values

SAMPLE = 4


def spread(names, count):
    """The same `count` of the names on every machine, from all families: those with the smallest hashes."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count]


def check(name):
    """Build a backbone without values, run two images through it, and look at its layers."""
    backbone = build_without_values(name)
    assert {parameter.device.type for parameter in backbone.module.parameters()} == {"meta"}
    images = torch.zeros(2, *backbone.preprocessing.input_size, device="meta")
    tensors = {**dict(backbone.module.named_parameters()), **dict(backbone.module.named_buffers())}
    backbone.module.eval()
    with torch.no_grad():
        features = functional_call(
            backbone.module, {key: tensor.to("meta") for key, tensor in tensors.items()}, (images,)
        )
    assert tuple(features.shape) == (2, backbone.num_features)
    assert backbone.name == name
    grouped = [parameter for group in backbone.layer_groups for parameter in group]
    assert sorted(grouped) == sorted(key for key, _ in backbone.module.named_parameters())
    assert all(backbone.layer_groups)
    assert len(backbone.layer_groups) > 1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", spread(BACKBONES.names(), SAMPLE))
def test_a_sample_of_all_backbones_gives_features_and_layers(name):
    check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", BACKBONES.names())
def test_every_backbone_gives_features_and_layers(name):
    check(name)
