"""Segmentation from folders of masks to predicted masks: training, metrics, prediction, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flashtask
from flashtask import SemanticSegmentation, SemanticSegmentationData, Trainer, build_head, build_pyramid
from flashtask.cli import run
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.data.semantic_segmentation import IGNORED
from flashtask.tasks.mask_losses import MASK_LOSSES
from flashtask.tasks.mask_metrics import BoundaryF, mask_metrics

LABELS = ("ground", "red", "blue")


def squares(folder: Path, count: int, seed: int = 0) -> Path:
    """Pictures of two sizes with a red and a blue rectangle each, and masks with a line that does not count."""
    draws = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        width, height = (64, 48) if number % 2 else (48, 56)
        pixels, mask = np.full((height, width, 3), 30, np.uint8), np.zeros((height, width), np.uint8)
        for label, colour in ((1, (220, 60, 60)), (2, (60, 60, 220))):
            x, y = draws.integers(0, width - 24), draws.integers(0, height - 24)
            pixels[y : y + 20, x : x + 24] = colour
            mask[y : y + 20, x : x + 24] = label
        mask[0, :8] = 255
        noise = draws.integers(0, 20, pixels.shape, dtype=np.uint8)
        Image.fromarray(pixels + noise).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(LABELS))
    return folder


def model(**options):
    torch.manual_seed(0)
    return SemanticSegmentation("timm/test_resnet", pretrained=False, image_size=64, learning_rate=3e-3, **options)


def trainer(folder, **options):
    return Trainer(output_dir=folder, seed=1, precision="32", enable_progress_bar=False, **options)


def data_of(folder, **options):
    return SemanticSegmentationData.from_root(folder, batch_size=6, num_workers=0, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that fits its few training images."""
    root = tmp_path_factory.mktemp("segmentation")
    squares(root / "data" / "train", 24)
    squares(root / "data" / "val", 5, seed=1)
    fitted = trainer(root / "run", max_epochs=16)
    made = model(head_options={"width": 32})
    fitted.finetune(made, datamodule=data_of(root / "data", augment="none"), strategy="no_freeze")
    return root, made


def test_a_small_data_set_is_fitted(trained):
    root, made = trained
    (metrics,) = trainer(root / "again").validate(made, datamodule=data_of(root / "data"), verbose=False)
    assert metrics["val_miou"] > 0.9
    assert made.labels == LABELS


@pytest.mark.long
def test_run_validate_and_written_masks_have_one_mean_iou(trained, tmp_path, capsys):
    root, _ = trained
    in_run = json.loads((root / "run" / "summary.json").read_text())["best"]["val_miou"]
    assert run(["validate", str(root / "run"), str(root / "data"), "--json", "--per-class"]) == 0
    validated = json.loads(capsys.readouterr().out)
    images = str(root / "data" / "val" / "images")
    words = ["--format", "png", "--output", str(tmp_path / "masks"), "--draw", str(tmp_path / "drawn")]
    assert run(["predict", str(root / "run"), images, *words]) == 0
    own, true = [], []
    for file in sorted((root / "data" / "val" / "masks").glob("*.png")):
        with Image.open(file) as mask, Image.open(tmp_path / "masks" / file.name) as written:
            assert written.size == mask.size
            assert written.mode == "P"
            own.append(np.array(written).ravel())
            true.append(np.array(mask).ravel())
    own, true = np.concatenate(own), np.concatenate(true)
    own, true = own[true != 255], true[true != 255]
    each = [((own == k) & (true == k)).sum() / ((own == k) | (true == k)).sum() for k in range(3)]
    assert validated["val_miou"] == pytest.approx(in_run, abs=1e-6)
    assert np.mean(each) == pytest.approx(in_run, abs=1e-4)  # a pixel between two classes may round to the other
    assert validated["val_iou_red"] == pytest.approx(each[1], abs=1e-3)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 5


