"""Backbones from a hub repository, a folder in timm's layout, a checkpoint, and from weights files."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
import torchvision
from hub_server import HubServer, use
from safetensors.torch import save_file
from small import colour_folders
from torch import nn

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.backbones import BACKBONES, build_backbone
from flashtask.backbones.descriptions import read_timm_folder
from flashtask.backbones.packaged import packaged_state_dict
from flashtask.backbones.timm_provider import build_from_folder
from flashtask.core.errors import IntegrityError, MissingInputError, UnknownNameError, UsageError


def random_model(architecture, **options):
    """A timm model whose norms have other statistics than a new one's, so that a buffer left out is seen."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **options)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.1 * torch.randn_like(buffer) if name.endswith("mean") else torch.rand_like(buffer) + 0.5)
    return model.eval()


def write_folder(folder, name, *, safe=True, **options):
    timm.models.save_for_hf(random_model(name, **options), folder, safe_serialization=safe)
    return folder


def features(backbone, images):
    with torch.no_grad():
        return backbone.module.eval()(images)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("vit") / "folder", "test_vit", num_classes=7, img_size=96)


# ---- folders


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "made_with", "safe", "options"),
    [
        ("test_resnet", {}, True, {}),
        ("test_vit", {"img_size": 96, "in_chans": 1, "num_classes": 7}, True, {"in_chans": 1}),
        ("test_vit", {}, True, {"in_chans": 1, "img_size": 64}),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("test_vit", {"img_size": 96, "in_chans": 1, "num_classes": 7}, True, {"in_chans": 4}),
                ("test_efficientnet", {"num_classes": 0}, True, {}),
                ("test_byobnet", {"num_classes": 3}, False, {}),
            )
        ),
    ],
)
def test_a_folder_in_timms_layout_gives_what_timm_itself_gives(tmp_path, name, made_with, safe, options):
    folder = write_folder(tmp_path / "folder", name, safe=safe, **made_with)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **{"in_chans": 3, **options})
    backbone = build_backbone(str(folder), **options)
    images = torch.randn(2, *backbone.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(images), features(backbone, images))
    assert backbone.name == f"local-dir:{folder}"
    assert backbone.num_features == theirs.num_features
    assert "state_dict" not in backbone.module.pretrained_cfg


def test_the_whole_classifier_of_a_folder_gives_what_timm_gives(vit):
    folder = read_timm_folder(vit)
    images = torch.randn(2, 3, 96, 96)
    theirs = timm.create_model(f"local-dir:{vit}", pretrained=True).eval()
    ours = build_from_folder(folder, num_classes=folder.num_classes, in_chans=3).eval()
    assert theirs(images).shape == (2, 7)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.long
def test_a_folder_is_written_with_or_without_its_prefix(vit, monkeypatch):
    monkeypatch.chdir(vit.parent)
    assert {build_backbone(name).name for name in ("local-dir:folder", "./folder", f"{vit}")} == {f"local-dir:{vit}"}
    with pytest.raises(UnknownNameError):
        build_backbone("folder")  # a bare word is a name and never a folder one stands beside
    with pytest.raises(MissingInputError, match=r"no file .*nowhere/config.json"):
        build_backbone("local-dir:nowhere")


def test_without_pretrained_a_folder_needs_its_configuration_only(vit, tmp_path):
    shutil.copy(vit / "config.json", tmp_path)
    assert build_backbone(str(tmp_path), pretrained=False).preprocessing.input_size == (3, 96, 96)
    with pytest.raises(MissingInputError, match="holds no weights"):
        build_backbone(str(tmp_path))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "test_vit2"}, "config.json was refused: .* cannot be built with these options"),
        ({"architecture": "resnet18"}, "config.json was refused: .* cannot be built with these options"),
        ({"architecture": "resnet18", "model_args": {}}, "names of the model are missing"),
        ({"model_args": {"depth": 3, "img_size": [96, 96]}}, "names are not in the model"),
        ({"model_args": {"embed_dim": 128, "img_size": [96, 96]}}, "does not fit timm's test_vit"),
        ({"model_args": {"embed_dim": 60000}}, "the described model has"),
    ],
)
def test_a_configuration_of_another_model_than_the_weights_is_refused(vit, tmp_path, change, message):
    shutil.copytree(vit, tmp_path / "other")
    config = json.loads((vit / "config.json").read_text()) | change
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=message) as caught:
        build_backbone(str(tmp_path / "other"))
    assert str(tmp_path / "other") in caught.value.what


