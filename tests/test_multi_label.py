"""Several labels an image, with thresholds that validation chooses; losses, class weights and metrics by name."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import colour_folders
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import flashtask
from flashtask import DataModule, ImageClassificationData, ImageClassifier, Label, Labels, Trainer
from flashtask.cli import run
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.tasks.losses import class_weights
from flashtask.tasks.metrics import LabelsF1, MeanAveragePrecision


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Pictures that are bright or not, and red or not, independently; `tags.csv` names both in one column."""
    folder = tmp_path_factory.mktemp("cells")
    generator = np.random.default_rng(1)
    lines, tags = ["path,bright,red"], ["path,tags"]
    for number in range(40):
        bright, red = number % 2, number // 2 % 2
        pixels = generator.integers(0, 60, (32, 32, 3)) + 120 * bright
        pixels[..., 0] += 70 * red
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,{bright},{red}")
        tags.append(f"{number:02}.png,{'|'.join(n for n, on in (('bright', bright), ('red', red)) if on)}")
    (folder / "cells.csv").write_text("\n".join(lines) + "\n")
    (folder / "tags.csv").write_text("\n".join(tags) + "\n")
    return folder / "cells.csv"


def data_of(table, **options):
    given = {"target_fields": ["bright", "red"], **options}
    return ImageClassificationData.from_csv(
        "path", train_file=table, val_split=0.4, batch_size=8, preprocessing=Preprocessing(input_size=32), **given
    )


def fitted(table, folder, **options):
    model = ImageClassifier("timm/test_resnet", pretrained=False, multi_label=True, learning_rate=0.02, **options)
    trainer = Trainer(max_epochs=3, output_dir=folder, enable_progress_bar=False)
    data = data_of(table)
    trainer.finetune(model, datamodule=data, strategy="freeze")
    return trainer, model, data


def f1_of(says, holds):
    hits = (says & holds).sum(0)
    return (2 * hits / (2 * hits + (says & ~holds).sum(0) + (~says & holds).sum(0))).mean()


@pytest.mark.long
def test_the_run_and_validate_and_the_rows_agree(table, tmp_path, capsys):
    trainer, model, data = fitted(table, tmp_path / "run")
    assert model.labels == ("bright", "red")
    best = dict(trainer.callback_metrics)
    assert {"val_map", "val_f1", "val_loss"} <= best.keys()
    (again,) = trainer.validate(model, datamodule=data)
    assert again == pytest.approx({name: best[name] for name in again}, abs=1e-5)

    loaded = flashtask.load(tmp_path / "run")
    assert loaded.thresholds == model.thresholds is not None
    assert loaded.monitor == "val_map"
    paths = [str(table.parent / name) for name in data.split_manifest()]
    rows = {row["path"]: row for row in csv.DictReader(table.read_text().splitlines())}
    holds = np.array([[rows[n][label] == "1" for label in model.labels] for n in data.split_manifest()])
    predicted = loaded.predict(paths)
    assert all(isinstance(one, Labels) for one in predicted)
    says = np.array([[label in one.labels for label in model.labels] for one in predicted])
    assert f1_of(says, holds) == pytest.approx(best["val_f1"], abs=1e-5)
    scores = np.array([[one.probabilities[label] for label in model.labels] for one in predicted])
    assert (says == (scores >= np.array(model.thresholds))).all()

    saved = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    assert saved.thresholds == model.thresholds
    assert saved.predict(paths) == predicted
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), *paths[:2], "--scores", "all", "--format", "jsonl"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["labels"] == list(predicted[0].labels)
    assert first["scores"] == pytest.approx(dict(predicted[0].probabilities))


