"""`flashtask operate`: temperatures, thresholds and bounds against what is counted by hand; files, servers and runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import COLOURS, colour_folders
from test_multi_label import data_of, table

import flashtask
from flashtask import FinishedRun, ImageClassificationData, ImageClassifier, ImageRegressor, Trainer
from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import BadDataError, IntegrityError, UnknownNameError, UsageError
from flashtask.reports.confidence import (
    UnreachableError,
    cross_fitted,
    exact_interval,
    fitted_temperature,
    lower_bound,
    probabilities,
    threshold_for_coverage,
    threshold_for_precision,
    threshold_for_recall,
)

__all__ = ["table"]

WORDS = ["--backbone", "timm/test_resnet", "--no-pretrained", "--lr", "0.05", "--num-workers", "0", "--metrics", "ece"]
WORDS += ["--quiet", "--no-report"]


# ---- numbers


@pytest.mark.parametrize("exclude", [True, False])
def test_the_temperature_of_logits_that_were_multiplied_by_3_is_3(exclude):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (30_000, 4))
    drawn = generator.random((len(logits), 1 if exclude else 4))
    shares = probabilities(logits, exclude=exclude)
    if exclude:
        truth = np.eye(4, dtype=bool)[(shares.cumsum(axis=1) < drawn).sum(axis=1).clip(max=3)]
    else:
        truth = drawn < shares
    assert fitted_temperature(3 * logits, truth, exclude=exclude) == pytest.approx(3, rel=0.02)
    own = fitted_temperature(logits, truth, exclude=exclude)
    assert fitted_temperature(3 * logits, truth, exclude=exclude) == pytest.approx(3 * own, rel=1e-6)

    def loss(temperature):
        known = probabilities(logits / temperature, exclude=exclude)
        return -np.log(np.where(truth, known, 1 if exclude else 1 - known)).sum()

    assert loss(own) < min(loss(own * 1.01), loss(own / 1.01))
    halves = cross_fitted(3 * logits, truth, exclude=exclude)
    assert np.abs(halves - shares).max() < 0.02


def test_where_every_sample_is_right_the_temperature_stays_1():
    truth = np.eye(3, dtype=bool)[[0, 1, 2, 0]]
    assert fitted_temperature(5.0 * truth, truth, exclude=True) == 1
    assert fitted_temperature(np.zeros((0, 3)), np.zeros((0, 3), bool), exclude=True) == 1


def test_the_halves_of_a_cross_fit_share_no_group():
    generator = np.random.default_rng(1)
    truth = np.eye(2, dtype=bool)[generator.integers(0, 2, 40)]
    logits, groups = generator.normal(size=(40, 2)) + truth, [place // 8 for place in range(40)]
    found = cross_fitted(logits, truth, exclude=True, groups=groups)
    scale = np.log(found[:, 0] / found[:, 1]) / (logits[:, 0] - logits[:, 1])
    assert len({round(float(one), 9) for one in scale}) == 2
    assert all(len({round(float(one), 9) for one in scale[start : start + 8]}) == 1 for start in range(0, 40, 8))


def test_intervals_are_those_of_clopper_and_pearson():
    ten = exact_interval("share", 8, 10)
    assert (ten.value, ten.low, ten.high) == pytest.approx((0.8, 0.44390, 0.97479), abs=1e-5)
    assert exact_interval("share", 0, 10)[2:4] == pytest.approx((0, 1 - 0.025**0.1), abs=1e-9)
    assert exact_interval("share", 10, 10)[2:4] == pytest.approx((0.025**0.1, 1), abs=1e-9)
    assert math.isnan(exact_interval("share", 0, 0).value)
    assert lower_bound(59, 59) == pytest.approx(0.05 ** (1 / 59))


def test_a_threshold_for_a_recall_is_the_conformal_quantile():
    scores = np.arange(1, 40) / 40
    is_class = np.arange(1, 40) % 2 == 1  # 20 of them: 1, 3, ..., 39 fortieths
    assert threshold_for_recall(scores, is_class, 0.9) == pytest.approx(2.5 / 40)  # k = 2: between 2 and 3 fortieths
    assert threshold_for_recall(scores, is_class, 20 / 21) == pytest.approx(0.5 / 40)
    with pytest.raises(UnreachableError) as error:
        threshold_for_recall(scores, is_class, 0.96)
    assert error.value.best == pytest.approx(20 / 21)


def test_new_samples_reach_a_threshold_for_a_recall_as_often_as_promised():
    generator = np.random.default_rng(2)
    count, target = 60, 0.9  # k = 6
    found = []
    for _ in range(2000):
        scores = generator.random(count)  # so the share of new ones above a threshold is 1 less the threshold
        found.append(1 - threshold_for_recall(scores, np.ones(count, bool), target))
    assert target <= np.mean(found) <= target + 1.5 / (count + 1)
    assert 0.94 <= np.mean(np.array(found) >= lower_bound(count + 1 - 6, count)) <= 0.98


def test_a_threshold_for_a_precision_is_the_lowest_that_reaches_it():
    generator = np.random.default_rng(3)
    scores = generator.random(200).round(2)
    is_class = generator.random(200) < scores
    found = threshold_for_precision(scores, is_class, 0.8)
    precisions = {bound: is_class[scores >= bound].mean() for bound in np.unique(scores)}
    lowest = min(bound for bound, precision in precisions.items() if precision >= 0.8)
    assert ((scores >= found) == (scores >= lowest)).all()
    with pytest.raises(UnreachableError) as error:
        threshold_for_precision(scores, np.zeros(200, bool), 0.5)
    assert error.value.best == 0


def test_a_threshold_for_a_coverage_is_reached_by_that_share():
    scores = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    assert threshold_for_coverage(scores, 0.6) == pytest.approx(0.5)
    assert (scores >= threshold_for_coverage(scores, 1)).all()


# ---- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with mistakes in both directions, and its validation images with their labels."""
    root = tmp_path_factory.mktemp("operated")
    for part, count in (("train", 24), ("val", 20)):
        colour_folders(root / part, each=count, classes=tuple(COLOURS), size=32)
        for number in range(0, count, 5):
            (root / part / "red" / f"{number}.png").rename(root / part / "blue" / f"red{number}.png")
            (root / part / "green" / f"{number}.png").rename(root / part / "red" / f"green{number}.png")
    assert run(["finetune", str(root), *WORDS, "--epochs", "2", "--output-dir", str(root / "RUN")]) == 0
    files = sorted((root / "val").glob("*/*.png"))
    return SimpleNamespace(
        root=root, run=root / "RUN", files=list(map(str, files)), truth=[f.parent.name for f in files]
    )


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(trained.run, tmp_path / "RUN")
    return tmp_path / "RUN"


