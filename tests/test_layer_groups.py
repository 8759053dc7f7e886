"""Layer groups: every parameter once, and in the order in which the layers of the model run."""

from __future__ import annotations

import pytest
import torchvision
from torch import nn

from flashtask.backbones import build_backbone
from flashtask.backbones.building import build_without_values
from flashtask.backbones.inspection import default_layer_groups, run_without_values
from flashtask.backbones.sources import library_names
from flashtask.backbones.torchvision_provider import LAYERS

FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5"),
    *("maxvit_t", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5"),
    *("squeezenet1_0", "swin_v2_t", "vgg11_bn", "vit_b_32"),
]
#: With branches, with blocks in blocks, with attention, with a head of several layers.
DIFFERENT = ("densenet121", "inception_v3", "resnet18", "swin_v2_t", "vgg11_bn", "vit_b_32")


def running_order(module, input_size):
    """When each layer with parameters of its own begins to run."""
    order = {}

    def note(module, inputs):
        order.setdefault(module, len(order))

    hooks = [inner.register_forward_pre_hook(note) for inner in module.modules()]
    run_without_values(module, input_size)
    for hook in hooks:
        hook.remove()
    return {name: order[inner] for name, inner in module.named_modules() if name and inner in order}


def check_order(backbone):
    times = running_order(backbone.module, backbone.preprocessing.input_size)
    end, seen = -1, 0
    for group in backbone.layer_groups:
        own = [times[layer] for layer in (name.rpartition(".")[0] for name in group) if layer in times]
        seen += len(own)
        if own:
            assert min(own) > end, f"{group[0]} runs before the group that stands before it ends"
            end = max(own)
    assert seen > len(backbone.layer_groups)
    grouped = [name for group in backbone.layer_groups for name in group]
    assert sorted(grouped) == sorted(name for name, _ in backbone.module.named_parameters())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DIFFERENT else pytest.mark.long) for name in FAMILIES]
)
def test_groups_of_every_family_of_torchvision_follow_the_run(name):
    backbone = build_without_values(f"torchvision/{name}")
    check_order(backbone)
    assert len(backbone.layer_groups) >= 7


def test_the_families_tried_are_all_that_torchvision_has():
    returned = [torchvision.models.get_model_builder(name).__annotations__["return"] for name in FAMILIES]
    assert {kind if isinstance(kind, str) else kind.__name__ for kind in returned} == set(LAYERS)


@pytest.mark.long
@pytest.mark.parametrize("name", library_names("torchvision"))
def test_groups_of_every_model_of_torchvision_follow_the_run(name):
    check_order(build_without_values(f"torchvision/{name}"))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "num_groups"),
    [
        ("resnet18", 9),
        ("vit_tiny_patch16_224", 13),
        pytest.param("convnext_atto", 14, marks=pytest.mark.long),
        pytest.param("swin_tiny_patch4_window7_224", 13, marks=pytest.mark.long),
        ("pit_ti_224", 16),  # timm has no matcher for these three
        pytest.param("poolformer_s12", 16, marks=pytest.mark.long),
        pytest.param("csatv2", 22, marks=pytest.mark.long),
    ],
)
def test_groups_of_timms_models_follow_the_run_with_and_without_a_matcher(name, num_groups):
    backbone = build_without_values(name)
    assert len(backbone.layer_groups) == num_groups
    check_order(backbone)


def test_positions_that_all_blocks_share_belong_to_the_first_group():
    groups = build_without_values("vit_srelpos_small_patch16_224").layer_groups
    shared = [name for group in groups for name in group if name.startswith("shared_rel_pos")]
    assert shared
    assert set(shared) <= set(groups[0])


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(2)]
        )

    def forward(self, images):
        images = self.norm(self.reduce(images))
        for block in self.blocks:
            images = block(images)
        return images


def test_groups_of_a_users_module_are_its_blocks_at_any_depth():
    stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4))
    backbone = build_backbone(nn.Sequential(stem, nn.Sequential(Stage(), Stage()), nn.BatchNorm2d(4)))
    assert [group[0] for group in backbone.layer_groups] == [
        "0.0.weight",
        *("1.0.reduce.weight", "1.0.blocks.0.0.weight", "1.0.blocks.1.0.weight"),
        *("1.1.reduce.weight", "1.1.blocks.0.0.weight", "1.1.blocks.1.0.weight"),
    ]
    assert "1.0.norm.bias" in backbone.layer_groups[1]
    assert backbone.layer_groups[-1][-1] == "2.bias"
    check_order(backbone)


def test_parameters_that_parts_share_belong_to_the_first():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    assert default_layer_groups(nn.Sequential(first, second)) == [["0.weight", "0.bias", "1.bias"]]
