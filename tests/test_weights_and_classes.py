"""Weights of samples act in the training loss of every task; metrics of each class are given when asked for."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from flashtask import (
    ImageClassificationData,
    ImageClassifier,
    ImageRegressionData,
    ImageRegressor,
    Preprocessing,
    Task,
    Trainer,
)
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.samples import WeightedTargets

SMALL = Preprocessing(input_size=(3, 32, 32)).resolved()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))


def write(folder, weights, count=24):
    """Pictures of one grey each, with a class, two numbers and a weight; the last 6 validate."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [["file", "kind", "grey", "dark", "part", "weight"]]
    generator = np.random.default_rng(5)
    for number in range(count):
        grey = 10 * number + 5
        noise = generator.integers(-5, 5, (36, 36, 3))
        Image.fromarray((grey + noise).astype(np.uint8)).save(folder / f"{number:02}.png")
        kind = ("dark", "middle", "light")[number * 3 // count]
        part = "val" if number % 4 == 3 else "train"
        rows.append([f"{number:02}.png", kind, grey, 255 - grey, part, weights(number)])
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "table.csv"


def classes(table, weight="weight", **options):
    return ImageClassificationData.from_csv(
        "file",
        "kind",
        train_file=table,
        split_field="part",
        weight_field=weight,
        batch_size=6,
        preprocessing=SMALL,
        **options,
    )


def numbers(table, weight="weight", **options):
    return ImageRegressionData.from_csv(
        "file",
        ("grey", "dark"),
        train_file=table,
        split_field="part",
        weight_field=weight,
        batch_size=6,
        preprocessing=SMALL,
        **options,
    )


def fitted(folder, model, data, **options):
    options = {"max_epochs": 2, "seed": 1, "precision": "32", "enable_progress_bar": False, **options}
    trainer = Trainer(output_dir=folder, num_sanity_val_steps=0, **options)
    trainer.finetune(model, datamodule=data, restore_best=False)
    return trainer.fit_run.history


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier("timm/test_resnet", pretrained=False, **{"learning_rate": 1e-2, **options})


def regressor(**options):
    torch.manual_seed(0)
    return ImageRegressor("timm/test_resnet", pretrained=False, **{"learning_rate": 1e-2, **options})


def test_only_training_batches_have_weights_of_1_on_average(tmp_path):
    data = classes(write(tmp_path, lambda number: number))
    data.setup("fit")
    found = [targets for _, targets in data.train_dataloader()]
    assert all(isinstance(one, WeightedTargets) for one in found)
    weights = torch.cat([one.weights for one in found])
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1)
    assert all(isinstance(targets, torch.Tensor) for _, targets in data.val_dataloader())
    assert data.train_dataloader().dataset[0][1].weights.item() == 0  # of 00.png
    assert (weights / weights.max() * 22).round().sort().values.tolist() == [n for n in range(24) if n % 4 != 3]