# ---- what a place holds is in the checkpoint


def train(backbone, folder, **options):
    data = ImageClassificationData.from_folders(
        train_folder=colour_folders(folder / "train"), batch_size=8, num_workers=0
    )
    model = ImageClassifier(backbone=backbone, learning_rate=0.02, **options)
    trainer = Trainer(output_dir=folder / "run", max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    trainer.save_checkpoint(folder / "model.ckpt")
    return model.eval()


def same_outputs(model, other):
    """Equal weights, and equal outputs but for the order of sums in another memory format."""
    images = torch.randn(2, *model.preprocessing.input_size)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        return torch.allclose(model(images), other(images), atol=1e-5) and model.preprocessing == other.preprocessing


@pytest.mark.long
def test_a_model_trained_on_a_hub_backbone_loads_without_hub_cache_and_network(tmp_path, monkeypatch, vit):
    with HubServer() as hub:
        use(monkeypatch, hub, tmp_path)
        commit = hub.add("org/vit", {path.name: path.read_bytes() for path in vit.iterdir()})
        backbone = build_backbone("hf://org/vit")
        assert backbone.name == f"hf-hub:org/vit@{commit}"
        images = torch.randn(2, 3, 96, 96)
        theirs = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=0).eval()
        assert torch.equal(features(backbone, images), theirs(images))
        model = train("hf-hub:org/vit", tmp_path, backbone_options={"drop_path_rate": 0.1})
    stored = flashtask.read_checkpoint(tmp_path / "model.ckpt")["hyper_parameters"]
    assert stored["backbone"] == f"hf-hub:org/vit@{commit}"
    assert stored["backbone_options"]["architecture"] == "timm/test_vit"
    assert stored["backbone_options"]["drop_path_rate"] == 0.1
    for place in ("cache", "hub", "hf"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "empty"))
    asked = len(hub.requests)
    assert same_outputs(model, flashtask.load(tmp_path / "model.ckpt"))
    assert len(hub.requests) == asked


def test_without_pretrained_only_the_configuration_is_fetched_from_the_hub(tmp_path, monkeypatch, vit):
    with HubServer() as hub:
        use(monkeypatch, hub, tmp_path)
        hub.add("org/vit", {path.name: path.read_bytes() for path in vit.iterdir()})
        assert build_backbone("hf-hub:org/vit", pretrained=False).num_features == 64
        assert not any("safetensors" in path for method, path in hub.requests if method == "GET" and "resolve" in path)


