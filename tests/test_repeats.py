"""`--repeats` and `--folds`: several runs as one, what they say together, and a kill between or within them."""

import csv
import json
import os
import signal
import statistics
import time

import pytest
import yaml
from small import colour_folders
from warm import start

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Trainer, repeat_runs
from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import OutputError, UsageError
from flashtask.tasks.repeats import planned_runs

PROGRAM = """
import sys
from flashtask.cli import run
sys.exit(run(sys.argv[1:]))
"""
SMALL = ["--backbone", "timm/test_resnet", "--no-pretrained", "--batch-size", "8", "--quiet", "--no-report"]
TASKS = {"logger": False, "enable_progress_bar": False, "report": False, "max_epochs": 1}


@pytest.fixture
def folder(tmp_path):
    colour_folders(tmp_path / "data", each=9)
    return tmp_path


def words(folder, *more, out="out"):
    return ["finetune", str(folder / "data"), "--epochs", "2", *SMALL, *more, "--output-dir", str(folder / out)]


def read(place, name="summary.json"):
    return json.loads((place / name).read_text())


def rows_of(place):
    with (place / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_folds_are_runs_and_every_image_is_predicted_once_by_the_run_that_has_not_seen_it(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(words(folder, "--folds", "3")) == 0
    out = folder / "out"
    said, found = capsys.readouterr().out, read(out)
    assert max(map(len, said.splitlines())) <= 80

    bests = [read(out / f"fold-{fold}")["best"] for fold in (1, 2, 3)]
    for name, spread in found["metrics"].items():
        values = [best[name] for best in bests]
        expected = [statistics.fmean(values), statistics.stdev(values), min(values), max(values)]
        assert [spread[key] for key in ("mean", "deviation", "low", "high")] == pytest.approx(expected, rel=1e-12)
    assert set(found["metrics"]) == {"val_accuracy", "val_loss"}

    rows = rows_of(out)
    assert sorted(row["path"] for row in rows) == sorted(str(path) for path in (folder / "data").rglob("*.png"))
    for fold in (1, 2, 3):
        own = {row["path"]: row for row in rows if row["fold"] == str(fold)}
        with (out / f"fold-{fold}/split.csv").open(newline="") as file:
            validates = [row["name"] for row in csv.DictReader(file) if row["part"] == "val"]
        assert sorted(own) == sorted(str(folder / "data" / name) for name in validates)
        model = flashtask.load(out / f"fold-{fold}/best.ckpt")
        for path, prediction in zip(own, model.predict([*own]), strict=True):
            expected = prediction.as_row(all_scores=["blue", "red"])
            assert own[path]["label"] == expected["label"]
            for name in ("score", "score_blue", "score_red"):
                assert float(own[path][name]) == pytest.approx(expected[name], abs=1e-5)
    right = sum(row["label"] == row["target"] for row in rows) / len(rows)
    assert found["out_of_fold"]["value"] == pytest.approx(right)
    assert all(os.path.basename(os.path.dirname(row["path"])) == row["target"] for row in rows)

    capsys.readouterr()
    assert run(["rerun", str(out / "fold-2"), "--quiet"]) == 0
    assert run(["runs", str(out)]) == 0
    assert "(mean of 3)" in capsys.readouterr().out
    assert run(words(folder, "--folds", "3")) == 73


def content(out, names):
    """What must not depend on a kill: weights, logs and predictions, without times."""
    found = {"predictions": (out / "predictions.csv").read_bytes(), "recipe": (out / "recipe.yaml").read_bytes()}
    for name in names:
        for checkpoint in ("best.ckpt", "last.ckpt"):
            weights = read_checkpoint(out / name / checkpoint)["state_dict"]
            found[f"{name}/{checkpoint}"] = {key: value.numpy().tobytes() for key, value in weights.items()}
        with (out / name / "metrics.csv").open(newline="") as file:
            log = [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]
        found[f"{name}/log"] = log
    return found


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("moment", ["fold-2/metrics.csv", "fold-2/summary.json"])
def test_a_kill_within_or_between_folds_changes_no_bit(folder, monkeypatch, moment):
    monkeypatch.setenv("FLASHTASK_CACHE", str(folder / "one"))
    assert run(words(folder, "--folds", "3", out="whole")) == 0
    monkeypatch.setenv("FLASHTASK_CACHE", str(folder / "other"))
    process = start(PROGRAM, *words(folder, "--folds", "3", out="killed"))
    while not (folder / "killed" / moment).exists():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (folder / "killed/summary.json").exists()
    first = (folder / "killed/fold-1/last.ckpt").stat().st_mtime_ns
    assert run(["finetune", "--resume", "--output-dir", str(folder / "killed"), "--quiet"]) == 0
    assert (folder / "killed/fold-1/last.ckpt").stat().st_mtime_ns == first
    names = ["fold-1", "fold-2", "fold-3"]
    assert content(folder / "killed", names) == content(folder / "whole", names)


def test_repeats_differ_in_the_seed_that_is_to_vary(folder):
    def split(out, number):
        return (folder / out / f"repeat-{number}/split.csv").read_text()

    def weights(out, number):
        found = read_checkpoint(folder / out / f"repeat-{number}/last.ckpt")["state_dict"]
        return next(value for name, value in found.items() if name.startswith("head.") and value.ndim == 2)

    for vary in ("seed", "split"):
        assert run(words(folder, "--repeats", "2", "--vary", vary, "--seed", "5", out=vary)) == 0
    assert [row["seed"] for row in read(folder / "seed")["runs"]] == [5, 6]
    assert [row["split_seed"] for row in read(folder / "seed")["runs"]] == [0, 0]
    assert split("seed", 1) == split("seed", 2)
    assert not weights("seed", 1).equal(weights("seed", 2))
    assert [row["seed"] for row in read(folder / "split")["runs"]] == [5, 5]
    assert [row["split_seed"] for row in read(folder / "split")["runs"]] == [0, 1]
    assert split("split", 1) != split("split", 2)
    assert not (folder / "split/predictions.csv").exists()


def test_a_recipe_has_the_same_keys(folder):
    recipe = {
        "data": {"from_folders": {"train_folder": str(folder / "data"), "batch_size": 8}},
        "model": {"backbone": "timm/test_resnet", "pretrained": False},
        "trainer": {"max_epochs": 1, "report": False, "seed": 3},
        "repeats": 2,
        "folds": 2,
        "vary": "both",
    }
    (folder / "many.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["finetune", str(folder / "many.yaml"), "--output-dir", str(folder / "out"), "--quiet"]) == 0
    found = read(folder / "out")
    names = ["repeat-1-fold-1", "repeat-1-fold-2", "repeat-2-fold-1", "repeat-2-fold-2"]
    assert [(row["name"], row["seed"], row["split_seed"]) for row in found["runs"]] == [
        (name, 3 + number // 2, number // 2) for number, name in enumerate(names)
    ]
    rows = rows_of(folder / "out")
    assert len(rows) == 36
    assert len({(row["path"], row["repeat"]) for row in rows}) == 36
    assert found["out_of_fold"]["samples"] == 18
    assert "18 groups" in found["out_of_fold"]["method"]


def test_numbers_stand_as_numbers_in_the_predictions(folder, capsys):
    files = sorted((folder / "data").rglob("*.png"))
    lines = [f"{file},{0.5 * number},{-number}" for number, file in enumerate(files)]
    (folder / "one.csv").write_text("\n".join(["file,size,depth", *lines]))
    words = ["finetune", str(folder / "one.csv"), "--task", "image_regression", "--epochs", "1", "--folds", "2", *SMALL]
    assert run([*words, "--target", "size", "--output-dir", str(folder / "one")]) == 0
    by_path = {row["path"]: row for row in rows_of(folder / "one")}
    assert [float(by_path[str(file)]["target"]) for file in files] == [0.5 * number for number in range(len(files))]
    mean = statistics.fmean(abs(float(row["size"]) - float(row["target"])) for row in by_path.values())
    assert read(folder / "one")["out_of_fold"]["value"] == pytest.approx(mean, rel=1e-5)
    assert run([*words, "--target", "size,depth", "--output-dir", str(folder / "two")]) == 0
    by_path = {row["path"]: row for row in rows_of(folder / "two")}
    assert [float(by_path[str(file)]["target_depth"]) for file in files] == [-number for number in range(len(files))]
    capsys.readouterr()
    assert run(["doctor", str(folder / "two")]) == 66
    assert "holds several runs" in capsys.readouterr().err


def test_what_contradicts_itself_is_refused_before_anything_is_written(folder, capsys):
    (folder / "both/train").parent.mkdir()
    os.symlink(folder / "data", folder / "both/train")
    colour_folders(folder / "both/val", each=2)
    cases = [
        ([str(folder / "both"), "--folds", "3"], "val_folder"),
        ([str(folder / "both"), "--repeats", "3", "--vary", "split"], "no split that could vary"),
        ([str(folder / "data"), "--folds", "3", "--fold", "1/3"], "both define the validation data"),
        ([str(folder / "data"), "--folds", "3", "--val-split", "0.5"], "both define the validation data"),
        ([str(folder / "data"), "--vary", "split"], "is for several runs"),
        ([str(folder / "data"), "--folds", "1"], "at least 2"),
        ([str(folder / "data"), "--folds", "3", "--devices", "2"], "train in one process"),
    ]
    for words_of_case, said in cases:
        assert run(["finetune", *words_of_case, *SMALL, "--output-dir", str(folder / "out")]) == 2
        assert said in capsys.readouterr().err
        assert not (folder / "out").exists()


def test_resuming_with_other_settings_is_refused(folder, capsys):
    assert run(words(folder, "--repeats", "2", "--set", "trainer.max_epochs=1")) == 0
    assert run(["finetune", "--resume", "--output-dir", str(folder / "out"), "--lr", "0.5"]) == 2
    assert "these settings differ" in capsys.readouterr().err


def test_from_python_with_a_function_that_trains_one(folder):
    trained = []

    def train(planned):
        trained.append(planned.name)
        data = ImageClassificationData.from_folders(folder / "data", batch_size=8, **planned.split)
        model = ImageClassifier("timm/test_resnet", pretrained=False)
        trainer = Trainer(output_dir=planned.folder, seed=planned.seed, **TASKS)
        trainer.finetune(model, datamodule=data, strategy="freeze", ckpt_path=planned.checkpoint)
        return trainer.result

    found = repeat_runs(train, folder / "out", folds=2)
    assert len(found.out_of_fold) == 18
    assert next(iter(found.predictions()))["fold"] == 1
    assert trained == ["fold-1", "fold-2"]
    with pytest.raises(OutputError, match="taken"):
        repeat_runs(train, folder / "out", folds=2)
    again = repeat_runs(train, folder / "out", folds=2, resume=True)
    assert trained == ["fold-1", "fold-2"]
    assert again.metrics == found.metrics

    def takes_another_seed(planned):
        data = ImageClassificationData.from_folders(folder / "data", batch_size=8, **planned.split)
        trainer = Trainer(output_dir=planned.folder, seed=0, **TASKS)
        trainer.finetune(ImageClassifier("timm/test_resnet", pretrained=False), datamodule=data)

    with pytest.raises(UsageError, match="seed 0, not 4"):
        repeat_runs(takes_another_seed, folder / "wrong", folds=2, seed=4)
    with pytest.raises(UsageError, match="nothing to repeat"):
        planned_runs(folder)