def test_predictions_are_masks_in_the_pixels_of_the_file(trained):
    root, made = trained
    found = made.predict(str(root / "data" / "val" / "images" / "0.png"))
    assert found.classes.shape == (56, 48)
    row = found.as_row()
    assert list(row) == ["path", "share_ground", "share_red", "share_blue"]
    assert sum(row[name] for name in list(row)[1:]) == pytest.approx(1)
    assert found.to_dict()["classes"]["red"]["area"] == (found.classes == 1).sum()
    assert found.draw(Image.new("RGB", (48, 56))).height > 56
    assert found._repr_png_().startswith(b"\x89PNG")


def test_images_of_any_size_are_predicted(trained):
    _, made = trained
    for shape in ((1, 1, 3), (7, 500, 3), (131, 97, 3)):
        assert made.predict(np.zeros(shape, np.uint8)).classes.shape == shape[:2]


@pytest.mark.long
def test_rows_of_a_large_file_are_found_in_parts_with_the_same_result(trained, monkeypatch):
    _, made = trained
    image = np.random.default_rng(0).integers(0, 255, (150, 90, 3), dtype=np.uint8)
    whole = made.predict(image).classes
    monkeypatch.setattr("flashtask.tasks.masks._MOST_PIXELS", 900)
    assert (made.predict(image).classes == whole).all()


@pytest.mark.long
def test_a_model_is_stored_and_loaded_with_its_classes(trained, tmp_path):
    root, made = trained
    image = str(root / "data" / "val" / "images" / "1.png")
    expected = made.predict(image)
    for again in (flashtask.load(root / "run"), flashtask.load(made.save_pretrained(tmp_path / "saved"))):
        found = again.predict(image)
        assert (found.classes == expected.classes).mean() > 0.999
        assert (found.labels, found.colours) == (expected.labels, expected.colours)


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    squares(tmp_path / "data" / "train", 8)
    squares(tmp_path / "data" / "val", 2, seed=1)
    found = []
    for name, epochs in (("whole", (2,)), ("resumed", (1, 2))):
        for most in epochs:
            made = model(lr_scheduler="constant")
            path = tmp_path / name / "last.ckpt" if most > epochs[0] else None
            data = data_of(tmp_path / "data", augment="light")
            options = {"strategy": "freeze_unfreeze:1", "restore_best": False, "ckpt_path": path}
            trainer(tmp_path / name, max_epochs=most).finetune(made, datamodule=data, **options)
        found.append(made.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


@pytest.mark.long
def test_two_processes_measure_what_one_measures(trained, capsys):
    root, _ = trained
    words = ["validate", str(root / "run"), str(root / "data"), "--json", "--accelerator", "cpu"]
    assert run(words) == 0
    one = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "flashtask", *words, "--distributed", "ddp", "--devices", "2"]
    two = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, value in one.items():
        if "loss" not in name:  # the loss of a batch is over its pixels, and batches differ
            assert two[name] == pytest.approx(value, abs=1e-6), name


def test_the_command_line_trains_on_images_beside_masks(tmp_path, capsys):
    squares(tmp_path / "data", 8)
    words = ["--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1"]
    words += ["--image-size", "64", "--batch-size", "4", "--output-dir", str(tmp_path / "run")]
    assert run(["finetune", str(tmp_path / "data"), *words]) == 0
    said = capsys.readouterr().err
    assert "images in images/, masks in masks/" in said
    assert "3 classes of pixels, from masks: ground (0), red (1), blue (2); 255 does not count" in said
    assert "task: semantic_segmentation (images beside masks)" in said
    words = ["--task", "image_classification", "--epochs", "1", "--output-dir", str(tmp_path / "other")]
    assert run(["finetune", str(tmp_path / "data"), *words]) == 65
    assert "--task semantic_segmentation" in capsys.readouterr().err


# ---- heads


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("head", ["fpn", "unet"])
@pytest.mark.parametrize("size", [(64, 96), (50, 37)])
def test_heads_give_the_resolution_of_the_input(head, size):
    made = SemanticSegmentation("timm/test_resnet", num_classes=3, head=head, pretrained=False, image_size=size).eval()
    images = torch.zeros(2, 3, *size)
    assert made.predict_step(images, 0).shape == (2, 3, *size)
    mask = torch.full((2, *size), IGNORED)
    mask[:, :5] = 1
    loss = made.loss(made(images), mask)
    assert all(torch.isfinite(part) for part in loss.values())


