"""The value range of images with more than 8 bits: found over the training images, stored, used by every stage."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import digest, made_long_ago

from flashtask import ImageClassificationData, ImageClassifier, Preprocessing, Trainer, load, read_checkpoint
from flashtask.cli import run as flashtask
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import BadDataError, UsageError
from flashtask.data import inputs
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import Fitting
from flashtask.data.transforms import eval_transform, train_transform

TINY = "timm/test_resnet"
LOW, HIGH = 12, 4071
SMALL = Preprocessing(input_size=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path_factory.mktemp("cache")))


def wide_values(name, index):
    """12-bit noise, brighter for one class than for the other; the first image has both ends of the range."""
    generator = np.random.default_rng([ord(name[0]), index])
    low = 0 if name == "dark" else 1200
    values = generator.integers(low + 20, low + 2800, (24, 24)).astype(np.uint16)
    if (name, index) == ("dark", 0):
        values[0, :2] = LOW, HIGH
    return values


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def as_bytes(values):
    return np.rint((np.clip(values, LOW, HIGH).astype(float) - LOW) * (255 / (HIGH - LOW))).astype(np.uint8)


def tree(root, kind="png", change=lambda values: values):
    for part, count in (("train", 6), ("val", 3), ("test", 3)):
        for name in ("bright", "dark"):
            for index in range(count):
                shift = {"train": 0, "val": 100, "test": 200}[part]
                write(root / part / name / f"{index}.{kind}", change(wide_values(name, index + shift)))
    return root


def data_of(root, parts=("train", "val", "test"), **options):
    folders = {f"{part}_folder": root / part for part in parts}
    made = ImageClassificationData.from_folders(**folders, batch_size=4, num_workers=0, **options)
    made.preprocessing = SMALL
    return made


def classifier():
    torch.manual_seed(0)
    return ImageClassifier(TINY, pretrained=False, learning_rate=0.01)


def trainer_in(folder, **options):
    quiet = {"enable_progress_bar": False, "logger": False, "precision": "32", "seed": 1, "max_epochs": 2}
    return Trainer(output_dir=folder, **{**quiet, **options})


def trained(root, folder, strategy="no_freeze", **options):
    model, trainer = classifier(), trainer_in(folder)
    trainer.finetune(model, datamodule=data_of(root, **options), strategy=strategy)
    return model, trainer


@pytest.mark.long
@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
def test_12_bit_images_train_and_score_as_their_scaled_bytes_do(tmp_path, kind, capfd):
    """Every stage: what is trained, measured and predicted is the same as with 8-bit copies, bit for bit."""
    wide, copies = tree(tmp_path / "wide", kind), tree(tmp_path / "copies", change=as_bytes)
    model, trainer = trained(wide, tmp_path / "a")
    assert f"the 12 training images have more than 8 bits a channel: values {LOW} to 4,071" in capfd.readouterr().err
    same, other = trained(copies, tmp_path / "b")
    assert "8 bits" not in capfd.readouterr().err
    assert trainer.fit_run.history[-1]["val_loss"] == other.fit_run.history[-1]["val_loss"]
    assert digest(model) == digest(same)
    assert (model.preprocessing.value_range, same.preprocessing.value_range) == ((LOW, HIGH), None)
    loaded = load(tmp_path / "a" / "last.ckpt")
    assert loaded.preprocessing == model.preprocessing
    for stage, part in (("validate", "val"), ("test", "test")):
        found = [
            getattr(trainer_in(tmp_path / stage), stage)(one, datamodule=data_of(root, (part,)))
            for one, root in ((loaded, wide), (same, copies))
        ]
        assert found[0] == found[1]
    places = [f"test/{name}/{index}" for name in ("bright", "dark") for index in range(3)]
    expected = [result.scores for result in same.predict([copies / f"{place}.png" for place in places])]
    paths = [wide / f"{place}.{kind}" for place in places]
    assert [result.scores for result in loaded.predict(paths)] == expected
    if kind == "png":
        opened = [Image.fromarray(np.asarray(Image.open(path))) for path in paths]
        assert [result.scores for result in loaded.predict(opened)] == expected
        assert eval_transform(loaded.preprocessing).first.read(wide_values("dark", 200)).dtype == np.uint8


def test_a_range_that_is_given_is_used_and_nothing_is_said(tmp_path, capfd):
    root = tree(tmp_path / "data")
    model, _ = trained(root, tmp_path / "run", value_range=(0, 4095))
    assert model.preprocessing.value_range == (0, 4095)
    assert "8 bits" not in capfd.readouterr().err
    stored = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert stored["preprocessing"]["value_range"] == [0, 4095]
    assert stored["recipe"]["data"]["from_folders"]["value_range"] == [0, 4095]
    data = data_of(root)
    data.preprocessing = Preprocessing(input_size=32, value_range=(0, 65535))
    data.setup("fit")
    assert data.used_preprocessing.value_range == (0, 65535)
    both = data_of(root, value_range=(0, 4095))
    both.preprocessing = data.preprocessing
    with pytest.raises(UsageError, match="differ"):
        both.setup("fit")
    for wrong in (4095, (5, 5), (1, float("nan")), "0,4095"):
        with pytest.raises(UsageError, match=r"value_range must be \(low, high\)"):
            data_of(root, value_range=wrong)


def test_bytes_among_wide_images_are_read_as_they_are_and_that_is_said(tmp_path, capsys):
    root = tree(tmp_path)
    pixels = np.full((24, 24), 77, np.uint8)
    write(root / "train" / "dark" / "9.png", pixels)
    data = data_of(root)
    data.setup("fit")
    assert "12 of 13 training images have more than 8 bits" in (said := capsys.readouterr().err)
    assert "the others are read as they are" in said
    dataset = data.train_dataloader().dataset
    steps = eval_transform(data.used_preprocessing).first
    assert (steps.read(dataset.paths[-1]) == 77).all()


def test_wide_images_to_validate_on_need_a_range_too(tmp_path):
    root = tree(tmp_path, change=as_bytes)
    write(root / "val" / "dark" / "9.png", wide_values("dark", 9))
    with pytest.raises(BadDataError, match=r"val/dark/9\.png") as caught:
        data_of(root).setup("fit")
    assert "value_range=(0, 4095)" in caught.value.fix
    data = data_of(root, value_range=(0, 4095))
    data.setup("fit")
    assert len(list(data.val_dataloader())) == 2


def test_a_model_of_8_bit_images_refuses_wide_ones_by_every_verb(tmp_path, capfd):
    root, wide = tree(tmp_path / "bytes", change=as_bytes), tree(tmp_path / "wide")
    model, trainer = trained(root, tmp_path / "run")
    with pytest.raises(BadDataError, match="more than 8 bits"):
        trainer_in(tmp_path / "v").validate(model, datamodule=data_of(wide, ("val",)))
    with pytest.raises(BadDataError, match="more than 8 bits"):
        model.predict(wide / "test" / "dark" / "0.png")
    with pytest.raises(BadDataError, match="given as a PIL image"):
        model.predict(Image.fromarray(wide_values("dark", 0)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    arguments = ["predict", str(tmp_path / "a.ckpt"), str(wide / "test"), "--format", "jsonl"]
    capfd.readouterr()
    assert flashtask(arguments) == 65
    assert "6 of 6 images cannot be read" in (said := capfd.readouterr().err)
    assert "--value-range 0,4095" in said
    assert flashtask([*arguments, "--value-range", "0,4095"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    model.preprocessing = replace(model.preprocessing, value_range=(0, 4095))
    (expected,) = model.predict([wide / "test" / "bright" / "0.png"])
    assert rows[0]["score"] == pytest.approx(expected.score, abs=1e-4)


@pytest.mark.long
def test_an_older_checkpoint_goes_by_the_range_of_the_format(tmp_path):
    """It says no range: 65535 was white, for each of its stages."""
    root = tree(tmp_path / "bytes", change=as_bytes)
    _, trainer = trained(root, tmp_path / "run")
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    content = read_checkpoint(tmp_path / "new.ckpt")
    del content["preprocessing"]["value_range"]
    write_checkpoint(tmp_path / "old.ckpt", content)
    old = load(tmp_path / "old.ckpt")
    assert old.preprocessing.value_range == "format"
    write(tmp_path / "a.png", wide := wide_values("dark", 0))
    write(tmp_path / "b.png", np.rint(wide / 257).astype(np.uint8))
    assert old.predict(tmp_path / "a.png").scores == old.predict(tmp_path / "b.png").scores
    # It is resumed, since there is nothing in the data that a range would change.
    again = trainer_in(tmp_path / "again", max_epochs=3)
    again.finetune(classifier(), datamodule=data_of(root), strategy="no_freeze", ckpt_path=tmp_path / "old.ckpt")
    assert again.fit_run.history[-1]["epoch"] == 2


@pytest.mark.long
def test_a_run_of_wide_images_is_not_resumed_with_another_range(tmp_path):
    root = tree(tmp_path / "data")
    trained(root, tmp_path / "run")
    last = tmp_path / "run" / "last.ckpt"
    with pytest.raises(UsageError, match=r"value_range \[12.0, 4071.0\] -> \[0.0, 4095.0\]"):
        trainer_in(tmp_path / "b", max_epochs=3).finetune(
            classifier(), datamodule=data_of(root, value_range=(0, 4095)), strategy="no_freeze", ckpt_path=last
        )
    again = trainer_in(tmp_path / "c", max_epochs=3)
    again.finetune(classifier(), datamodule=data_of(root), strategy="no_freeze", ckpt_path=last)
    assert again.fit_run.history[-1]["epoch"] == 2


def test_a_model_that_is_trained_further_keeps_its_range_and_says_what_is_clipped(tmp_path, capfd):
    model, _ = trained(tree(tmp_path / "a"), tmp_path / "run", value_range=(0, 2000))
    capfd.readouterr()
    trainer_in(tmp_path / "b").finetune(model, datamodule=data_of(tmp_path / "a"), strategy="freeze")
    assert "the model's range 0 to 2,000 is scaled to 0..255, and what is outside is clipped" in capfd.readouterr().err
    assert model.preprocessing.value_range == (0, 2000)


def test_data_that_meets_another_model_finds_its_range_again(tmp_path):
    data = data_of(tree(tmp_path / "data"))
    for number in range(2):
        model = classifier()
        trainer_in(tmp_path / str(number)).finetune(model, datamodule=data, strategy="freeze")
        assert model.preprocessing.value_range == (LOW, HIGH)


def test_the_bounds_of_files_are_remembered(tmp_path, monkeypatch):
    root = tree(tmp_path)
    made_long_ago(root.rglob("*.png"))
    first = data_of(root)
    first.setup("fit")
    monkeypatch.setattr(inputs, "image_bounds", lambda path, name: pytest.fail(f"{path} is read again"))
    second = data_of(root)
    second.setup("fit")
    assert second.used_preprocessing == first.used_preprocessing


def test_bad_images_have_no_say_in_the_range(tmp_path):
    root = tree(tmp_path)
    np.save(root / "train" / "dark" / "nan.npy", np.array([[np.nan, 1e9]]))
    with pytest.raises(BadDataError, match="NaN"):
        data_of(root).setup("fit")
    data = data_of(root, on_bad_image="skip")
    data.setup("fit")
    assert data.used_preprocessing.value_range == (LOW, HIGH)


def test_images_of_one_value_have_no_range(tmp_path):
    root = tree(tmp_path, change=lambda values: np.full_like(values, 7))
    with pytest.raises(BadDataError, match="every pixel"):
        data_of(root).setup("fit")


def test_kept_pixels_and_features_of_one_range_are_not_served_for_another(tmp_path):
    path = tmp_path / "a.png"
    write(path, wide_values("dark", 0))
    cache = DecodedCache(2**20)
    keys, pixels = set(), set()
    for value_range in ((0, 4095), (0, 65535), "format"):
        preprocessing = SMALL.resolved()
        preprocessing = replace(preprocessing, value_range=value_range)
        transforms = [eval_transform(preprocessing), train_transform(preprocessing, "light").trained]
        for transform in transforms:
            dataset = ImageFileDataset([str(path)], [0], transform, cache=cache)
            keys.update(dataset.contents_of([0]))
        pixels.add(np.atleast_3d(cache.read(Fitting(preprocessing), str(path)))[..., 0].tobytes())
    assert len(keys) == 6
    assert len(pixels) == 2  # 0..65535 is what the format says
    assert len(cache) == 3


@pytest.mark.long
def test_features_are_computed_anew_for_another_range(tmp_path, capfd):
    root = tree(tmp_path / "data")
    said = []
    for number, value_range in enumerate(((0, 4095), (0, 65535), (0, 4095))):
        trained(root, tmp_path / str(number), "freeze", value_range=value_range)
        said.append("training images are in the cache" in capfd.readouterr().err)
    assert said == [False, False, True]


@pytest.mark.long
def test_a_range_is_an_option_and_a_recipe_key(tmp_path, capfd):
    root = tree(tmp_path / "data")
    options = ["--backbone", TINY, "--no-pretrained", "--epochs", "1", "--quiet", "--strategy", "freeze"]
    run = str(tmp_path / "run")
    assert flashtask(["finetune", str(root), *options, "--output-dir", run, "--value-range", "0,4095"]) == 0
    assert load(tmp_path / "run" / "best.ckpt").preprocessing.value_range == (0, 4095)
    again = str(tmp_path / "again")
    assert flashtask(["finetune", "--config", f"{run}/recipe.yaml", "--output-dir", again]) == 0
    assert load(tmp_path / "again" / "best.ckpt").preprocessing.value_range == (0, 4095)
    assert flashtask(["finetune", str(root), *options, "--value-range", "4095"]) == 2
    assert "such as 0,4095" in capfd.readouterr().err
