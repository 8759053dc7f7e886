"""Metrics by name against torchmetrics, in a fit and alone; `monitor` picks the epoch that is best by one of them."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch
from small import colour_folders, quiet
from torchmetrics import classification as of_classes

import flashtask
from flashtask import EarlyStopping, ImageClassificationData, ImageClassifier
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.tasks.metrics import label_metrics, labels_metrics, named_metrics, number_metrics

PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1]])
TARGETS = torch.tensor([0, 1, 2, 2, 1])
SEVERAL = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("given", "kind", "arguments"),
    [
        ("f1", of_classes.MulticlassF1Score, {"average": "macro"}),
        ("f1_macro", of_classes.MulticlassF1Score, {"average": "macro"}),
        ("f1_score_micro", of_classes.MulticlassF1Score, {"average": "micro"}),
        (("precision", {"average": "weighted"}), of_classes.MulticlassPrecision, {"average": "weighted"}),
        ("mcc", of_classes.MulticlassMatthewsCorrCoef, {}),
        ("auroc", of_classes.MulticlassAUROC, {"average": "macro"}),
        ("balanced_accuracy", of_classes.MulticlassAccuracy, {"average": "macro"}),
        (("accuracy", {"top_k": 2}), of_classes.MulticlassAccuracy, {"average": "macro", "top_k": 2}),
        (["fbeta", {"beta": 2.0}], of_classes.MulticlassFBetaScore, {"beta": 2.0}),
        ({"calibration_error": {"n_bins": 5}}, of_classes.MulticlassCalibrationError, {"n_bins": 5}),
    ],
)
def test_a_metric_by_name_is_that_of_torchmetrics(given, kind, arguments):
    (metric,) = named_metrics(given, label_metrics, 3).whole.values()
    expected = kind(num_classes=3, **arguments)
    assert metric(PROBABILITIES, TARGETS) == expected(PROBABILITIES, TARGETS)


def test_every_metric_by_name_gives_one_number_and_by_class_one_for_each():
    needed = {"fbeta": {"beta": 0.5}, "fbeta_score": {"beta": 0.5}}
    for known, targets in ((label_metrics, TARGETS), (labels_metrics, SEVERAL)):
        for name in known:
            (metric,) = named_metrics((name, needed.get(name, {})), known, 3).whole.values()
            assert metric(PROBABILITIES, targets).ndim == 0, name
        (by_class,) = named_metrics("f1_per_class", known, 3).by_class.values()
        assert by_class(PROBABILITIES, targets).shape == (3,)
    for name in number_metrics:
        (metric,) = named_metrics(name, number_metrics, 1).whole.values()
        assert metric(PROBABILITIES[:, 0], PROBABILITIES[:, 1]).ndim == 0, name


def test_two_metrics_of_one_kind_have_names_of_their_own():
    found = named_metrics([("fbeta", {"beta": 2.0, "name": "f2"}), {"fbeta": {"beta": 0.5}}, "mcc"], label_metrics, 3)
    assert list(found.whole) == ["f2", "fbeta", "mcc"]
    with pytest.raises(UsageError, match="two metrics are named 'f1'"):
        named_metrics(["f1", "f1"], label_metrics, 3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("f1_makro", "f1_macro"),
        ("acuracy", "accuracy"),
        (("f1", {"avrage": "macro"}), "average"),
        ("fbeta", "beta"),
        (3, "a metric is one of"),
    ],
)
def test_what_is_no_metric_is_refused(given, says):
    with pytest.raises(UsageError) as caught:
        named_metrics(given, label_metrics, 3)
    assert says in f"{caught.value.what} {caught.value.why} {caught.value.fix}"


def test_a_list_of_what_is_no_metric_is_refused():
    with pytest.raises(UsageError, match="a metric is one of"):
        named_metrics([3], label_metrics, 3)


def near(value):
    """As far as metrics.csv has digits."""
    return pytest.approx(value, rel=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = colour_folders(tmp_path_factory.mktemp("metrics") / "train", each=6, classes=("blue", "green", "red"))
    for image in (root / "green").glob("[0-2].png"):
        shutil.copy(image, root / "red" / f"like_green_{image.name}")  # so that no epoch gets everything right
    return root


def fitted(tmp_path, root, *, monitor, metrics=("f1_macro", "f1_per_class", "auroc"), **settings):
    torch.manual_seed(0)
    with building_without_weights():
        task = ImageClassifier("timm/test_resnet", metrics=list(metrics), monitor=monitor, learning_rate=0.03)
    source = ImageClassificationData.from_folders(root, val_split=9, batch_size=6)
    trainer = quiet(tmp_path, max_epochs=5, logger="csv", seed=1, **settings)
    trainer.finetune(task, datamodule=source, strategy="freeze")
    with open(trainer.output_dir / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return task, source, trainer, rows


@pytest.mark.long
def test_the_monitor_picks_the_best_epoch_and_the_checkpoint_measures_the_same(tmp_path, data):
    task, source, trainer, rows = fitted(tmp_path, data, monitor="val_f1_macro")
    best = max(rows, key=lambda row: (row["val_f1_macro"], -row["val_loss"]))
    assert trainer.checkpoint_callback.best_model_score == near(best["val_f1_macro"])
    path = trainer.output_dir / "best.ckpt"
    assert flashtask.read_checkpoint(path)["epoch"] == best["epoch"]
    loaded = flashtask.load(path)
    assert loaded.monitor == "val_f1_macro"
    (measured,) = quiet(tmp_path).validate(loaded, datamodule=source)
    assert measured["val_f1_macro"] == near(best["val_f1_macro"])
    # By hand, with torchmetrics alone.
    source.setup("validate")
    hand, each = of_classes.MulticlassF1Score(3, average="macro"), of_classes.MulticlassF1Score(3, average=None)
    with torch.no_grad():
        for images, targets in source.val_dataloader():
            hand.update(loaded(images), targets)
            each.update(loaded(images), targets)
    assert hand.compute().item() == near(best["val_f1_macro"])
    by_class = {f"val_f1_{label}": value for label, value in zip(task.labels, each.compute().tolist(), strict=True)}
    assert {name: best[name] for name in by_class} == near(by_class)


def test_early_stopping_and_checkpoints_watch_the_same_metric_whose_direction_the_metric_knows(tmp_path, data):
    odd = [{"recall": {"name": "found"}}]  # the name says nothing, the metric does
    stopping = EarlyStopping(patience=0, min_delta=2.0)  # no epoch is that much better
    _, _, trainer, rows = fitted(tmp_path, data, monitor="val_found", metrics=odd, callbacks=[stopping])
    assert len(rows) == 2
    assert stopping.best_score == near(rows[0]["val_found"])
    assert trainer.checkpoint_callback.best_model_score == near(max(row["val_found"] for row in rows))


def test_a_monitor_that_is_not_measured_is_refused_with_the_nearest(tmp_path, data):
    with pytest.raises(UnknownNameError) as caught:
        fitted(tmp_path, data, monitor="val_f1_marco")
    assert "val_f1_macro" in caught.value.fix