def test_from_the_command_line_and_repeated_from_its_recipe(table, tmp_path, capsys):
    size = ["--set", "data.from_csv.preprocessing={input_size: 32}", "--set", "data.from_csv.label_separator='|'"]
    model = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet", "--epochs", "2", "--multi-label"]
    tags = str(table.with_name("tags.csv"))
    assert run(["finetune", tags, "--target", "tags", *model, *size, "--output-dir", str(tmp_path / "a")]) == 0
    err = capsys.readouterr().err
    assert "2 labels, any number of them per sample, from the column 'tags': bright, red" in err
    assert "cannot hold" not in err
    assert run(["finetune", str(tmp_path / "a" / "recipe.yaml"), "--quiet", "--output-dir", str(tmp_path / "b")]) == 0
    found = [json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in "ab"]
    assert found[0]["val_f1"] == found[1]["val_f1"]
    assert found[0]["val_loss"] == found[1]["val_loss"]
    capsys.readouterr()
    assert run(["validate", str(tmp_path / "a"), tags, "--json"]) == 0
    assert {"val_map", "val_f1", "val_loss"} <= json.loads(capsys.readouterr().out).keys()
    assert run(["predict", str(tmp_path / "a"), str(table.parent / "03.png")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["path", "labels"]


def test_data_and_model_must_agree_on_how_many_labels(table, tmp_path):
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UsageError, match="several labels per image, but the model predicts one") as caught:
        trainer.finetune(ImageClassifier("timm/test_resnet", pretrained=False), datamodule=data_of(table))
    assert caught.value.fix == "ImageClassifier(multi_label=True)"
    one = ImageClassificationData.from_folders(colour_folders(tmp_path / "train"))
    with pytest.raises(UsageError, match="one label per image, but the model predicts several"):
        trainer.finetune(ImageClassifier("timm/test_resnet", pretrained=False, multi_label=True), datamodule=one)


# ---- metrics


def test_thresholds_have_the_best_f1_of_all():
    generator = torch.Generator().manual_seed(0)
    holds = torch.rand(200, 3, generator=generator) < torch.tensor([0.1, 0.5, 0.9])
    scores = (holds * 0.3 + 0.7 * torch.rand(200, 3, generator=generator)).clamp(0, 1)
    metric = LabelsF1(3)
    for start in range(0, 200, 32):
        metric.update(scores[start : start + 32], holds[start : start + 32].long())
    found = float(metric.compute())
    assert found == pytest.approx(
        float(f1_of((scores >= torch.tensor(metric.chosen)).numpy(), holds.numpy())), abs=1e-6
    )
    for share in np.linspace(0.01, 0.99, 99):
        for label in range(3):
            others = list(metric.chosen)
            others[label] = float(share)
            assert f1_of((scores >= torch.tensor(others)).numpy(), holds.numpy()) <= found + 1e-6
    fixed = LabelsF1(3, metric.chosen)
    fixed.update(scores, holds.long())
    assert float(fixed.compute()) == pytest.approx(found)


def test_a_label_that_never_occurs_does_not_count():
    metric = LabelsF1(2)
    metric.update(torch.tensor([[0.9, 0.0], [0.2, 0.0]]), torch.tensor([[1, 0], [0, 0]]))
    assert float(metric.compute()) == 1
    assert metric.chosen[1] == 0.5
    precision = MeanAveragePrecision(2)
    precision.update(torch.tensor([[0.9, 0.3], [0.2, 0.1]]), torch.tensor([[1, 0], [0, 0]]))
    assert float(precision.compute()) == 1


# ---- losses, weights and metrics of classes


def trained(folders, **options):
    model = ImageClassifier("timm/test_resnet", pretrained=False, **options)
    data = ImageClassificationData.from_folders(folders, val_split=0.25, batch_size=8)
    data.preprocessing = Preprocessing(input_size=32)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.finetune(model, datamodule=data, strategy="freeze")
    return trainer, model


def test_class_weights_act_in_training_alone(tmp_path):
    folders = colour_folders(tmp_path / "train", each=4)
    colour_folders(tmp_path / "more", each=12, classes=("red",)).joinpath("red").rename(folders / "red2")
    _, model = trained(folders, class_weights="balanced", loss_fn="cross_entropy")
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    weight = class_weights("balanced", model.labels, {"blue": 3, "red": 3, "red2": 9})
    assert weight.tolist() == pytest.approx([15 / 9, 15 / 9, 15 / 27])
    model.train()
    assert torch.allclose(model.loss(logits, targets), functional.cross_entropy(logits, targets, weight))
    model.eval()
    assert torch.allclose(model.loss(logits, targets), functional.cross_entropy(logits, targets))
    _, other = trained(folders, class_weights={"red2": 0.5})
    assert other._weight.tolist() == [1, 1, 0.5]


def test_losses_by_name_and_metrics_by_name(tmp_path):
    folders = colour_folders(tmp_path / "train", each=8)
    trainer, model = trained(folders, loss_fn="focal", metrics=["f1", "auroc"])
    assert {"val_accuracy", "val_f1", "val_auroc"} <= trainer.callback_metrics.keys()
    logits, targets = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    sure = logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    expected = ((1 - sure) ** 2 * functional.cross_entropy(logits, targets, reduction="none")).mean()
    assert torch.allclose(model.loss(logits, targets), expected)


@pytest.mark.long
def test_a_model_with_a_loss_of_its_own_still_predicts_elsewhere(tmp_path, capsys):
    folders = colour_folders(tmp_path / "train", each=8)
    with pytest.warns(UserWarning, match="loss_fn of ImageClassifier"):
        trainer, model = trained(folders, loss_fn=functional.cross_entropy)
    logits, targets = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    assert torch.allclose(model.loss(logits, targets), functional.cross_entropy(logits, targets))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    loaded = flashtask.load(tmp_path / "own.ckpt")
    assert "predicts without loss_fn (function)" in capsys.readouterr().err
    image = folders / "red" / "0.png"
    assert loaded.predict(image).scores == pytest.approx(model.predict(image).scores, abs=1e-5)
    data = ImageClassificationData.from_folders(val_folder=folders)
    with pytest.raises(UsageError, match="validation needs loss_fn"):
        Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(loaded, datamodule=data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_fn": "focall"}, "did you mean 'focal'"),
        ({"loss_fn": 3}, "loss_fn must be cross_entropy, focal, binary_cross_entropy, bce, or a callable"),
        ({"class_weights": "balanecd"}, "class_weights must be balanced"),
        ({"class_weights": {"a": -1}}, "class_weights must be balanced"),
        (
            {"loss_fn": functional.cross_entropy, "class_weights": "balanced"},
            "class_weights applies only to losses given by name",
        ),
        (
            {"loss_fn": functional.cross_entropy, "label_smoothing": 0.1},
            "label_smoothing applies only to losses given by name",
        ),
        ({"class_weights": "balanced", "head": "ridge"}, "class_weights needs a head that is trained by gradient"),
        ({"multi_label": True, "head": "ridge"}, "multi_label needs a head that is trained by gradient"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, words):
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False, **options)
    assert words in str(caught.value) + caught.value.fix


def test_weights_for_other_classes_and_unknown_metrics_are_refused(tmp_path):
    folders = colour_folders(tmp_path / "train", each=8)
    for options, words in (
        ({"class_weights": {"blu": 2}}, "'blu', which is not one of the classes"),
        ({"class_weights": [1, 2, 3]}, "3 numbers for 2 classes"),
        ({"metrics": ["f11"]}, "f11"),
        ({"metrics": [3]}, "a metric is one of"),
    ):
        with pytest.raises((UsageError, UnknownNameError), match=words):
            trained(folders, **options)


def test_a_data_module_of_ones_own_may_call_anything_targets():
    class Own(DataModule):
        def __init__(self):
            self.targets = torch.tensor([0, 1, 0, 1])

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.rand(4, 3, 32, 32), self.targets), 4)

    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.finetune(ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False), datamodule=Own())
    assert trainer.callback_metrics["train_loss"] > 0


# ---- records


def test_predictions_are_drawn_and_shown_in_a_notebook(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    one = Label(str(tmp_path / "a.png"), ("red", "blue"), (0.9, 0.1))
    drawn = one.draw(Image.open(tmp_path / "a.png"))
    assert drawn.width == 60
    assert drawn.height > 40
    assert drawn.getpixel((30, 20)) == (255, 0, 0)
    assert np.array(drawn)[41:].min() < 128  # words
    assert one._repr_png_()[:4] == b"\x89PNG"
    assert Label(None, ("red",), (1.0,))._repr_png_() is None
    assert Label(str(tmp_path / "none.png"), ("red",), (1.0,))._repr_png_() is None
