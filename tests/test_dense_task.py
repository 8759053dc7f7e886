"""Tasks on maps and on tokens: they are frozen, adapted, stored and asked like those on one vector an image."""

from __future__ import annotations

import csv
import json

import dense_task
import pytest
import torch
from dense_task import HeatmapHead, Point, PointData, PointFinder, write_points
from small import colour_folders
from torch import nn

import flashtask
from flashtask import HEADS, TASKS, ImageClassificationData, ImageClassifier, Trainer, build_backbone
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.devices.precision import inference_precision

SQUASH = Preprocessing(input_size=(64, 96), crop_pct=1.0, crop_mode="squash")


class AttentionHead(nn.Module):
    """One query over the tokens."""

    takes = "tokens"

    def __init__(self, features, num_outputs):
        super().__init__()
        self.query = nn.Parameter(torch.randn(features.num_features) / features.num_features**0.5)
        self.prefix = features.num_prefix_tokens
        self.out = nn.Linear(features.num_features, num_outputs)

    def forward(self, tokens):
        places = tokens[:, self.prefix :]
        weights = (places @ self.query).softmax(dim=1)
        return self.out((weights[:, :, None] * places).sum(1))


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    dense_task.register()
    HEADS.register("attention", AttentionHead)
    TASKS.register("point", PointFinder)
    yield
    TASKS.remove("point")
    for name in ("heatmap", "attention"):
        HEADS.remove(name)


def points(folder, **options):
    table = write_points(folder)
    return PointData.from_csv(
        "file", ("x", "y"), train_file=table, val_split=6, batch_size=6, preprocessing=SQUASH, **options
    )


def finder(**options):
    torch.manual_seed(0)
    return PointFinder(pretrained=False, **{"learning_rate": 3e-3, **options})


def trainer(folder, **options):
    options = {"max_epochs": 2, "seed": 1, "precision": "32", "enable_progress_bar": False, **options}
    return Trainer(output_dir=folder, **options)


# ---- the contract


