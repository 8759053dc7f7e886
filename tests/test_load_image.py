"""Files that a function of the user's reads: training, checkpoints, prediction, evaluation and shards use the same."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import quiet

import flashtask
from flashtask import IMAGE_LOADERS, ImageClassificationData, ImageClassifier, Preprocessing
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UnknownNameError, UsageError

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)


def load_dat(path):
    with open(path, "rb") as file:
        return np.frombuffer(file.read(), np.uint8).reshape(20, 20, 3)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{'ab'[row % 2]}-{row}.dat" for row in range(12)]
    for path, pixels in zip(paths, PIXELS, strict=True):
        path.write_bytes(pixels.tobytes())
    return list(map(str, paths))


@pytest.fixture
def registered():
    IMAGE_LOADERS.register("dat", load_dat)
    yield "dat"
    IMAGE_LOADERS.remove("dat")


def fitted(files, tmp_path, load_image):
    data = ImageClassificationData.from_files(
        files, target=r"/(\w)-", load_image=load_image, val_split=4, batch_size=4, preprocessing=Preprocessing(16)
    )
    model = ImageClassifier("timm/test_resnet", pretrained=False)
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return model


def scores(model, given):
    return torch.tensor([one.scores[0] for one in model.predict(given)])


@pytest.mark.parametrize("given", ["dat", load_dat], ids=["by name", "the function"])
def test_a_registered_function_is_in_the_checkpoint_and_reads_the_files_of_predict(given, registered, files, tmp_path):
    model = fitted(files, tmp_path, given)
    model.save_pretrained(tmp_path / "folder")
    expected = scores(model, PIXELS)
    for loaded in (model, flashtask.load(tmp_path / "model.ckpt"), flashtask.load(tmp_path / "folder")):
        assert loaded.load_image == "dat"
        assert torch.equal(scores(loaded, files), expected)
        assert loaded.predict(files[0]).path == files[0]
        assert torch.equal(scores(loaded, PIXELS), expected)  # arrays are taken as they are
    assert scores(model, files[:2]).allclose(scores(model, list(PIXELS[:2])))


def test_commands_read_files_as_the_checkpoint_says(registered, files, tmp_path, capsys):
    model = fitted(files, tmp_path, "dat")
    assert run(["predict", str(tmp_path / "model.ckpt"), *files, "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["label"] for row in rows] == [one.label for one in model.predict(files)]
    table = tmp_path / "all.csv"
    table.write_text("file,target\n" + "".join(f"{path},{'ab'[row % 2]}\n" for row, path in enumerate(files)))
    assert run(["validate", str(tmp_path / "model.ckpt"), str(table), "--input", "file", "--json"]) == 0
    right = [one.label == "ab"[row % 2] for row, one in enumerate(model.predict(files))]
    assert json.loads(capsys.readouterr().out)["val_accuracy"] == pytest.approx(sum(right) / 12)
    words = ["--input", "file", "--load-image", "dta"]
    assert run(["audit", str(table), *words]) == 2
    assert "did you mean 'dat'" in capsys.readouterr().err
    assert run(["audit", str(table), *words[:-1], "dat", "--json"]) == 0
    assert sum(json.loads(capsys.readouterr().out)["sizes"].values()) == 12


def test_a_function_without_a_name_is_asked_for_by_name(files, tmp_path):
    model = fitted(files, tmp_path, load_dat)
    expected = scores(model, files)  # the model that was trained here still has it
    loaded = flashtask.load(tmp_path / "model.ckpt")
    assert loaded.load_image == {"not_saved": "load_dat"}
    assert torch.equal(scores(loaded, PIXELS), expected)
    with pytest.raises(UsageError, match=r"(?s)by the function 'load_dat'.*fix: model.load_image = load_dat"):
        loaded.predict(files)
    loaded.load_image = load_dat
    assert torch.equal(scores(loaded, files), expected)
    with pytest.raises(UsageError, match="load_image must be a function"):
        loaded.load_image = 3


def test_a_name_that_is_not_registered_here_says_what_to_import(files, tmp_path):
    IMAGE_LOADERS.register("dat", load_dat)
    try:
        fitted(files, tmp_path, "dat")
    finally:
        IMAGE_LOADERS.remove("dat")
    loaded = flashtask.load(tmp_path / "model.ckpt")
    with pytest.raises(UnknownNameError, match=r"(?s)no image loader named 'dat'.*fix: import that module"):
        loaded.predict(files[0])


def test_other_training_data_has_its_own_way_of_reading(registered, files, tmp_path):
    model = fitted(files, tmp_path, "dat")
    for row, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{'ab'[row % 2]}-{row}.png")
    images = ImageClassificationData.from_files(sorted(map(str, tmp_path.glob("*.png"))), target=r"/(\w)-")
    quiet(tmp_path, max_epochs=1).fit(model, datamodule=images)
    assert model.load_image is None
    assert model.predict(str(tmp_path / "a-0.png")).label in ("a", "b")


def test_shards_hold_what_the_function_gives(files, tmp_path):
    data = ImageClassificationData.from_files(files, target=r"/(\w)-", load_image=load_dat, augment="none")
    data.save_shards(tmp_path / "shards")
    again = ImageClassificationData.from_shards(tmp_path / "shards", augment="none")
    for one in (data, again):
        one.preprocessing = Preprocessing(16)
        one.setup("fit")
    ours, theirs = (
        {float(image.double().sum()) for image, _ in map(one.train_dataloader().dataset.__getitem__, range(12))}
        for one in (data, again)
    )
    assert ours == theirs
    assert len(ours) == 12


def test_what_is_not_a_picture_is_named_with_the_file(files):
    data = ImageClassificationData.from_files(files, target=r"/(\w)-", load_image=lambda path: {"pixels": 1})
    with pytest.raises(BadDataError, match=r"(?s)12 of 12 images.*a-0.dat.*not an image: dict"):
        data.setup("fit")


# ---- folders


@pytest.fixture
def class_folders(tmp_path):
    """`a/` and `b/` with six `.DAT` files each, and files that are no pictures for the function beside them."""
    for row, pixels in enumerate(PIXELS):
        folder = tmp_path / "data" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:02}.DAT").write_bytes(pixels.tobytes())
        (folder / "thumb.png").write_bytes(b"not of this data")
    return tmp_path / "data"


@pytest.fixture
def with_suffix():
    IMAGE_LOADERS.register("dat", load_dat, suffixes=[".dat"])
    yield "dat"
    IMAGE_LOADERS.remove("dat")


def test_folders_stand_for_the_files_of_the_function(with_suffix, class_folders, tmp_path, capsys):
    words = ["--load-image", "dat", "--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1", "--seed", "0"]
    assert run(["finetune", str(class_folders), *words, "--output-dir", str(tmp_path / "run")]) == 0
    assert "2 file(s) without the extension of an image are not used: 'thumb.png'" in "".join(capsys.readouterr())
    model = flashtask.load(tmp_path / "run")
    found = model.predict(class_folders)
    assert [one.path for one in found] == sorted(map(str, class_folders.rglob("*.DAT")))
    assert torch.equal(scores(model, class_folders), scores(model, [*PIXELS[::2], *PIXELS[1::2]]))
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), str(class_folders), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["path"], row["label"]) for row in rows] == [(one.path, one.label) for one in found]
    assert run(["validate", str(tmp_path / "run"), str(class_folders), "--json"]) == 0
    right = [one.label == one.path[-8] for one in found]
    assert json.loads(capsys.readouterr().out)["val_accuracy"] == pytest.approx(sum(right) / 12)
    assert run(["audit", str(class_folders), *words[:2], "--json"]) == 0
    assert sum(json.loads(capsys.readouterr().out)["sizes"].values()) == 12
    assert run(["show", str(class_folders), *words[:2], "--output", str(tmp_path / "batch.png")]) == 0
    assert run(["predict", str(tmp_path / "run"), str(tmp_path / "run"), "--format", "csv"]) == 65
    assert "no images below" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["dat", load_dat], ids=["by name", "the function"])
def test_a_folder_of_files_without_classes_is_read_alike(given, with_suffix, class_folders):
    for data in (
        ImageClassificationData.from_files(class_folders, target=r"/(\w)/", load_image=given),
        ImageClassificationData.from_folders(predict_folder=class_folders, load_image=given),
        ImageClassificationData.from_root(class_folders, load_image=given),
    ):
        assert sum(data.sizes().values()) == 12
        assert next(iter(data.recipe().values()))["load_image"] == "dat"


def test_suffixes_may_be_those_of_the_function_and_need_a_dot(class_folders):
    def load(path):
        return load_dat(path)

    load.suffixes = ".dat"
    assert ImageClassificationData.from_folders(class_folders, load_image=load).sizes() == {"train": 12}
    load.suffixes = ["dat"]
    with pytest.raises(UsageError, match=r"suffixes must begin with a dot, and are \['dat'\]"):
        ImageClassificationData.from_folders(class_folders, load_image=load)