def rows_of(source, files, capsys):
    capsys.readouterr()
    assert run(["predict", str(source), *files, "--scores", "all", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def operate(source, capsys, *words):
    capsys.readouterr()
    assert run(["operate", str(source), *words, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)["operating"]


def test_thresholds_reach_what_is_counted_in_the_rows_of_predict(trained, copied, capsys):
    before = rows_of(copied, trained.files, capsys)
    made = operate(copied, capsys, "--recall", "red=0.8", "--class-precision", "blue=0.6", "--coverage", "0.9")
    rows = rows_of(copied, trained.files, capsys)
    assert [row["label"] for row in rows] == [row["label"] for row in before]
    for old, new in zip(before, rows, strict=True):
        change = [math.log(row["scores"]["red"] / row["scores"]["blue"]) for row in (old, new)]
        assert change[0] == pytest.approx(made["temperature"] * change[1], rel=1e-3, abs=1e-4)
    red, blue = made["found"]["points"]
    truth = np.array(trained.truth)
    scores = {name: np.array([row["scores"][name] for row in rows]) for name in ("red", "blue")}
    says = {name: own >= made["thresholds"][name] for name, own in scores.items()}
    reached = says["red"][truth == "red"]
    assert red["recall"]["value"] == pytest.approx(reached.mean())
    assert reached.sum() >= math.ceil(0.8 * (len(reached) + 1)) > 0.8 * len(reached)
    assert red["precision"]["value"] == pytest.approx((truth[says["red"]] == "red").mean())
    assert blue["precision"]["value"] == pytest.approx((truth[says["blue"]] == "blue").mean())
    assert blue["precision"]["value"] >= 0.6
    assert np.mean([row["score"] >= made["abstain_below"] for row in rows]) == pytest.approx(54 / 60)
    for place, row in enumerate(rows):
        agrees = all(says[name][place] == (row["label"] == name) for name in says)
        is_accepted = agrees and row["score"] >= made["abstain_below"]
        assert row["decision"] == ("accepted" if is_accepted else "unknown")
    accepted = np.array([row["decision"] == "accepted" for row in rows])
    assert 0 < accepted.sum() < len(rows)
    assert made["found"]["accepted"]["value"] == pytest.approx(accepted.mean())
    right = np.array([row["label"] == name for row, name in zip(rows, truth, strict=True)])
    assert made["found"]["accuracy_accepted"]["value"] == pytest.approx(right[accepted].mean())
    # Of red images no more than the rest is accepted as something else.
    missed = [row["decision"] == "accepted" and row["label"] != "red" for row in rows]
    assert np.mean(np.array(missed)[truth == "red"]) <= 1 - red["recall"]["value"]


def test_losses_stay_and_clearing_restores_the_bytes(trained, copied, capsys):
    before = (copied / "best.ckpt").read_bytes()
    assert flashtask.load(copied).operating is None
    made = operate(copied, capsys, "--recall", "red=0.8")
    assert made["temperature"] != 1
    assert run(["validate", str(copied), str(trained.root), "--json", "--quiet"]) == 0
    validated = [FinishedRun(copied).metrics, json.loads(capsys.readouterr().out)]
    assert (copied / "best.ckpt").read_bytes() != before
    for name in ("val_loss", "val_accuracy"):
        assert validated[0][name] == pytest.approx(validated[1][name], abs=1e-6)
    assert validated[0]["val_ece"] == pytest.approx(made["found"]["calibration_error"]["before"], abs=1e-5)
    assert validated[1]["val_ece"] != validated[0]["val_ece"]
    assert run(["operate", str(copied), "--clear"]) == 0
    assert (copied / "best.ckpt").read_bytes() == before


@pytest.mark.long
def test_the_page_shows_calibration_before_and_after(trained, copied):
    one = FinishedRun(copied)
    first = one.evaluation()
    assert first.calibration().error == pytest.approx(first.metrics["val_ece"], abs=1e-5)
    page = one.report().to_html()
    assert "fitted on the other half" in page
    found = one.operate(recall={"red": 0.8})
    again = one.evaluation()
    before, after = again.calibrations()
    assert before.error == pytest.approx(first.calibration().error, abs=1e-4)
    assert after.error == again.calibration().error == pytest.approx(again.metrics["val_ece"], abs=1e-5)
    assert first.calibrations()[1].error == pytest.approx(found.found["calibration_error"]["after"], abs=1e-4)
    assert "before the temperature of" in one.report().to_html()
    assert one.report().to_dict()["evaluation"]["temperature"] == found.temperature


@pytest.mark.long
def test_resuming_forgets_the_temperature_and_gives_the_same_bits(trained, copied, tmp_path):
    other = tmp_path / "OTHER"
    shutil.copytree(copied, other)
    data = FinishedRun(other).data
    for name in ("best.ckpt", "last.ckpt"):
        FinishedRun(other / name, data=data).operate(recall={"red": 0.8})
        assert flashtask.load(other / name).operating is not None
    for folder in (copied, other):
        words = [*WORDS, "--epochs", "3", "--resume", "--output-dir", str(folder)]
        assert run(["finetune", str(trained.root), *words]) == 0
    ours, theirs = (read_checkpoint(folder / "last.ckpt") for folder in (copied, other))
    assert "operating" not in theirs
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in ours["state_dict"])
    kept = ("train_loss", "val_loss", "val_accuracy", "val_ece")
    histories = [FinishedRun(folder).history for folder in (copied, other)]
    assert all(histories[0].column(name) == histories[1].column(name) for name in kept)


@pytest.mark.long
def test_the_trainer_saves_what_was_found_with_the_best_weights(trained, tmp_path):
    model = ImageClassifier("timm/test_resnet", pretrained=False, learning_rate=0.05)
    data = ImageClassificationData.from_folders(trained.root / "train", trained.root / "val", batch_size=16)
    trainer = Trainer(max_epochs=2, output_dir=tmp_path / "RUN", enable_progress_bar=False, report=False)
    trainer.finetune(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    found = model.operate(data, recall={"red": 0.8}, trainer=trainer)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    assert flashtask.load(tmp_path / "best.ckpt").operating == found
    content = read_checkpoint(tmp_path / "best.ckpt")
    assert content.pop("operating") == found.to_dict()
    write_checkpoint(tmp_path / "without.ckpt", content)
    assert (tmp_path / "without.ckpt").read_bytes() == (tmp_path / "plain.ckpt").read_bytes()


@pytest.mark.long
def test_new_weights_and_new_classes_drop_what_was_found(trained, capsys):
    model = flashtask.load(trained.run)
    data = ImageClassificationData.from_folders(trained.root / "train", trained.root / "val", batch_size=16)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.operate(data, recall={"red": 0.8}, trainer=trainer)
    model.change_labels(["blue", "red", "white"])
    assert model.operating is None
    model = flashtask.load(trained.run)
    model.operate(data, abstain_below=0.5)
    trainer.fit(model, datamodule=data)
    assert model.operating is None
    assert "training drops temperature and thresholds" in capsys.readouterr().err


def test_a_saved_folder_and_a_saved_checkpoint_carry_it(trained, copied, tmp_path):
    FinishedRun(copied).operate(recall={"red": 0.8}, output=tmp_path / "new.ckpt")
    assert flashtask.load(copied).operating is None
    model = flashtask.load(tmp_path / "new.ckpt")
    folder = model.save_pretrained(tmp_path / "saved")
    again = flashtask.load(folder)
    assert again.operating == model.operating
    assert again.predict(trained.files[:5]) == model.predict(trained.files[:5])
    assert again.predict(trained.files[0]).decision in ("accepted", "unknown")
    assert f"softmax(output / {model.temperature:.6g})" in (folder / "README.md").read_text()
    assert run(["operate", str(folder)]) == 2
    assert ImageClassifier.from_pretrained(tmp_path / "new.ckpt", head="mlp").operating is None
    assert ImageClassifier.from_pretrained(tmp_path / "new.ckpt", labels=["red", "black"]).operating is None


@pytest.mark.long
def test_predict_serve_and_export_agree(trained, copied, tmp_path):
    httpx = pytest.importorskip("httpx2")
    pytest.importorskip("onnxruntime")
    from test_serve import serving

    FinishedRun(copied).operate(recall={"red": 0.8}, coverage=0.9)
    model, files = flashtask.load(copied), trained.files[::4]
    predicted = model.predict(files)
    assert {one.decision for one in predicted} == {"accepted", "unknown"}
    plainly = model.predict(files[:3])  # too few for worker threads
    assert [one.decision for one in plainly] == [one.decision for one in predicted[:3]]
    model.export(tmp_path / "m.onnx")
    words = [sys.executable, str(tmp_path / "m.py"), *files]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    with serving(str(copied)) as (client, _):
        for line, one, path in zip(lines, predicted, files, strict=True):
            exported = json.loads(line)
            with open(path, "rb") as file:
                answer = client.post("/predict", files={"files": file})
            assert answer.status_code == httpx.codes.OK
            (served,) = answer.json()["predictions"]
            for found in (exported, served):
                assert found["scores"] == pytest.approx(one.probabilities, abs=1e-4)
                assert (found["label"], found["decision"]) == (one.label, one.decision)
        about = client.get("/models").json()["models"][0]
        assert about["temperature"] == model.temperature
        name = about["name"]
        outputs = client.get(f"/v2/models/{name}").json()["outputs"]
        assert [one["name"] for one in outputs] == ["label", "scores", "decision"]


# ---- several labels an image


def test_several_labels_keep_their_labels_and_f1(table):
    model = ImageClassifier("timm/test_resnet", pretrained=False, multi_label=True, learning_rate=0.02, metrics="ece")
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = data_of(table)
    trainer.finetune(model, datamodule=data, strategy="freeze")
    files = [str(table.parent / name) for name in data.split_manifest()]
    before, (metrics,) = model.predict(files), trainer.validate(model, datamodule=data, verbose=False)
    found = model.operate(data, recall={"red": 0.7}, trainer=trainer)
    assert found.temperature != 1
    after, (again,) = model.predict(files), trainer.validate(model, datamodule=data, verbose=False)
    assert [one.labels for one in before] == [one.labels for one in after]
    assert (metrics["val_f1"], metrics["val_loss"]) == (again["val_f1"], again["val_loss"])
    errors = found.found["calibration_error"]
    assert metrics["val_ece"] == pytest.approx(errors["before"], abs=1e-5)
    for old, new in zip(before, after, strict=True):
        logits = [math.log(one.probabilities["red"] / (1 - one.probabilities["red"])) for one in (old, new)]
        assert logits[0] == pytest.approx(found.temperature * logits[1], rel=1e-3, abs=1e-4)
        agrees = (new.probabilities["red"] >= found.thresholds["red"]) == ("red" in new.labels)
        assert new.decision == ("accepted" if agrees else "unknown")
    with pytest.raises(UsageError, match="one label an image"):
        model.operate(data, coverage=0.9)


# ---- what is refused


def test_errors_name_the_class_and_the_best_that_can_be_reached(trained, capsys):
    source = str(trained.run)
    bad = {
        ("--recall", "rde=0.9"): "did you mean 'red'?",
        ("--recall", "red=0.999"): "20 images of red can promise at most 20 / 21 = 0.9523",
        ("--recall", "red=0.9", "--class-precision", "red=0.9"): "red has two targets",
        ("--recall", "red=0.9", "--recall", "red=0.8"): "--recall names 'red' twice",
        ("--recall", "red=95"): "must be a share above 0 and below 1, not 95",
        ("--recall", "0.9"): "is not a label and a share such as defective=0.95",
        ("--coverage", "0.9", "--abstain-below", "0.5"): "both set the score",
        ("--clear", "--coverage", "0.9"): "--clear removes what is stored",
        ("--input", "path"): "--input is about DATA",
    }
    for words, message in bad.items():
        capsys.readouterr()
        assert run(["operate", source, *words, "--quiet"]) == 2
        assert message in capsys.readouterr().err
    assert flashtask.load(trained.run).operating is None


def test_other_tasks_say_what_is_taken(tmp_path, capsys):
    model = ImageRegressor("timm/test_resnet", pretrained=False, num_targets=1)
    with pytest.raises(
        UsageError, match="image_regression has no operating points\n  why: only the scores of image_cl"
    ):
        model.operate(None)


def test_a_part_without_a_class_is_bad_data(trained, tmp_path):
    colour_folders(tmp_path / "val", each=4, classes=("blue", "green"), size=32)
    model = flashtask.load(trained.run)
    data = model.data_class.for_evaluation(tmp_path / "val", "val", model.target_description)
    with pytest.raises(BadDataError, match="there is no image of red in val"):
        model.operate(data, recall={"red": 0.5})
    with pytest.raises(UnknownNameError):
        model.operate(data, precision={"pink": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"temperature": "2"},
        {"thresholds": {"red": 2}},
        {"thresholds": {"pink": 0.5}},
        {"thresholds": [0.5]},
        {"abstain_below": -1},
        {"more": 1},
    ],
)
def test_operating_points_of_a_stranger_are_checked(trained, tmp_path, change):
    content = read_checkpoint(trained.run / "best.ckpt")
    whole = {"temperature": 2.0, "thresholds": {"red": 0.5}, "abstain_below": None, "found": {}}
    write_checkpoint(tmp_path / "good.ckpt", {**content, "operating": whole})
    assert flashtask.load(tmp_path / "good.ckpt").temperature == 2
    write_checkpoint(tmp_path / "bad.ckpt", {**content, "operating": {**whole, **change}})
    with pytest.raises(IntegrityError):
        flashtask.load(tmp_path / "bad.ckpt")
