"""Large images in tiles: where they lie, what is learned of them, and that what is joined again has no seams."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flashtask
from flashtask import (
    ImageClassifier,
    ObjectDetector,
    Preprocessing,
    SemanticSegmentation,
    SemanticSegmentationData,
    Trainer,
)
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.core.seeding import SampleKey
from flashtask.data.decoding import Fitting
from flashtask.data.inputs import read_inputs
from flashtask.data.transforms import eval_transform, train_transform

TILED = Preprocessing((3, 40, 64), crop_mode="tile", crop_pct=1, mean=(0.5, 0.25, 0), std=(1, 1, 1), tile_overlap=0.25)


def pictures(folder: Path, sizes, seed: int = 0) -> Path:
    """Noise with a bright square in each 40 x 40 pixels, and masks of it."""
    draws = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        pixels = draws.integers(0, 60, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for top in range(0, height - 24, 40):
            for left in range(0, width - 24, 40):
                y, x = top + draws.integers(0, 8), left + draws.integers(0, 8)
                pixels[y : y + 16, x : x + 16, draws.integers(0, 3)] += 150
                mask[y : y + 16, x : x + 16] = 1
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def model(**options):
    torch.manual_seed(0)
    options = {"image_size": 64, "resize": "tile", "learning_rate": 5e-3, **options}
    return SemanticSegmentation("timm/test_resnet", pretrained=False, **options)


def trainer(folder, **options):
    return Trainer(output_dir=folder, seed=1, precision="32", enable_progress_bar=False, **options)


def data_of(folder, **options):
    return SemanticSegmentationData.from_root(folder, **{"batch_size": 4, "num_workers": 0, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles")
    pictures(root / "data" / "train", [(150, 90), (64, 64), (90, 150), (130, 130)] * 4)
    pictures(root / "data" / "val", [(50, 40), (64, 64), (161, 64), (200, 135)], seed=1)
    made = model()
    trainer(root / "run", max_epochs=8).finetune(made, datamodule=data_of(root / "data"), strategy="no_freeze")
    return root, made


# ---- where they lie


@pytest.mark.parametrize(
    ("side", "starts"),
    [(20, [-22]), (64, [0]), (65, [0, 1]), (112, [0, 48]), (113, [0, 24, 49]), (160, [0, 48, 96])],
)
def test_tiles_overlap_by_a_quarter_and_end_where_the_picture_does(side, starts):
    places = Fitting(TILED).tiles((side, 40))
    assert [place.left for place in places] == starts
    assert {(place.top, place.size, place.whole, place.resized) for place in places} == {
        (0, (64, 40), (side, 40), (side, 40))
    }


@pytest.mark.parametrize("overlap", [0, 0.25, 0.75])
def test_tiles_cover_every_pixel(overlap):
    fitting = Fitting(Preprocessing((3, 40, 64), crop_mode="tile", crop_pct=1, tile_overlap=overlap))
    for width, height in ((1, 1), (64, 40), (300, 41), (127, 203)):
        covered = np.zeros((height, width), int)
        places = fitting.tiles((width, height))
        for place in places:
            covered[max(0, place.top) : place.top + 40, max(0, place.left) : place.left + 64] += 1
        assert covered.min() >= 1
        lefts = sorted({place.left for place in places})
        assert all(b - a <= 64 * (1 - overlap) for a, b in pairwise(lefts))


def test_what_is_cut_is_the_picture_itself_and_the_mean_beside_it():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 100, 3), dtype=np.uint8)
    first, last = Fitting(TILED).cut(pixels)
    assert (first[5:35] == pixels[:, :64]).all()
    assert (last[5:35] == pixels[:, 36:]).all()
    assert (first[:5] == [128, 64, 0]).all()
    assert (first[35:] == [128, 64, 0]).all()
    values = eval_transform(TILED)(Image.fromarray(pixels))
    assert values.shape == (2, 3, 40, 64)
    assert torch.allclose(
        values[1, :, 5:35].permute(1, 2, 0) + torch.tensor(TILED.mean), torch.from_numpy(last[5:35]) / 255
    )


# ---- seams


class AsItIs(nn.Module):
    """A backbone that gives the pixels."""

    def forward(self, images):
        return [images]


class OfAPixel(nn.Module):
    """Logits of a pixel that depend on nothing else, or on nothing at all."""

    takes = "maps"

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        nn.init.constant_(self.layer.weight, 0)
        nn.init.zeros_(self.layer.bias)
        with torch.no_grad():
            self.layer.weight[:, :, 0, 0] = weight * torch.eye(3)

    def forward(self, maps):
        return self.layer(maps[0])


def of_pixels(weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such modules are not stored
        made = SemanticSegmentation(AsItIs(), num_classes=3, head=OfAPixel(weight), pretrained=False)
    made.preprocessing = TILED
    return made.eval()


def test_a_network_that_sees_single_pixels_gives_the_same_in_tiles_as_at_once(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (217, 301, 3), dtype=np.uint8)
    expected = (pixels / 255 - TILED.mean).argmax(axis=2)
    made = of_pixels(10.0)
    assert (made.predict(pixels).classes == expected).all()
    monkeypatch.setattr("flashtask.tasks.masks._MOST_PIXELS", 900)  # a few rows at once
    assert (made.predict(pixels).classes == expected).all()


def test_a_network_of_constant_weights_has_no_seams():
    pixels = np.random.default_rng(0).integers(0, 255, (217, 301, 3), dtype=np.uint8)
    assert (of_pixels(0.0).predict(pixels).classes == 0).all()


def test_where_two_tiles_overlap_the_nearer_middle_counts_more():
    from flashtask.tasks.masks import classes_of_tiles

    places = Fitting(TILED).tiles((112, 40))
    chances = torch.zeros(2, 2, 40, 64)
    chances[0, 0] = chances[1, 1] = 1
    found = classes_of_tiles(chances, places)
    assert (found[:, :56] == 0).all()
    assert (found[:, 56:] == 1).all()


# ---- learning and measuring


def test_training_takes_a_tile_at_random_in_the_pixels_of_the_file(tmp_path):
    root = pictures(tmp_path / "data", [(150, 90), (40, 90)])
    data = SemanticSegmentationData.from_folders(root, augment="none", num_workers=0)
    data.use_preprocessing(Preprocessing((3, 64, 64), (0, 0, 0), (1, 1, 1), 1, "bilinear", "tile"))
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    with Image.open(root / "images" / "0.png") as image:
        whole = np.array(image)
    mask = np.array(Image.open(root / "masks" / "0.png"))
    windows = np.lib.stride_tricks.sliding_window_view(whole, (64, 64, 3))[:, :, 0]
    found = set()
    for epoch in range(3):
        values, target = dataset[SampleKey(0, epoch, epoch)]
        pixels = (values.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
        ((top, left),) = np.argwhere((windows == pixels).all(axis=(2, 3, 4)))
        assert (target["mask"].numpy() == mask[top : top + 64, left : left + 64]).all()
        found.add((int(top), int(left)))
    assert len(found) > 1
    _, target = dataset[SampleKey(1, 0, 0)]
    assert (target["mask"] == 255).sum() == 24 * 64  # what is beside a narrow picture does not count


@pytest.mark.parametrize("augment", ["none", "light", "medium", lambda image, target: (image, target)])
def test_each_augmentation_gives_one_tile(augment):
    changed = train_transform(TILED, augment).trained
    values, _ = changed.joint(Image.new("RGB", (300, 30)), {})
    assert values.shape == (3, 40, 64)


def test_run_validate_and_written_masks_have_one_mean_iou(trained, tmp_path, capsys):
    root, made = trained
    in_run = json.loads((root / "run" / "summary.json").read_text())["best"]["val_miou"]
    assert in_run > 0.8
    assert run(["validate", str(root / "run"), str(root / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_miou"] == pytest.approx(in_run, abs=1e-6)
    images = str(root / "data" / "val" / "images")
    assert run(["predict", str(root / "run"), images, "--format", "png", "--output", str(tmp_path / "masks")]) == 0
    own, true = [], []
    for file in sorted((root / "data" / "val" / "masks").glob("*.png")):
        with Image.open(file) as mask, Image.open(tmp_path / "masks" / file.name) as written:
            assert written.size == mask.size
            own.append(np.array(written).ravel())
            true.append(np.array(mask).ravel())
    own, true = np.concatenate(own), np.concatenate(true)
    each = [((own == k) & (true == k)).sum() / ((own == k) | (true == k)).sum() for k in range(2)]
    assert np.mean(each) == pytest.approx(in_run, abs=1e-4)
    assert made.preprocessing.crop_mode == "tile"


def test_every_way_to_predict_and_to_load_gives_the_same_masks(trained, tmp_path, monkeypatch):
    root, made = trained
    images = sorted(map(str, (root / "data" / "val" / "images").glob("*.png")))
    expected = [one.classes for one in made.predict(images)]
    assert [one.shape for one in expected] == [(40, 50), (64, 64), (64, 161), (135, 200)]
    monkeypatch.setattr("flashtask.tasks.semantic_segmentation._MOST_TILES", 2)
    saved = flashtask.load(made.save_pretrained(tmp_path / "saved"))
    for found in (
        made.predict(images, num_workers=1),
        [made.predict(one) for one in images],
        flashtask.load(root / "run").predict(images),
        saved.predict(images, batch_size=3),
    ):
        for one, other in zip(found, expected, strict=True):
            assert (one.classes == other).mean() > 0.999
    assert saved.preprocessing == made.preprocessing


def test_a_server_joins_the_tiles_of_several_images(trained):
    from flashtask.serve.model import ServedModel

    root, made = trained
    images = sorted(map(str, (root / "data" / "val" / "images").glob("*.png")))
    served = ServedModel("cells", root / "run")
    try:
        answers = [served.predict(one) for one in read_inputs(images)[0]]
        for answer, expected in zip(answers, made.predict(images), strict=True):
            assert (answer.result().classes == expected.classes).mean() > 0.999
    finally:
        served.close()


def test_tiles_are_not_exported(trained, tmp_path):
    _, made = trained
    with pytest.raises(UsageError, match="not part of an exported model"):
        made.export(tmp_path / "model.onnx")


def test_samples_in_tiles_are_shown(trained):
    root, made = trained
    data = data_of(root / "data")
    data.use_preprocessing(made.preprocessing)
    assert len(data.show_batch("val", num_samples=3).pictures) == 3
    assert len(data.show_batch("train", num_samples=3).pictures) == 3


@pytest.mark.long
def test_two_processes_measure_what_one_measures(trained):
    root, _ = trained
    found = []
    for words in ([], ["--distributed", "ddp", "--devices", "2", "--accelerator", "cpu"]):
        command = [sys.executable, "-m", "flashtask", "validate", str(root / "run"), str(root / "data"), "--json"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=1e-6), name


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(tile_overlap=0.9), "tile_overlap must be from 0 to 0.75"),
        (lambda: model(resize="pad", tile_overlap=0.5), "tile_overlap is for images that are cut into tiles"),
        (lambda: ObjectDetector("timm/test_resnet", pretrained=False, resize="tile"), "are not cut into tiles"),
        (lambda: ImageClassifier("timm/test_resnet", 2, pretrained=False, resize="tile"), "are not cut into tiles"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