@pytest.mark.long
def test_a_repository_with_a_pickled_file_alone_is_read_safely(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", "test_resnet", safe=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    with HubServer() as hub:
        use(monkeypatch, hub, tmp_path)
        hub.add("org/net", {path.name: path.read_bytes() for path in folder.iterdir()})
        backbone = build_backbone("hf-hub:org/net")
    images = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.equal(features(backbone, images), theirs(images))


@pytest.mark.long
def test_a_folder_may_go_after_training_and_a_checkpoint_is_a_backbone_itself(vit, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(vit, folder)
    model = train(str(folder), tmp_path)
    shutil.rmtree(folder)
    loaded = flashtask.load(tmp_path / "model.ckpt")
    assert same_outputs(model, loaded)
    again = build_backbone(str(tmp_path / "model.ckpt"))
    assert again.name == f"checkpoint:{tmp_path / 'model.ckpt'}"
    images = torch.randn(2, 3, 96, 96)
    # AVX2 kernels round by where in memory a tensor begins.
    assert torch.allclose(features(again, images), model.backbone(images), atol=1e-5)
    assert again.preprocessing == model.preprocessing
    assert again.description["architecture"] == "timm/test_vit"
    # The stored arguments name what is there, so the same can be built again with its weights.
    stored = flashtask.read_checkpoint(tmp_path / "model.ckpt")["hyper_parameters"]
    shutil.copytree(vit, folder)
    assert torch.equal(ImageClassifier(**stored).backbone.norm.weight, build_backbone(str(vit)).module.norm.weight)
    # A model on a backbone from a checkpoint loads when that file is gone too.
    (tmp_path / "next").mkdir()
    second = train(str(tmp_path / "model.ckpt"), tmp_path / "next")
    (tmp_path / "model.ckpt").unlink()
    assert same_outputs(second, flashtask.load(tmp_path / "next" / "model.ckpt"))


def test_a_stored_description_of_another_architecture_is_refused(vit):
    with pytest.raises(IntegrityError, match="holds timm/test_vit, not timm/resnet18"):
        build_backbone(str(vit), architecture="timm/resnet18")
    with pytest.raises(IntegrityError, match="not a registered name"):
        build_backbone(str(vit), pretrained=False, architecture="hf-hub:org/vit")
    with pytest.raises(IntegrityError, match="not one of"):
        build_backbone(str(vit), architecture="timm/test_vit", model_args={"depth": 9})
    with pytest.raises(IntegrityError, match="'checkpoint_path', which a file may not set"):
        build_backbone(str(vit), pretrained=False, architecture="timm/test_vit", model_args={"checkpoint_path": "x"})


def test_a_place_is_no_listed_name_and_asks_no_network_to_be_known():
    entry = BACKBONES.entry("hf://org/name@v1")
    assert (entry.name, entry.metadata["provider"]) == ("hf-hub:org/name@v1", "hub")
    assert not any(":" in name for name in BACKBONES.names())
    with pytest.raises(UsageError, match="not the name of a hub repository"):
        build_backbone("hf-hub:../etc")


# ---- weights from a file


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        pytest.param(name, prefix, marks=() if prefix in short else pytest.mark.long)
        for name, short in (("test_resnet", ("", "module.")), ("torchvision/mnasnet0_5", ("model.encoder.",)))
        for prefix in ("", "module.", "backbone.", "model.encoder.")
    ],
)
def test_weights_of_a_file_are_found_under_their_prefix_and_what_is_left_aside_is_said(tmp_path, capsys, name, prefix):
    build = timm.create_model if "/" not in name else torchvision.models.get_model
    whole = build(name.rpartition("/")[2], num_classes=5).state_dict()
    state = {prefix + key: tensor for key, tensor in whole.items()}
    if prefix:
        state["criterion.weight"] = torch.zeros(3)
    path = tmp_path / f"after_{prefix}safetensors".replace("_safetensors", ".safetensors")
    save_file(state, path)
    found = build_backbone(name, weights=path).module.state_dict()
    assert len(found) == len(whole) - 2
    assert all(torch.equal(tensor, whole[key]) for key, tensor in found.items())
    if prefix:
        assert f"are those under {prefix!r}" in (said := capsys.readouterr().err)
        assert "not used:" in said


