"""The learning curve: its points are what a run gives, and the images to label next are uncertain and different."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small import colour_folders

from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, Trainer
from flashtask.cli import run
from flashtask.core.errors import UsageError
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
    assert [(point.labels, len(point.accuracies)) for point in curve.points] == [(6, 3), (12, 3), (36, 1)]
    assert curve.points[-1].mean == pytest.approx(float(result.metrics["val_accuracy"]), abs=1e-9)
    assert curve.validated_on == 12


def test_an_interval_holds_the_spread_of_draws_and_the_size_of_the_validation_set(curve):
    for point in curve.points:
        spread = np.var(point.accuracies, ddof=1) if len(point.accuracies) > 1 else 0
        half = 1.96 * np.sqrt(spread + point.mean * (1 - point.mean) / 12)
        assert point.high == pytest.approx(min(1, point.mean + half))
        assert point.low == pytest.approx(max(0, point.mean - half))


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
    more = ["--sizes", "6,36", "--draws", "2", "--unlabelled", str(folder / "red"), "--next", "3", "--json"]
    assert run(["learning-curve", str(trained), *more, "--picture", str(tmp_path / "curve.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    best = json.loads((trained / "summary.json").read_text())["best"]["val_accuracy"]
    assert [point["labels"] for point in found["points"]] == [6, 36]
    assert found["points"][-1]["mean"] == pytest.approx(best, abs=1e-9)
    assert len(set(found["next"])) == 3
    assert all((folder / "red").samefile(path.rpartition("/")[0]) for path in found["next"])
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()
    assert run(["learning-curve", str(folder), "--next", "3"]) == 2
    assert "--unlabelled, which is not given" in capsys.readouterr().err
    assert run(["learning-curve", str(folder), "--sizes", "a,b"]) == 2
    assert "'a' is not a whole number" in capsys.readouterr().err
