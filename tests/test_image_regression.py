"""`ImageRegressor`: numbers from images, in the unit of the data, by every way to ask."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import flashtask
from flashtask import ImageClassifier, ImageRegressionData, ImageRegressor, Number, Trainer
from flashtask.cli import run
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Grey pictures with their brightness, in a unit of thousands, and twice its negative."""
    folder = tmp_path_factory.mktemp("grey")
    generator = np.random.default_rng(0)
    lines = ["image,brightness,other"]
    for number in range(40):
        value = float(generator.uniform(0.1, 0.9))
        pixels = np.clip(255 * (value + generator.normal(0, 0.05, (32, 32, 3))), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,{5000 + 1000 * value},{-2 * value}")
    (folder / "grey.csv").write_text("\n".join(lines) + "\n")
    return folder / "grey.csv"


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def best_of(folder):
    best = json.loads((folder / "summary.json").read_text())["best"]
    return {name: value for name, value in best.items() if name not in ("seconds", "images_per_second")}


def data_of(table, fields="brightness"):
    return ImageRegressionData.from_csv(
        "image", fields, train_file=table, val_split=0.25, batch_size=8, preprocessing=Preprocessing(input_size=32)
    )


def fitted(table, folder, fields="brightness", strategy="freeze", epochs=2, **options):
    model = ImageRegressor("timm/test_resnet", pretrained=False, learning_rate=0.02, **options)
    trainer = Trainer(max_epochs=epochs, output_dir=folder, enable_progress_bar=False)
    data = data_of(table, fields)
    trainer.finetune(model, datamodule=data, strategy=strategy)
    return trainer, model, data


def wanted(table, names, field="brightness"):
    rows = {row["image"]: float(row[field]) for row in rows_of(table)}
    return np.array([rows[name] for name in names])


def test_metrics_are_in_the_unit_of_the_data_and_equal_what_the_rows_count_to(table, tmp_path):
    trainer, model, data = fitted(table, tmp_path / "run")
    names = data.split_manifest()
    predicted = model.predict([str(table.parent / name) for name in names])
    assert all(isinstance(one, Number) for one in predicted)
    values, targets = np.array([one.value for one in predicted]), wanted(table, names)
    metrics = trainer.callback_metrics
    assert metrics["val_mae"] == pytest.approx(np.abs(values - targets).mean(), rel=1e-4)
    assert metrics["val_rmse"] == pytest.approx(np.sqrt(((values - targets) ** 2).mean()), rel=1e-4)
    r2 = 1 - ((values - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()
    assert metrics["val_r2"] == pytest.approx(r2, abs=1e-3)
    ranks = [np.argsort(np.argsort(each)) for each in (values, targets)]
    assert metrics["val_spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-3)

    (again,) = trainer.validate(model, datamodule=data)
    assert again == pytest.approx({name: metrics[name] for name in again}, rel=1e-5)
    train = wanted(table, [name for name in (f"{n:02}.png" for n in range(40)) if name not in names])
    assert model.target_description["mean"] == [pytest.approx(train.mean())]
    assert model.target_description["std"] == [pytest.approx(train.std())]


@pytest.mark.long
def test_a_file_gives_the_same_number_by_every_way(table, tmp_path, capsys):
    _, model, data = fitted(table, tmp_path / "run")
    paths = [str(table.parent / name) for name in data.split_manifest()]
    expected = [one.value for one in model.predict(paths)]
    loaded = flashtask.load(tmp_path / "run")
    saved = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    for other in (loaded, saved):
        assert [one.value for one in other.predict(paths)] == pytest.approx(expected, rel=1e-6)
        assert [other.predict(path).value for path in paths] == pytest.approx(expected, rel=1e-6)
    output = tmp_path / "numbers.csv"
    assert run(["predict", str(tmp_path / "run"), *paths, "--output", str(output)]) == 0
    rows = rows_of(output)
    assert list(rows[0]) == ["path", "brightness"]
    assert [float(row["brightness"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "run"), paths[0]]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["path", "brightness"]


def test_the_model_card_says_what_plain_timm_gives(table, tmp_path):
    _, model, data = fitted(table, tmp_path / "run")
    folder = model.save_pretrained(tmp_path / "saved")
    card = (folder / "README.md").read_text()
    assert card.split("---\n")[2].lstrip().startswith("# Image regressor: test_resnet, brightness")
    assert "from flashtask import ImageRegressor" in card
    mean, std = (model.target_description[name][0] for name in ("mean", "std"))
    assert f"mean {mean:.6g} and std {std:.6g}" in card
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    path = table.parent / data.split_manifest()[0]
    transform = create_transform(**resolve_data_config({}, model=plain), is_training=False)
    with torch.no_grad():
        output = float(plain(transform(Image.open(path).convert("RGB"))[None]))
    assert output * std + mean == pytest.approx(model.predict(path).value, rel=1e-4)


def test_from_the_command_line_and_repeated_from_its_recipe(table, tmp_path, capsys):
    size = ["--set", "data.from_csv.preprocessing={input_size: 32}"]
    words = ["--task", "image_regression", "--input", "image", "--target", "brightness", "--head", "ridge"]
    model = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet"]
    assert run(["finetune", str(table), *words, *model, *size, "--output-dir", str(tmp_path / "a")]) == 0
    err = capsys.readouterr().err
    assert "1 number per sample, from the column 'brightness'" in err
    assert "cannot hold" not in err
    assert run(["finetune", str(tmp_path / "a" / "recipe.yaml"), "--quiet", "--output-dir", str(tmp_path / "b")]) == 0
    found = [best_of(tmp_path / name) for name in "ab"]
    assert found[0] == found[1]
    assert found[0]["val_r2"] > 0.9  # brightness is a linear function of the features
    capsys.readouterr()
    assert run(["validate", str(tmp_path / "a"), str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_r2"] > 0.9


@pytest.mark.parametrize("head", ["linear", "mlp", "ridge"])
def test_heads_for_numbers(table, tmp_path, head):
    trainer, model, _ = fitted(table, tmp_path / head, ["brightness", "other"], head=head, epochs=1)
    assert model.num_targets == 2
    assert np.isfinite(trainer.callback_metrics["val_spearman"])
    (one,) = model.predict([table.parent / "00.png"])
    assert list(one.values) == ["brightness", "other"]
    assert 4000 < one.values["brightness"] < 7000


def test_cached_features_give_the_losses_of_computed_ones(table, tmp_path):
    rows = {}
    for cached in (True, False):
        torch.manual_seed(0)
        model = ImageRegressor("timm/test_resnet", pretrained=False, learning_rate=0.02)
        trainer = Trainer(
            max_epochs=2, output_dir=tmp_path / str(cached), enable_progress_bar=False, feature_cache=cached
        )
        trainer.finetune(model, datamodule=data_of(table), strategy="freeze")
        found = rows_of(tmp_path / str(cached) / "metrics.csv")
        rows[cached] = [[float(value) for name, value in row.items() if "loss" in name] for row in found]
    assert np.allclose(rows[True], rows[False], rtol=1e-4)


def test_a_trained_model_keeps_its_scale_on_other_data(table, tmp_path):
    _, model, _ = fitted(table, tmp_path / "run")
    before = model.target_description
    other = tmp_path / "other.csv"
    rows = list(csv.reader(table.read_text().splitlines()))
    lines = [rows[0], *([name, str(float(a) * 3), b] for name, a, b in rows[1:])]
    other.write_text("\n".join(",".join(line) for line in lines))
    again = flashtask.load(tmp_path / "run")
    data = ImageRegressionData.from_csv("image", "brightness", train_file=other, images_root=table.parent, val_split=8)
    Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).finetune(
        again, datamodule=data
    )
    assert again.target_description == before


def test_loaders_of_numbers_need_no_data_class(tmp_path):
    loader = [(torch.rand(4, 3, 32, 32), torch.rand(4)) for _ in range(3)]
    model = ImageRegressor("timm/test_resnet", num_targets=1, pretrained=False)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.finetune(model, loader, loader)
    assert 0 < trainer.callback_metrics["val_mae"] < 2
    assert model.predict(Image.new("RGB", (32, 32))).values.keys() == {"number"}


def test_what_does_not_fit_is_refused(table):
    with pytest.raises(UnknownNameError, match="hubre"):
        ImageRegressor(loss_fn="hubre", pretrained=False)
    with pytest.raises(UsageError, match="the head 'logistic' is for classes"):
        ImageRegressor(head="logistic", pretrained=False)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UsageError, match=r"predicts 3 number\(s\) per image, but the data has 1"):
        trainer.finetune(ImageRegressor("timm/test_resnet", 3, pretrained=False), datamodule=data_of(table))
    with pytest.raises(UnknownNameError, match="maee"):
        trainer.finetune(
            ImageRegressor("timm/test_resnet", pretrained=False, metrics=["maee"]), datamodule=data_of(table)
        )
    with pytest.raises(UsageError, match="has targets of the kind 'number'"):
        trainer.finetune(
            ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False), datamodule=data_of(table)
        )