@pytest.mark.long
@pytest.mark.parametrize("make", ["classes", "numbers"])
@pytest.mark.parametrize("cache", ["auto", False])
def test_equal_weights_change_nothing_and_others_change_training_alone(tmp_path, make, cache):
    """With the features of the frozen backbone, and without."""
    data, model = {"classes": (classes, classifier), "numbers": (numbers, regressor)}[make]
    same = write(tmp_path / "same", lambda number: 2.5)
    other = write(tmp_path / "other", lambda number: 1 + number % 3)
    plain = fitted(tmp_path / "plain", model(), data(same, None), feature_cache=cache)
    equal = fitted(tmp_path / "equal", model(), data(same), feature_cache=cache)
    weighted = fitted(tmp_path / "weighted", model(), data(other), feature_cache=cache)
    for row, again in zip(plain, equal, strict=True):
        assert again["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        assert again["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)
    assert abs(weighted[0]["train_loss"] - plain[0]["train_loss"]) > 1e-3
    # Where nothing is learned only the measuring is left, which no weight changes.
    still = [
        fitted(tmp_path / f"still-{name}", model(learning_rate=1e-12), data(table), max_epochs=1)
        for name, table in (("same", same), ("other", other))
    ]
    assert still[0][0]["val_loss"] == pytest.approx(still[1][0]["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "targets", "plain"),
    [
        ({}, torch.tensor([0, 1, 2, 1]), lambda o, t: functional.cross_entropy(o, t, reduction="none")),
        ({"label_smoothing": 0.2}, torch.tensor([0, 1, 2, 1]), None),
        ({"loss_fn": "focal"}, torch.tensor([0, 1, 2, 1]), None),
        ({"loss_fn": lambda o, t: functional.cross_entropy(o, t)}, torch.tensor([0, 1, 2, 1]), None),
        ({"multi_label": True}, torch.eye(4, 3), None),
        ({"multi_label": True, "loss_fn": "focal"}, torch.eye(4, 3), None),
    ],
)
def test_the_weighted_loss_is_the_mean_of_each_samples_loss_times_its_weight(options, targets, plain):
    outputs, weights = torch.randn(4, 3), torch.tensor([0.0, 0.5, 2.0, 1.5])
    with pytest.warns(UserWarning, match="loss_fn") if callable(options.get("loss_fn")) else nullcontext():
        model = classifier(num_classes=3, **options).train()
    each = torch.stack([model.loss(outputs[row : row + 1], targets[row : row + 1]) for row in range(4)])
    assert model.weighted_loss(outputs, targets, weights).item() == pytest.approx(
        (each * weights).mean().item(), rel=1e-5
    )
    assert model.weighted_loss(outputs, targets, torch.ones(4)).item() == pytest.approx(
        model.loss(outputs, targets).item(), rel=1e-5
    )
    if plain is not None:
        assert each.tolist() == pytest.approx(plain(outputs, targets).tolist(), rel=1e-5)


def test_weights_of_samples_multiply_those_of_classes():
    model = classifier(num_classes=2, class_weights=[1.0, 3.0]).train()
    model._weight = torch.tensor([1.0, 3.0])
    outputs, targets = torch.randn(3, 2), torch.tensor([0, 1, 1])
    each = functional.cross_entropy(outputs, targets, torch.tensor([1.0, 3.0]), reduction="none")
    weights = torch.tensor([2.0, 1.0, 0.0])
    assert model.weighted_loss(outputs, targets, weights).item() == pytest.approx(((each * weights).sum() / 7).item())


class TwoParts(Task):
    """A task of a user's own, whose outputs and targets are structures, and which knows nothing of weights."""

    def __init__(self):
        super().__init__("timm/test_resnet", None, pretrained=False)

    def loss(self, outputs, targets):
        at = torch.stack([target["at"] for target in targets])
        return {"first": (outputs["maps"][0] - at[:, None]).square().mean(), "second": outputs["maps"][1].mean()}


def test_a_task_of_ones_own_gets_weights_without_a_change():
    model, weights = TwoParts(), torch.tensor([0.5, 1.5])
    outputs = {"maps": [torch.randn(2, 3), torch.randn(2, 1)]}
    targets = [{"at": torch.tensor(0.0)}, {"at": torch.tensor(2.0)}]
    found = model.weighted_loss(outputs, targets, weights)
    first = torch.stack([outputs["maps"][0][0].square().mean(), (outputs["maps"][0][1] - 2).square().mean()])
    assert found["first"].item() == pytest.approx((first * weights).mean().item())
    assert found["second"].item() == pytest.approx((outputs["maps"][1][:, 0] * weights).mean().item())


def test_weights_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(BadDataError, match="line 3, column 'weight': '-1'"):
        classes(write(tmp_path / "a", lambda number: -number))
    data = classes(write(tmp_path / "b", lambda number: 0))
    with pytest.raises(BadDataError, match="all training samples are 0"):
        data.setup("fit")
    model = classifier(head="ridge")
    with pytest.raises(UsageError, match="the samples have weights, which the head 'ridge' does not use"):
        fitted(tmp_path / "run", model, classes(write(tmp_path / "c", lambda number: 1 + number)))


def test_a_resume_with_other_weights_is_refused(tmp_path):
    one, other = classes(write(tmp_path / "a", lambda n: 1 + n)), classes(write(tmp_path / "a", lambda n: 2 + n))
    with pytest.raises(BadDataError, match="not those that the run was started on"):
        other.load_state_dict(one.state_dict())


# ---- metrics by class


def test_metrics_by_class_are_those_of_torchmetrics_by_label(tmp_path):
    table = write(tmp_path, lambda number: 1)
    model = classifier()
    history = fitted(tmp_path / "run", model, classes(table, None))
    assert not any(name.endswith("_dark") for name in history[0])
    trainer = Trainer(logger=False, enable_progress_bar=False)
    (plain,) = trainer.validate(model, datamodule=classes(table, None))
    model.per_class = True
    (found,) = trainer.validate(model, datamodule=classes(table, None))
    assert {name: found[name] for name in plain} == plain
    extra = set(found) - set(plain)
    assert extra == {f"val_{m}_{c}" for m in ("precision", "recall", "f1") for c in ("dark", "middle", "light")}
    paths = [row for row in csv.DictReader(table.read_text().splitlines()) if row["part"] == "val"]
    said = [one.label for one in model.predict([str(tmp_path / row["file"]) for row in paths])]
    for name in ("dark", "middle", "light"):
        hits = sum(a == b["kind"] == name for a, b in zip(said, paths, strict=True))
        assert found[f"val_recall_{name}"] == pytest.approx(hits / 2)
    again = trainer.validate(model, datamodule=classes(table, None))
    assert again == [found]  # nothing is left over from the pass before


def test_several_labels_and_numbers_have_them_too(tmp_path):
    table = write(tmp_path, lambda number: 1)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    text = [
        ",".join([*row, *(("x", "y") if not i else (str(i % 2), str((i - 1) // 12)))]) for i, row in enumerate(rows)
    ]
    table.write_text("\n".join(text) + "\n")
    data = ImageClassificationData.from_csv(
        "file", ("x", "y"), train_file=table, split_field="part", batch_size=6, preprocessing=SMALL
    )
    model = classifier(multi_label=True)
    fitted(tmp_path / "labels", model, data)
    model.per_class = True
    trainer = Trainer(logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(model, datamodule=data)
    assert {"val_f1_x", "val_f1_y", "val_average_precision_x", "val_average_precision_y"} <= set(found)
    f1 = [found[f"val_f1_{name}"] for name in "xy"]
    assert np.nanmean(f1) == pytest.approx(found["val_f1"])

    model = regressor()
    fitted(tmp_path / "numbers", model, numbers(table, None))
    model.per_class = True
    (found,) = trainer.validate(model, datamodule=numbers(table, None))
    assert (found["val_mae_grey"] + found["val_mae_dark"]) / 2 == pytest.approx(found["val_mae"], rel=1e-4)


@pytest.mark.long
def test_the_command_line_gives_them_when_asked(tmp_path, capsys):
    table = write(tmp_path / "data", lambda number: 1)
    fitted(tmp_path / "run", classifier(), classes(table, None))
    capsys.readouterr()
    words = ["validate", str(tmp_path / "run"), str(table), "--target", "kind", "--json"]
    assert run(words) == 0
    assert "val_f1_dark" not in json.loads(capsys.readouterr().out)
    assert run([*words, "--per-class"]) == 0
    assert {"val_f1_dark", "val_recall_light"} <= set(json.loads(capsys.readouterr().out))


def test_a_model_without_names_counts_its_classes():
    assert classifier(num_classes=2).output_names(2) == ("0", "1")
    assert regressor(num_targets=3).output_names(3)[2] == "number_2"