@pytest.mark.long
@pytest.mark.parametrize("name", ["unet", "unetplusplus", "manet", "linknet", "fpn", "upernet", "segformer"])
@pytest.mark.parametrize("backbone", ["resnet18", "timm/convnext_atto"])
def test_decoders_of_the_library_are_heads(name, backbone):
    pytest.importorskip("segmentation_models_pytorch")
    pyramid = build_pyramid(backbone, pretrained=False)
    head = build_head(f"smp/{name}", pyramid.features, 3).eval()
    assert head(pyramid.module.eval()(torch.zeros(1, 3, 64, 96))).shape[1:] == (3, 64, 96)
    with pytest.raises(UnknownNameError):
        build_head(f"smp/{name}", pyramid.features, 3, widht=3)


def test_a_head_for_vectors_is_refused():
    with pytest.raises(UsageError, match="take maps"):
        SemanticSegmentation("timm/test_resnet", num_classes=2, head="linear", pretrained=False)


# ---- losses and metrics


@pytest.mark.parametrize("name", list(MASK_LOSSES))
def test_losses_fall_towards_the_truth_and_leave_out_what_does_not_count(name):
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (2, 8, 8), generator=draws)
    targets[:, :2] = IGNORED
    hot = torch.nn.functional.one_hot(targets.where(targets != IGNORED, 0), 3).movedim(-1, 1).float()

    def total(outputs):
        found = MASK_LOSSES[name](outputs, targets, None)
        return torch.stack(list(found.values())).sum() if isinstance(found, dict) else found

    assert total(30 * hot) < 0.02 < total(hot) < total(-hot)
    outputs = torch.randn(2, 3, 8, 8, generator=draws, requires_grad=True)
    total(outputs).backward()
    assert outputs.grad[:, :, :2].abs().max() == 0
    assert outputs.grad[:, :, 2:].abs().max() > 0
    nothing = torch.full_like(targets, IGNORED)
    found = MASK_LOSSES[name](outputs, nothing, None)
    assert all(torch.isfinite(one) for one in (found.values() if isinstance(found, dict) else [found]))


def test_cross_entropy_is_that_of_torch():
    outputs, targets = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5))
    targets[0, 0] = IGNORED
    for weight in (None, torch.tensor([1.0, 2.0, 0.5])):
        expected = torch.nn.functional.cross_entropy(outputs, targets, weight, ignore_index=IGNORED)
        assert torch.allclose(MASK_LOSSES["cross_entropy"](outputs, targets, weight), expected)


def test_metrics_are_those_that_a_hand_counts():
    target = torch.tensor([[0, 0, 1, 1], [0, 0, 1, IGNORED]])
    own = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 2]])
    metrics = mask_metrics(4)
    for metric in metrics.values():
        metric.update([own], [target])
    assert metrics["miou"].compute() == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert metrics["dice"].compute() == pytest.approx((6 / 7 + 6 / 7) / 2)
    assert metrics["pixel_accuracy"].compute() == pytest.approx(6 / 7)


def test_borders_count_within_a_tolerance():
    target = torch.zeros(100, 100, dtype=torch.long)
    target[:, 50:] = 1
    for shift, expected in ((0, 1.0), (1, 1.0), (20, 0.0)):
        metric = BoundaryF(2)
        metric.update([target.roll(shift, 1).where(torch.arange(100) >= shift, 0)], [target])
        assert metric.compute() == pytest.approx(expected), shift


def test_metrics_over_nothing_but_ignored_pixels_are_no_number_and_no_error():
    metrics = mask_metrics(2)
    metrics["boundary_f"].update([torch.zeros(4, 4).long()], [torch.full((4, 4), IGNORED)])
    assert torch.isnan(metrics["boundary_f"].compute())


def test_further_metrics_are_named():
    made = SemanticSegmentation("timm/test_resnet", num_classes=2, pretrained=False, metrics=["mcc", "f1_per_class"])
    assert "mcc" in made.make_metrics(2)
    assert "f1" in made.asked_class_metrics(2)
    with pytest.raises(UnknownNameError):
        SemanticSegmentation("timm/test_resnet", num_classes=2, pretrained=False, metrics=["auroc"]).make_metrics(2)
