"""Pyramids: maps at several scales, with the weights and the layer groups of the backbone they come from."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from flashtask import ImageClassifier
from flashtask.backbones import BACKBONES, build_backbone, build_pyramid
from flashtask.backbones.torchvision_provider import LAYERS, MAPS
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import UsageError
from flashtask.trainer.hyperparameters import hyperparameters_content


def maps_of(pyramid, images):
    with torch.no_grad():
        return pyramid.module.eval()(images)


def check_contract(pyramid):
    """The maps are a list, the finest first, of the promised channels and sizes; other image sizes will do as well."""
    channels, height, width = pyramid.preprocessing.input_size
    images = torch.randn(2, channels, height, width)
    maps = maps_of(pyramid, images)
    assert isinstance(maps, list)
    assert [m.shape[:2] for m in maps] == [(2, c) for c in pyramid.channels]
    for found, reduction in zip(maps, pyramid.reductions, strict=True):
        assert abs(found.shape[2] - height / reduction) < 1.6
        assert found.shape[2] == found.shape[3]
    assert list(pyramid.reductions) == sorted(set(pyramid.reductions))
    grouped = [name for group in pyramid.layer_groups for name in group]
    assert sorted(grouped) == sorted(name for name, _ in pyramid.module.named_parameters())


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [
        ("test_resnet", (32, 32, 48, 192, 96), (2, 4, 8, 16, 32)),
        ("test_convnext", (24, 32, 48, 64), (4, 8, 16, 32)),
        pytest.param("swin_tiny_patch4_window7_224", (96, 192, 384, 768), (4, 8, 16, 32), marks=pytest.mark.long),
        ("test_vit", (64,), (16,)),
        ("torchvision/resnet18", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
        pytest.param(
            "torchvision/shufflenet_v2_x0_5", (24, 24, 48, 96, 1024), (2, 4, 8, 16, 32), marks=pytest.mark.long
        ),
        ("torchvision/swin_t", (96, 192, 384, 768), (4, 8, 16, 32)),  # channels last inside, as timm's
        ("torchvision/mobilenet_v3_small", (16, 16, 24, 48, 576), (2, 4, 8, 16, 32)),
        ("torchvision/squeezenet1_1", (64, 128, 256, 512), (2, 4, 8, 16)),
    ],
)
def test_pyramids_have_the_channels_and_reductions_that_they_say(name, channels, reductions):
    pyramid = build_pyramid(name, pretrained=False)
    assert (pyramid.channels, pyramid.reductions) == (channels, reductions)
    check_contract(pyramid)
    assert len(pyramid.layer_groups) >= len(channels)


def test_every_family_of_torchvision_with_maps_stands_in_the_table():
    assert set(LAYERS) - set(MAPS) == {"VisionTransformer"}


def test_scales_are_chosen_by_index_from_either_end():
    pyramid = build_pyramid("torchvision/resnet18", pretrained=False, out_indices=(1, -1))
    assert (pyramid.channels, pyramid.reductions) == ((64, 512), (4, 32))
    assert build_pyramid("test_resnet", pretrained=False, out_indices=[2], in_chans=1).channels == (48,)
    for wrong, message in (((5,), "has 5 scales"), ((2, 1), "the finest first"), ((), "list of whole numbers")):
        with pytest.raises(UsageError, match=message):
            build_pyramid("torchvision/resnet18", pretrained=False, out_indices=wrong)


@pytest.mark.long
def test_a_pyramid_has_the_weights_of_its_backbone():
    backbone = build_backbone("efficientnet_lite0")
    pyramid = build_pyramid("efficientnet_lite0")
    own = pyramid.module.state_dict()
    same = {name.replace(".", "_"): tensor for name, tensor in backbone.module.state_dict().items()}
    assert len(own) > 200
    assert all(torch.equal(tensor, same[name.replace(".", "_")]) for name, tensor in own.items())
    images = torch.randn(1, 3, 96, 96)
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True)
    reference.load_state_dict(own)
    for found, expected in zip(maps_of(pyramid, images), reference.eval()(images), strict=True):
        assert torch.equal(found, expected)
    check_contract(pyramid)


@pytest.mark.long
def test_a_pyramid_from_a_folder_has_the_folders_weights(tmp_path):
    model = timm.create_model("test_convnext", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    pyramid = build_pyramid(str(tmp_path / "folder"))
    images = torch.randn(1, 3, 64, 64)
    expected = model.eval().forward_intermediates(images, intermediates_only=True)
    for found, other in zip(maps_of(pyramid, images), expected[-4:], strict=True):
        torch.testing.assert_close(found, other)


def test_a_pyramid_from_a_checkpoint_has_its_weights(tmp_path):
    model = ImageClassifier(backbone="torchvision/squeezenet1_1", pretrained=False, num_classes=2)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_checkpoint(
        tmp_path / "model.ckpt", {"state_dict": state, **model.describe(), **hyperparameters_content(model)}
    )
    own = build_pyramid(str(tmp_path / "model.ckpt")).module.state_dict()
    assert own
    assert all(torch.equal(tensor, state[f"backbone.{name}"]) for name, tensor in own.items())


@pytest.mark.long
def test_torchvisions_maps_are_what_its_layers_give_and_copies_keep_them():
    backbone = build_backbone("torchvision/resnet18", pretrained=False)
    pyramid = build_pyramid("torchvision/resnet18", pretrained=False)
    pyramid.module.load_state_dict(backbone.module.state_dict())
    seen = []
    for layer in (backbone.module.layer1, backbone.module.layer4):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        backbone.module.eval()(images)
    for same in (pyramid.module, copy.deepcopy(pyramid.module)):
        maps = same.eval()(images)
        assert torch.equal(maps[1], seen[0])
        assert torch.equal(maps[4], seen[1])


class TwoMaps(nn.Module):
    def __init__(self, in_chans=3):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(in_chans, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)

    def forward(self, images):
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(fine)}


def test_a_users_module_or_function_gives_its_own_maps():
    pyramid = build_pyramid(TwoMaps())
    assert (pyramid.name, pyramid.channels, pyramid.reductions) == ("TwoMaps", (4, 6), (4, 8))
    check_contract(pyramid)
    assert build_pyramid(TwoMaps, in_chans=1).preprocessing.input_size[0] == 1
    BACKBONES.register("two_maps", TwoMaps)
    try:
        assert build_pyramid("two_maps").name == "two_maps"
        with pytest.raises(UsageError, match=r"gives a dict, not a tensor of features") as caught:
            build_backbone("two_maps")
        assert "'fine': (2, 4, 56, 56)" in caught.value.why
        assert caught.value.fix.endswith("self.net(images)['fine']")
    finally:
        BACKBONES.remove("two_maps")
    with pytest.raises(UsageError, match="gives its own list of maps"):
        build_pyramid(TwoMaps(), out_indices=(0,))


@pytest.mark.long
@pytest.mark.parametrize("name", ["torchvision/vit_b_16", nn.Conv2d(3, 4, 4)])
def test_what_has_no_maps_at_several_scales_says_so(name):
    with pytest.raises(UsageError, match="has no maps at several scales"):
        build_pyramid(name, pretrained=False)


def test_features_only_as_an_option_names_the_function_for_it():
    with pytest.raises(UsageError) as caught:
        build_backbone("resnet18", features_only=True)
    assert caught.value.fix == "build_pyramid('resnet18')"