@pytest.mark.long
def test_training_checkpoints_of_others_and_our_own_are_weights_files_too(tmp_path):
    whole = torchvision.models.resnet18(weights=None)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, tmp_path / "a.pth"
    )
    backbone = build_backbone("torchvision/resnet18", weights=tmp_path / "a.pth")
    assert torch.equal(backbone.module.conv1.weight, whole.conv1.weight)
    model = train("timm/test_resnet", tmp_path, pretrained=False)
    again = build_backbone("test_resnet", weights=str(tmp_path / "model.ckpt"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(features(again, images), model.backbone(images))


@pytest.mark.long
def test_a_model_on_weights_of_a_file_loads_when_the_file_is_gone(tmp_path):
    save_file(random_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    options = {"weights": str(tmp_path / "w.safetensors")}
    model = train("test_resnet", tmp_path, backbone_options=options)
    (tmp_path / "w.safetensors").unlink()
    assert same_outputs(model, flashtask.load(tmp_path / "model.ckpt"))
    with pytest.raises(MissingInputError, match=r"no file .*w.safetensors"):
        ImageClassifier(backbone="test_resnet", backbone_options=options)


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("torchvision/mnasnet0_5", marks=pytest.mark.long)])
def test_weights_that_do_not_fit_name_the_file_and_the_first_names(tmp_path, name):
    body = build_backbone(name, pretrained=False).module.state_dict()
    path = tmp_path / "w.safetensors"
    first, *others = [key for key in body if key.endswith("weight")]
    for state, message in (
        ({key: tensor for key, tensor in body.items() if key != first}, f"missing: {first}"),
        ({**body, "more.weight": torch.zeros(1)}, "unknown: more.weight"),
        ({**body, **{f"m.{key}": tensor.clone() for key, tensor in body.items()}}, "more than once: under '', 'm.'"),
        ({**body, others[-1]: torch.zeros(7)}, others[-1]),
    ):
        save_file(state, path)
        with pytest.raises((IntegrityError, UsageError)) as caught:
            build_backbone(name, weights=path)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"weights": "IMAGENET1K_V1"}, "weights must be a file"),
        ("resnet18", {"weights": "w.pth", "pretrained": False}, "contradicts weights"),
        ("resnet18", {"checkpoint_path": "w.pth"}, "checkpoint_path is not an option"),
        (nn.Linear(2, 2), {"weights": "w.pth"}, "takes no options"),
        ("./w.pth", {}, "does not say for which architecture"),
        ("hf-hub:org/name", {"weights": "w.pth"}, "already includes weights"),
    ],
)
def test_weights_that_cannot_be_meant_are_an_error_with_a_fix(tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    with pytest.raises(UsageError, match=message):
        build_backbone(name, **options)


# ---- other channel counts


def grey_pairs(tmp_path):
    """For each source: how a backbone for three channels and one for a single channel with the same weights is made."""
    folder = write_folder(tmp_path / "folder", "test_efficientnet")
    save_file(torchvision.models.mnasnet0_5(weights=None).state_dict(), tmp_path / "mnasnet.safetensors")
    save_file(random_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    yield "packaged", "efficientnet_lite0", {}
    yield "folder", str(folder), {}
    yield "timm", "test_resnet", {"weights": tmp_path / "resnet.safetensors"}
    yield "torchvision", "torchvision/mnasnet0_5", {"weights": tmp_path / "mnasnet.safetensors"}
    train("timm/test_resnet", tmp_path, pretrained=False)
    yield "checkpoint", str(tmp_path / "model.ckpt"), {}


@pytest.mark.long
def test_a_grey_image_gives_what_it_gives_in_three_equal_channels_from_every_source(tmp_path):
    grey = torch.randn(2, 1, 64, 64)
    for source, name, options in grey_pairs(tmp_path):
        three, one = (build_backbone(name, in_chans=channels, **options) for channels in (3, 1))
        expected = features(three, grey.expand(-1, 3, -1, -1))
        assert expected.abs().max() > 0, source
        torch.testing.assert_close(features(one, grey), expected, rtol=1e-3, atol=1e-4, msg=source)
        six = build_backbone(name, in_chans=6, **options)
        torch.testing.assert_close(features(six, grey.expand(-1, 6, -1, -1)), expected, rtol=1e-3, atol=1e-4)


def test_weights_for_one_channel_serve_three(tmp_path):
    one = random_model("test_resnet", in_chans=1, num_classes=0)
    save_file(one.state_dict(), tmp_path / "one.safetensors")
    three = build_backbone("test_resnet", weights=tmp_path / "one.safetensors")
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(features(three, grey.expand(-1, 3, -1, -1)), one(grey), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_the_packaged_weights_as_a_folder_are_the_packaged_backbone(tmp_path):
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(packaged_state_dict("efficientnet_lite0"))
    timm.models.save_for_hf(model, tmp_path / "lite0", safe_serialization=True)
    images = torch.randn(2, 3, 224, 224)
    ours = build_backbone(str(tmp_path / "lite0"))
    assert torch.equal(features(ours, images), features(build_backbone("efficientnet_lite0"), images))
