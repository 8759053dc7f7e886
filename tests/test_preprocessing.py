"""`Preprocessing`: what is left out is the backbone's own, what is stored is complete, and bounds keep memory small."""

from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_trees import write_image
from PIL import Image
from small import colour_folders

from flashtask import ImageClassificationData, ImageClassifier, Preprocessing, Trainer, load, read_checkpoint
from flashtask.cli import run as flashtask
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import stored_preprocessing
from flashtask.data import decoding
from flashtask.data.decoding import Fitting
from flashtask.data.transforms import eval_transform

TINY = {"backbone": "timm/test_resnet", "pretrained": False}
BACKBONE = Preprocessing((3, 96, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.95, "bicubic", "squash", "whole", (1, 9))


@pytest.mark.parametrize(
    ("given", "size"),
    [(128, (128, 128)), ((48, 32), (48, 32)), ((3, 48, 32), (48, 32)), (np.int64(7), (7, 7)), ([3, 5, 6], (5, 6))],
)
def test_a_size_alone_keeps_everything_else_of_the_backbone(given, size):
    filled = Preprocessing(input_size=given).filled_from(BACKBONE)
    assert filled == replace(BACKBONE, input_size=(3, *size))
    assert filled.is_complete


@pytest.mark.parametrize(
    "given",
    [
        {"mean": (0.9, 0.9, 0.9)},
        {"std": (0.9, 0.9, 0.9)},
        {"crop_pct": 1.0},
        {"interpolation": "nearest"},
        {"crop_mode": "border"},
        {"decode": "scaled"},
        {"value_range": (0, 4095)},
        {"input_size": (3, 8, 8), "crop_pct": 0.875},
        {},
    ],
)
def test_each_field_is_the_givers_or_the_backbones(given):
    assert Preprocessing(**given).filled_from(BACKBONE) == replace(BACKBONE, **given)


def test_who_gives_everything_gets_exactly_that():
    own = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, 0.9, "bilinear", "center")
    assert own.is_complete
    assert own.filled_from(BACKBONE) == replace(own, value_range=(1, 9))  # the range is found, not chosen
    assert own.filled_from(replace(BACKBONE, value_range=None)) == own


def test_another_number_of_channels_is_a_contradiction():
    grey = Preprocessing(input_size=(1, 32, 32))
    assert (len(grey.mean), len(grey.std)) == (1, 1)
    with pytest.raises(UsageError, match=r"1 channel\(s\), but the model takes 3") as caught:
        grey.filled_from(BACKBONE)
    assert "in_chans=1" in caught.value.fix
    one = Preprocessing((1, 8, 8), (0.5,), (0.25,), 1.0, "bicubic", "center").resolved()
    assert Preprocessing(input_size=(32, 32)).filled_from(one) == replace(one, input_size=(1, 32, 32))
    with pytest.raises(UsageError, match="mean and std need 1 values"):
        Preprocessing(input_size=(1, 32, 32), mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "record",
    [
        BACKBONE,
        Preprocessing(),
        Preprocessing(128),
        Preprocessing((48, 32)),
        Preprocessing((1, 48, 32), crop_pct=1.0),
        Preprocessing(mean=(0.5,), value_range=(0, 4095)),
        Preprocessing(value_range="format"),
    ],
)
def test_plain_values_give_the_same_record_back(record):
    again = Preprocessing.from_dict(record.to_dict())
    assert (again, again.given) == (record, record.given)


def test_values_that_do_not_say_it_mean_what_they_meant():
    old = BACKBONE.to_dict()
    del old["value_range"]
    assert stored_preprocessing(old).value_range == "format"
    assert Preprocessing.from_dict(old).value_range is None
    del old["decode"]
    assert Preprocessing.from_dict(old).decode == "whole"
    by_hand = Preprocessing.from_dict({"input_size": 32})
    assert by_hand.filled_from(BACKBONE) == replace(BACKBONE, input_size=(3, 32, 32))
    with pytest.raises(UsageError, match="did you mean 'crop_pct'"):
        Preprocessing.from_dict({"crop_pc": 1.0})