class _Pooled(nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ImageClassifier("resnet18", head="heatmap"),
            "the head 'heatmap' takes maps, .* take pooled or tokens",
        ),
        (
            lambda: PointFinder("resnet18", "linear"),
            "the head 'linear' takes pooled, and the heads of PointFinder take",
        ),
        (lambda: PointFinder("torchvision/vit_b_16"), "'torchvision/vit_b_16' has no maps"),
        (lambda: ImageClassifier("resnet18", head="attention"), "the backbone 'timm/resnet18' has no tokens"),
        (lambda: ImageClassifier(_Pooled(), head="attention"), "the backbone '_Pooled' has no tokens"),
        (lambda: flashtask.build_head("heatmap", 8, 2), "the head 'heatmap' takes maps, and the backbone gives pooled"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_name(make, message, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("weights fetched"))
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.long
def test_a_backbone_says_what_it_gives():
    maps = build_backbone("timm/test_resnet", pretrained=False, gives="maps", out_indices=(1, -1))
    assert (maps.features.kind, maps.channels, maps.reductions) == ("maps", (32, 96), (4, 32))
    tokens = build_backbone("timm/test_vit", pretrained=False, gives="tokens")
    info = tokens.features
    found = tokens.module(torch.zeros(2, *tokens.preprocessing.input_size))
    assert found.shape == (2, info.num_tokens, info.num_features)
    assert info.num_prefix_tokens == 1
    pooled = build_backbone("timm/test_vit", pretrained=False)
    assert pooled.features.kind == "pooled"
    assert pooled.module.state_dict().keys() == tokens.module.state_dict().keys()


# ---- maps


def test_maps_are_trained_frozen_then_unfrozen_and_stored(tmp_path):
    data, model = points(tmp_path / "images"), finder()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    seen = []

    class Look(flashtask.Callback):
        def on_train_epoch_end(self, trainer, module):
            same = all(torch.equal(before[name], value) for name, value in module.backbone.state_dict().items())
            seen.append((same, module.backbone.training))

    run = trainer(tmp_path / "run", max_epochs=4, callbacks=[Look()])
    run.finetune(model, datamodule=data, strategy=("freeze_unfreeze", 2), restore_best=False)
    assert [same for same, _ in seen] == [True, True, False, False]
    history = [row["val_distance"] for row in run.fit_run.history]
    assert history[-1] < history[0]

    paths = sorted(map(str, (tmp_path / "images").glob("*.png")))
    expected = model.predict(paths)
    assert all(isinstance(one, Point) for one in expected)
    for again in (
        flashtask.load(tmp_path / "run"),
        flashtask.load(model.save_pretrained(tmp_path / "saved")),
    ):
        assert again.feature_info == model.feature_info
        for one, other in zip(again.predict(paths), expected, strict=True):
            assert (one.x, one.y) == pytest.approx((other.x, other.y), abs=1e-2)
    # In the file, 96 x 64, distances are those in the input, which has the same size.
    (measured,) = trainer(tmp_path / "val").validate(model, datamodule=data)
    with open(tmp_path / "images" / "points.csv") as file:
        wanted = {row["file"]: (float(row["x"]), float(row["y"])) for row in csv.DictReader(file)}
    chosen = set(data.split_manifest())
    away = [
        ((one.x - wanted[name][0]) ** 2 + (one.y - wanted[name][1]) ** 2) ** 0.5
        for one in expected
        if (name := one.path.rpartition("/")[2]) in chosen
    ]
    assert sum(away) / len(away) == pytest.approx(measured["val_distance"], abs=1e-2)


@pytest.mark.long
def test_a_run_on_maps_is_resumed_to_the_bit(tmp_path):
    whole = finder(lr_scheduler="constant")
    trainer(tmp_path / "whole", max_epochs=3).fit(whole, datamodule=points(tmp_path / "images"))
    first, again = finder(lr_scheduler="constant"), finder(lr_scheduler="constant")
    trainer(tmp_path / "part", max_epochs=3, max_steps=5).fit(first, datamodule=points(tmp_path / "images"))
    path = tmp_path / "part" / "last.ckpt"
    trainer(tmp_path / "rest", max_epochs=3).fit(again, datamodule=points(tmp_path / "images"), ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("strategy", [("lora", 2), ("layer_decay", 0.5), "norm_only"])
def test_strategies_work_on_maps(tmp_path, strategy):
    model = finder()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    trainer(tmp_path / "run", max_epochs=1).finetune(model, datamodule=points(tmp_path / "images"), strategy=strategy)
    after = model.backbone.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items()) or strategy[0] == "lora"
    assert len(model.predict(str(tmp_path / "images"))) == 24


@pytest.mark.long
def test_the_plan_says_why_features_of_maps_are_not_kept(tmp_path, capsys):
    data = points(tmp_path / "images")
    plan = trainer(tmp_path / "run").plan(finder(), datamodule=data, strategy="freeze")
    assert "the maps of all images would take more memory than the images" in str(plan)


@pytest.mark.long
def test_the_command_line_needs_no_change_for_a_task_on_maps(tmp_path, capsys):
    table, folder = write_points(tmp_path / "images"), tmp_path / "run"
    words = ["--task", "point", "--target", "x,y", "--no-pretrained", "--strategy", "no_freeze", "--epochs", "1"]
    size = ["--set", "data.from_csv.preprocessing={input_size: [64, 96], crop_pct: 1.0, crop_mode: squash}", "--quiet"]
    assert run(["finetune", str(table), *words, *size, "--output-dir", str(folder)]) == 0
    capsys.readouterr()
    assert run(["validate", str(folder), str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_distance"] > 0
    assert run(["predict", str(folder), str(tmp_path / "images"), "--output", str(tmp_path / "points.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "points.csv").read_text().splitlines()))
    assert list(rows[0]) == ["path", "x", "y"]
    assert len(rows) == 24


@pytest.mark.long
def test_torchvision_and_modules_of_ones_own_give_maps_too():
    for backbone in ("torchvision/resnet18", "efficientnet_lite0"):
        model = PointFinder(backbone, pretrained=False).eval()
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 1, 16, 24)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)

        def forward(self, images):
            return [self.stem(images)]

    with pytest.raises(UsageError, match="gives its own list"):
        PointFinder(Own())
    assert flashtask.build_pyramid(Own()).features.channels == (8,)


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
def test_the_folded_copy_that_predicts_gives_the_same_maps(name):
    model = PointFinder(name, pretrained=False).eval()
    for norm in (part for part in model.backbone.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    made = model.inference_copy(inference_precision("32", torch.device("cpu")))
    norms = [sum(isinstance(part, nn.BatchNorm2d) for part in one.modules()) for one in (model, made)]
    assert norms[1] < norms[0]
    images = torch.randn(2, *model.preprocessing.input_size)
    with torch.no_grad():
        found, expected = made.backbone(images), model.backbone(images)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * other.abs().max())


# ---- tokens


def classes(tmp_path, **options):
    made = ImageClassificationData.from_folders(
        train_folder=colour_folders(tmp_path / "images", each=12),
        val_folder=colour_folders(tmp_path / "val", each=5),
        batch_size=5,
        num_workers=0,
        **options,
    )
    made.preprocessing = Preprocessing(input_size=(3, 160, 160)).resolved()
    return made


def on_tokens(head="attention"):
    torch.manual_seed(7)
    return ImageClassifier("timm/test_vit", head=head, pretrained=False, learning_rate=1e-2)


def test_tokens_are_cached_and_the_result_is_that_of_the_uncached_run(tmp_path, capsys):
    found = []
    for cache in ("auto", False):
        model = on_tokens()
        run = trainer(tmp_path / f"run-{cache}", feature_cache=cache)
        run.finetune(model, datamodule=classes(tmp_path / str(cache)), strategy="freeze", restore_best=False)
        found.append((run.fit_run.history[-1]["train_loss"], model.head.state_dict()))
    assert "the features of 24 training images" in capsys.readouterr().err
    (loss, head), (plain_loss, plain_head) = found
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    for name, value in head.items():
        assert torch.allclose(value, plain_head[name], atol=1e-4), name


@pytest.mark.long
def test_features_of_tokens_are_not_those_of_the_pooled_backbone_in_the_cache(tmp_path, capsys):
    for head in ("attention", "linear"):
        run = trainer(tmp_path / f"run-{head}")
        run.finetune(on_tokens(head), datamodule=classes(tmp_path / head), strategy="freeze")
    assert "are in the cache" not in capsys.readouterr().err


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("strategy", [("freeze_unfreeze", 1), ("lora", 2), ("layer_decay", 0.5)])
def test_a_model_on_tokens_is_trained_and_stored(tmp_path, strategy):
    model = on_tokens()
    trainer(tmp_path / "run").finetune(model, datamodule=classes(tmp_path), strategy=strategy, restore_best=False)
    paths = str(tmp_path / "val")
    expected = [one.probabilities for one in model.predict(paths)]
    for again in (flashtask.load(tmp_path / "run"), flashtask.load(model.save_pretrained(tmp_path / "saved"))):
        assert again.feature_info == model.feature_info
        for one, other in zip(again.predict(paths), expected, strict=True):
            assert one.probabilities == pytest.approx(other, abs=1e-4)


@pytest.mark.long
def test_tokens_that_take_more_than_a_gigabyte_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("flashtask.trainer.feature_cache._MOST_BYTES", 1000)
    plan = trainer(tmp_path / "run").plan(on_tokens(), datamodule=classes(tmp_path), strategy="freeze")
    assert "they would take" in str(plan)


def test_heads_as_modules_say_what_they_take(tmp_path):
    pyramid = build_backbone("timm/test_resnet", pretrained=False, gives="maps", out_indices=(1, 2, 3))
    with pytest.warns(UserWarning, match="cannot be stored"):
        model = PointFinder(head=HeatmapHead(pyramid.features, 1), pretrained=False)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 16, 16)
