"""The learning curve: its points are what a run gives, and the images to label next are uncertain and different."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small import colour_folders

from flashtask import (
    ImageClassificationData,
    ImageClassifier,
    ImageEmbedder,
    ImageRegressionData,
    ImageRegressor,
    Trainer,
)
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.reports.label_curve import measured
from flashtask.tasks.learning_curve import _diverse, _stratified, learning_curve

BACKBONE = "timm/test_resnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("curve") / "colours", each=16, classes=("blue", "green", "red"))


def data_of(folder, **options):
    return ImageClassificationData.from_folders(folder, val_split=0.25, augment="none", **options)


@pytest.fixture(scope="module")
def curve(folder):
    return learning_curve(ImageEmbedder(BACKBONE, pretrained=False), data_of(folder), sizes=[6, 12, 36], draws=3)


def test_a_draw_keeps_the_shares_of_the_classes_and_a_larger_one_holds_the_smaller_one():
    targets = np.array([0] * 60 + [1] * 30 + [2] * 2)
    small, large = (_stratified(targets, size, np.random.default_rng(0)) for size in (12, 46))
    assert np.bincount(targets[small]).tolist() == [7, 4, 1]
    assert np.bincount(targets[large]).tolist() == [30, 15, 1]
    assert set(small) <= set(large)
    assert sorted(_stratified(targets, 92, np.random.default_rng(0))) == list(range(92))


def test_the_last_point_is_what_a_run_with_this_head_reaches(folder, curve, tmp_path):
    model = ImageClassifier(BACKBONE, head="ridge", pretrained=False)
    model.backbone.load_state_dict(curve.model.backbone.state_dict())
    trainer = Trainer(output_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False)
    result = trainer.finetune(model, datamodule=data_of(folder))
    assert [(point.labels, len(point.draws)) for point in curve.points] == [(6, 3), (12, 3), (36, 1)]
    assert curve.points[-1].mean == pytest.approx(float(result.metrics["val_accuracy"]), abs=1e-9)
    assert curve.validated_on == 12


def test_intervals_gain_and_forecast_have_the_right_values():
    sizes = [10, 20, 50, 100, 200, 400]
    errors = {size: 0.05 + 0.9 * size**-0.5 for size in sizes}
    points, gain, forecast, _ = measured({size: np.full((3, 8), error) for size, error in errors.items()}, "mae")
    for point in points:
        assert [point.mean, point.low, point.high] == pytest.approx([errors[point.labels]] * 3)
        assert point.deviation == pytest.approx(0)
    assert (gain.before, gain.after) == (200, 400)
    assert [gain.value, gain.low, gain.high] == pytest.approx([errors[400] - errors[200]] * 3)
    assert forecast.labels == 800
    assert forecast.value == pytest.approx(0.05 + 0.9 * 800**-0.5, abs=2e-3)
    assert forecast.said == pytest.approx(errors[400], abs=2e-3)


def test_an_interval_is_over_draws_and_samples_and_that_of_the_gain_is_paired():
    generator = np.random.default_rng(0)
    few = (generator.random((5, 200)) < 0.8).astype(float)
    points, gain, forecast, why = measured({10: few, 20: few}, "accuracy")
    for point in points:
        assert point.mean == pytest.approx(few.mean())
        assert point.deviation == pytest.approx(few.mean(axis=1).std(ddof=1))
        # Of 1,000 independent values in all: the standard error is sqrt(0.8 * 0.2 / 1000), 0.0126, or somewhat more.
        assert 2 * 1.5 * 0.0126 < point.high - point.low < 2 * 4 * 0.0126
    # Both points are measured on the same samples, so where the draws are the same nothing is left to chance.
    assert gain.high > 0 > gain.low
    assert measured({10: few[:1], 20: few[:1]}, "accuracy").gain[2:] == pytest.approx((0, 0, 0))
    assert forecast is None
    assert "needs 5" in why
    together = measured({10: few}, "accuracy", [str(row // 20) for row in range(200)]).points[0]
    assert together.high - together.low != pytest.approx(points[0].high - points[0].low)


def test_a_law_that_misses_the_largest_size_gives_no_forecast():
    sizes = [10, 20, 50, 100, 200, 400]
    values = {size: np.full((2, 4), 0.5 if size < 400 else 0.1) for size in sizes}
    found = measured(values, "mae")
    assert found.forecast is None
    assert "says 0.5000 to 0.5000 for 400 labels, which have 0.1000" in found.why_no_forecast


def test_numbers_have_the_error_of_a_run_with_this_head(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    targets = [3.0 * row + len(file.parent.name) for row, file in enumerate(files)]
    options = {"train_files": files, "train_targets": targets, "val_split": 0.25, "augment": "none", "num_workers": 0}
    torch.manual_seed(0)
    model = ImageRegressor(BACKBONE, head="ridge", pretrained=False)
    data = ImageRegressionData.from_files(**options)
    curve = learning_curve(model, data, sizes=[8, 36], draws=2)
    trainer = Trainer(output_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False)
    result = trainer.finetune(model, datamodule=ImageRegressionData.from_files(**options))
    assert curve.metric == "mae"
    assert curve.points[-1].mean == pytest.approx(float(result.metrics["val_mae"]), rel=1e-4)
    with pytest.raises(UsageError, match="only for data with one label per image"):
        curve.next_labels([str(files[0])], 1)


def test_uncertain_images_that_differ_are_chosen_first_and_no_copy_of_one():
    scores = np.array([[0.5, 0.5], [0.5, 0.5], [0.55, 0.45], [0.999, 0.001], [0.998, 0.002]])
    features = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 3.0]], dtype=np.float32)
    for seed in range(5):
        chosen = _diverse(scores, features, 5, np.random.default_rng(seed))
        assert sorted(chosen) == [0, 1, 2, 3, 4]
        # The copy of the first one adds nothing, so it comes last.
        assert set(chosen[:2]) == {0, 2}
        assert chosen[-1] == 1


def test_what_cannot_be_drawn_is_named(folder):
    model = ImageEmbedder(BACKBONE, pretrained=False)
    with pytest.raises(UsageError, match="cannot have a point at 500 labels"):
        learning_curve(model, data_of(folder), sizes=[500])
    with pytest.raises(UsageError, match="cannot have a point at 2 labels"):
        learning_curve(model, data_of(folder), sizes=[2])


def test_the_command_draws_a_table_and_a_picture_and_names_images(folder, tmp_path, capsys):
    trained = tmp_path / "run"
    words = ["--backbone", BACKBONE, "--no-pretrained", "--head", "ridge", "--val-split", "0.25", "--no-report"]
    assert run(["finetune", str(folder), *words, "--output-dir", str(trained)]) == 0
    capsys.readouterr()
    page = tmp_path / "curve.html"
    more = [
        "--page",
        str(page),
        "--sizes",
        "6,36",
        "--draws",
        "2",
        "--unlabelled",
        str(folder / "red"),
        "--next",
        "3",
        "--json",
    ]
    assert run(["learning-curve", str(trained), *more, "--picture", str(tmp_path / "curve.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    best = json.loads((trained / "summary.json").read_text())["best"]["val_accuracy"]
    assert [point["labels"] for point in found["points"]] == [6, 36]
    assert found["points"][-1]["mean"] == pytest.approx(best, abs=1e-9)
    assert len(set(found["next"])) == 3
    assert all((folder / "red").samefile(path.rpartition("/")[0]) for path in found["next"])
    assert "<polyline" in page.read_text()
    assert "from 6 to 36 labels" in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", "")
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()
    assert run(["learning-curve", str(folder), "--next", "3"]) == 2
    assert "--unlabelled, which is not given" in capsys.readouterr().err
    assert run(["learning-curve", str(folder), "--sizes", "a,b"]) == 2
    assert "'a' is not a whole number" in capsys.readouterr().err
