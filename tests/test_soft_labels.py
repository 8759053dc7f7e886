"""Soft labels: the share of each class as targets of a classifier."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError

LABELS = ("cat", "dog", "owl")


def shares(count=24):
    drawn = np.random.default_rng(0).dirichlet([0.5] * len(LABELS), count)
    return np.round(drawn / drawn.sum(axis=1, keepdims=True), 3)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    with open(folder / "animals.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *LABELS])
        for number, row in enumerate(shares()):
            pixels = np.random.default_rng(number).integers(0, 60, (32, 32, 3))
            pixels[..., row.argmax()] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", *row])
    return folder / "animals.csv"


def model(**options):
    return ImageClassifier("timm/test_resnet", pretrained=False, **options)


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=2, seed=1, output_dir=folder, **quiet, **options)


def test_columns_that_sum_to_1_are_shares(table):
    data = ImageClassificationData.from_csv("file", LABELS, table, val_split=0.25)
    assert data.labels == LABELS
    assert not data.is_multi_label
    assert data.describe_targets() == "3 classes, the share of each from the columns 'cat', 'dog', 'owl'"
    data.setup("fit")
    _, targets = next(iter(data.train_dataloader()))
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(dim=1), torch.ones(len(targets)))
    counts = data.counts()
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == pytest.approx(24, abs=3)


@pytest.mark.parametrize("as_lists", [True, False])
def test_arrays_and_lists_are_read_alike(as_lists):
    images = np.zeros((24, 8, 8, 3), dtype=np.uint8)
    targets = shares().tolist() if as_lists else shares()
    data = ImageClassificationData.from_numpy(images, targets, labels=LABELS)
    assert data.targets["kind"] == "shares"
    assert data.labels == LABELS
    assert data._reader.lines(torch.tensor([0.2, 0.0, 0.8])) == ["owl 0.80, cat 0.20"]


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_the_loss_is_the_sum_over_the_classes(loss_fn, weights):
    task = model(num_classes=3, loss_fn=loss_fn, class_weights=weights, label_smoothing=0.1).train()
    task._weight = None if weights is None else torch.tensor(weights)
    outputs, targets = torch.randn(5, 3), torch.tensor(shares(5), dtype=torch.float32)
    found = task.loss(outputs, targets)
    plain = model(num_classes=3, loss_fn=loss_fn, label_smoothing=0.1).train()
    expected = torch.zeros(())
    for row, own in zip(outputs, targets, strict=True):
        for place in range(3):
            factor = own[place] * (1.0 if weights is None else weights[place])
            expected += factor * plain.loss(row[None], torch.tensor([place])) / 5
    assert torch.allclose(found, expected, atol=1e-6)
    if loss_fn == "cross_entropy" and weights is None:
        assert torch.allclose(found, functional.cross_entropy(outputs, targets, label_smoothing=0.1), atol=1e-6)


def test_shares_of_0_and_1_train_the_same_weights_as_labels(table, tmp_path):
    hard = np.eye(3)[shares().argmax(axis=1)]
    images = [Image.open(table.parent / f"{number}.png").convert("RGB") for number in range(24)]
    found = []
    for name, options in (("one_hot", {"target_format": "one_hot"}), ("soft", {"target_format": "soft"})):
        data = ImageClassificationData.from_images(images, hard, labels=LABELS, batch_size=8, **options)
        flashtask.seed_everything(1)  # the same random backbone
        task = model()
        trainer(tmp_path / name).finetune(task, datamodule=data)
        found.append(task.head.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6)


def test_run_validate_and_predict_agree_and_the_recipe_repeats(table, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*("--target", ",".join(LABELS), "--backbone", "timm/test_resnet", "--no-pretrained"), "--quiet"]
    assert run(["finetune", str(table), *argv, "--epochs", "2"]) == 2
    assert "--task" in capsys.readouterr().err  # shares are numbers too
    argv += ["--task", "image_classification", "--epochs", "2"]
    assert run(["finetune", str(table), *argv, "--output-dir", str(out)]) == 0
    assert run(["finetune", str(out / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"]) == 0
    one, two = ((folder / "metrics.csv").read_text() for folder in (out, tmp_path / "again"))
    assert [row.split(",")[:4] for row in one.splitlines()] == [row.split(",")[:4] for row in two.splitlines()]
    task = flashtask.load(out / "best.ckpt")
    data = ImageClassificationData.for_evaluation(table, "val", task.target_description)
    measured = Trainer(logger=False, enable_progress_bar=False).validate(task, data)[0]
    rows = [prediction.label for prediction in task.predict([str(table.parent / f"{n}.png") for n in range(24)])]
    largest = [LABELS[place] for place in shares().argmax(axis=1)]
    assert measured["val_accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(rows, largest, strict=True)]))


def test_what_is_no_share_is_named(table, tmp_path):
    (header, _, *rest), bad = table.read_text().splitlines(), tmp_path / "bad.csv"
    rows = [f"{table.parent}/{line}" for line in (*rest, "0.png,1,1,0")]
    bad.write_text("\n".join([header, *rows]))
    with pytest.raises(BadDataError, match="sample 24 has the shares 1, 1, 0"):
        ImageClassificationData.from_csv("file", LABELS, bad, target_format="soft", on_bad_image="skip")
    data = ImageClassificationData.from_csv("file", LABELS, table)
    with pytest.raises(UsageError, match="takes one label per image"):
        trainer(tmp_path / "ridge").finetune(model(head="ridge"), datamodule=data)