WRONG = [
    {"input_size": 16384},
    {"input_size": (3, 4096, 4096)},
    {"input_size": (3, 0, 8)},
    {"input_size": (2000, 8, 8)},
    {"input_size": (8,)},
    {"input_size": "large"},
    {"crop_pct": 1e-9},
    {"crop_pct": 1e-200},
    {"crop_pct": 0.04},
    {"crop_pct": float("nan")},
    {"crop_pct": "whole"},
    {"mean": (1e308,) * 3},
    {"mean": "1,2,3"},
    {"std": (0.5, 0.5, 0.0)},
    {"std": (0.5, 0.5, float("nan"))},
    {"interpolation": "bicubik"},
    {"crop_mode": None, "decode": "half"},
    {"value_range": (0, float("inf"))},
    {"value_range": (-1e308, 1e308)},
    {"value_range": (0, 1e-320)},
    {"value_range": (9, 1)},
    {"value_range": "fromat"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_values_out_of_bounds_are_refused(wrong):
    with pytest.raises(UsageError):
        Preprocessing(**wrong)


def small_data(root, **options):
    train, val = colour_folders(root / "train", each=4), colour_folders(root / "val", each=2)
    return ImageClassificationData.from_folders(train, val, batch_size=4, num_workers=0, **options)


def quiet(folder, **options):
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def test_the_resolved_record_is_the_models_and_what_every_stage_uses(tmp_path):
    data, model = small_data(tmp_path), ImageClassifier(**TINY)
    model.preprocessing = backbones = replace(BACKBONE, decode="scaled", value_range=None)
    data.preprocessing = Preprocessing(input_size=48)
    quiet(tmp_path / "run", max_steps=1).finetune(model, datamodule=data, strategy="freeze")
    expected = replace(backbones, input_size=(3, 48, 48))
    assert model.preprocessing == expected
    assert data.used_preprocessing == expected
    assert data.preprocessing == Preprocessing(input_size=48)  # another backbone will fill it with its own
    stored = read_checkpoint(tmp_path / "run" / "last.ckpt")["preprocessing"]
    assert stored == expected.to_dict()
    assert "given" not in stored
    loaded = load(tmp_path / "run" / "last.ckpt")
    assert loaded.preprocessing == expected
    data.setup("fit")
    image, _ = data.val_dataloader().dataset[2]
    transform = eval_transform(loaded.preprocessing)
    assert torch.equal(image, transform.rest(transform.first.read(str(tmp_path / "val" / "red" / "0.png"))))


def test_data_for_another_number_of_channels_is_refused_before_training(tmp_path):
    data = small_data(tmp_path)
    data.preprocessing = Preprocessing(input_size=(1, 32, 32))
    with pytest.raises(UsageError, match="but the model takes 3"):
        quiet(tmp_path / "run", max_steps=1).finetune(ImageClassifier(**TINY), datamodule=data, strategy="freeze")


# ---- thin pictures: only the crop is computed where the whole would be huge


SMOOTH = ("bilinear", "bicubic", "lanczos", "hamming")
SIZES = [(300, 200), (200, 300), (64, 64), (31, 500), (1000, 40), (3, 90)]
#: Where a sample falls half-way between two pixels, these take either.
SHARP = [(name, size) for name in ("nearest", "box") for size in ((31, 500), (3, 90))]


@pytest.mark.parametrize(("interpolation", "size"), [(name, size) for name in SMOOTH for size in SIZES] + SHARP)
def test_the_crop_of_a_resized_picture_is_what_its_middle_would_be(monkeypatch, interpolation, size):
    """Up to rounding between the passes over rows and columns, whose order Pillow chooses by the size."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    for wanted in ((3, 32, 32), (3, 24, 40)):
        fitting = Fitting(Preprocessing(wanted, interpolation=interpolation))
        monkeypatch.setattr(decoding, "_MOST_RESIZED", 2**24)
        whole = fitting.fit(picture).astype(int)
        monkeypatch.setattr(decoding, "_MOST_RESIZED", 0)
        assert np.abs(whole - fitting.fit(picture)).mean() < 1  # of noise: a pixel beside it gives 20


@pytest.mark.long
@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (2_000_000, 1), (1, 2_000_000)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_strip_takes_little_memory(tmp_path, size, crop_mode):
    path = str(write_image(tmp_path / "strip.png", size))
    fitting = Fitting(Preprocessing(crop_mode=crop_mode))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fitting.read(path).shape == (224, 224, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# ---- files that somebody made to do harm

HOSTILE = [
    {"crop_pct": 1e-9},
    {"crop_pct": 0},
    {"input_size": [3, 16384, 16384]},
    {"input_size": [3, 12000, 12000]},
    {"input_size": [3, 4096, 4096]},
    {"input_size": "12"},
    {"input_size": {}},
    {"mean": [1e308] * 3},
    {"std": [1e-300] * 3},
    {"interpolation": []},
    {"value_range": [3, 1]},
    {"value_range": {}},
    {"given": 7},
    {"surprise": 1},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = quiet(folder / "run", max_steps=1)
    trainer.finetune(ImageClassifier(**TINY), datamodule=small_data(folder), strategy="freeze")
    return folder / "run" / "last.ckpt"


@pytest.mark.long
@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_preprocessing_is_an_integrity_error(checkpoint, tmp_path, change, capfd):
    content = read_checkpoint(checkpoint)
    content["preprocessing"] |= change
    write_checkpoint(tmp_path / "hostile.ckpt", content)
    image = write_image(tmp_path / "a.png")
    assert flashtask(["predict", str(tmp_path / "hostile.ckpt"), str(image)]) == 76
    assert "hostile.ckpt" in (said := capfd.readouterr().err)
    assert "preprocessing" in said


def test_preprocessing_that_is_no_mapping_is_an_integrity_error(checkpoint, tmp_path):
    for number, value in enumerate(("text", 7, [1, 2])):
        content = read_checkpoint(checkpoint)
        content["preprocessing"] = value
        write_checkpoint(tmp_path / f"{number}.ckpt", content)
        assert flashtask(["predict", str(tmp_path / f"{number}.ckpt"), str(write_image(tmp_path / "a.png"))]) == 76
