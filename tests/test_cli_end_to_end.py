"""From a folder of images to a run, and from the run to predictions and metrics, by commands alone."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
import yaml
from small import colour_folders

from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.tasks.image_embedding import ImageEmbedder

OPTIONS = "--backbone test_resnet --no-pretrained --strategy no_freeze --batch-size 4 --num-workers 0 --lr 0.01 --quiet"
TRAIN = [*OPTIONS.split(), "--epochs", "2", "--seed", "3"]


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of 2 classes in train/, val/ and test/."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 6), ("val", 4), ("test", 2)):
        colour_folders(root / part, each=count, size=32)
    return root


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "RUN"
    assert run(["finetune", str(images), *TRAIN, "--output-dir", str(folder)]) == 0
    return folder


def losses(folder: Path) -> list[tuple[str, ...]]:
    """The rows of metrics.csv that must not depend on the clock."""
    names = ("epoch", "step", "train_loss", "val_loss", "val_accuracy")
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def test_finetune_says_what_came_out_and_what_to_do_next(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["finetune", str(images), *TRAIN, "--max-steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "best epoch 0: val_loss " in out
    assert "val_accuracy " in out
    assert "run folder: runs/000\n" in out
    assert "next: flashtask predict runs/000/best.ckpt IMAGE\n" in out


def test_a_run_holds_its_files_and_a_recipe_without_its_own_place(finished, images):
    names = {path.name for path in finished.iterdir()}
    assert {"recipe.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "summary.json"} <= names
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["data"]["from_folders"]["train_folder"] == str(images / "train")
    assert recipe["model"]["backbone"] == "test_resnet"
    assert recipe["trainer"]["seed"] == 3
    assert recipe["finetune"]["strategy"] == "no_freeze"
    assert "output_dir" not in recipe["trainer"]


def test_the_recipe_of_a_run_repeats_it(finished, tmp_path, capsys):
    assert run(["finetune", str(finished / "recipe.yaml"), "--output-dir", str(tmp_path / "RUN2")]) == 0
    assert losses(tmp_path / "RUN2") == losses(finished)
    again = yaml.safe_load((tmp_path / "RUN2" / "recipe.yaml").read_text())
    assert again == yaml.safe_load((finished / "recipe.yaml").read_text())
    assert str(tmp_path) not in yaml.safe_dump(again)


@pytest.mark.long
def test_another_seed_gives_other_numbers(finished, tmp_path):
    argv = ["finetune", str(finished / "recipe.yaml"), "--seed", "4", "--output-dir", str(tmp_path / "RUN2")]
    assert run(argv) == 0
    assert losses(tmp_path / "RUN2") != losses(finished)


def test_a_taken_run_folder_is_refused_and_left_alone(finished, images, capsys):
    before = _contents(finished)
    assert run(["finetune", str(images), *TRAIN, "--output-dir", str(finished)]) == 73
    error = capsys.readouterr().err
    assert "is taken" in error
    assert "--resume" in error
    assert _contents(finished) == before


def test_an_empty_run_folder_is_fine_and_resume_starts_where_nothing_is(images, tmp_path, capsys):
    (tmp_path / "RUN").mkdir()
    argv = ["finetune", str(images), *TRAIN, "--max-steps", "1", "--output-dir", str(tmp_path / "RUN"), "--resume"]
    assert run(argv) == 0
    assert f"nothing to resume in {tmp_path / 'RUN'}: starting" in capsys.readouterr().err
    assert (tmp_path / "RUN" / "best.ckpt").exists()


def test_a7_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = _contents(finished)
    assert run(["finetune", "--resume", "--output-dir", str(finished)]) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert _contents(finished) == before


def test_a6_resuming_as_another_run_is_refused_with_a_diff(finished, images, capsys):
    argv = ["finetune", str(images), *TRAIN, "--resume", "--output-dir", str(finished)]
    assert run([*argv, "--lr", "0.5", "--strategy", "freeze", "--epochs", "9"]) == 2
    error = capsys.readouterr().err
    assert "model.learning_rate is 0.01 in the run, 0.5 now" in error
    assert "finetune.strategy is 'no_freeze' in the run, 'freeze' now" in error
    assert "max_epochs" not in error
    assert len(error.splitlines()) <= 8


@pytest.mark.long
def test_resuming_with_more_epochs_goes_on(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "RUN")
    assert run(["finetune", "--resume", "--output-dir", str(tmp_path / "RUN"), "--epochs", "3"]) == 0
    rows = losses(tmp_path / "RUN")
    assert rows[:2] == losses(finished)
    assert [row[0] for row in rows] == ["0", "1", "2"]


@pytest.mark.long
def test_data_that_was_moved_is_named_when_a_run_is_resumed(images, tmp_path, capsys):
    data, out = tmp_path / "data", str(tmp_path / "RUN")
    shutil.copytree(images, data)
    assert run(["finetune", str(data), *TRAIN, "--output-dir", out]) == 0
    argv = ["finetune", "--resume", "--output-dir", out, "--epochs", "3"]
    other = shutil.copytree(images, tmp_path / "other")
    assert run([*argv, str(other)]) == 2  # the data of the run is still there
    assert "train_folder is" in capsys.readouterr().err
    data.rename(tmp_path / "moved")
    next((other / "train").rglob("*.png")).unlink()
    assert run([*argv, str(other)]) == 65
    assert "the images are not those that the run was started on" in capsys.readouterr().err
    assert run([*argv, str(tmp_path / "moved")]) == 0
    assert [row[0] for row in losses(tmp_path / "RUN")] == ["0", "1", "2"]


@pytest.mark.long
def test_b5_a_damaged_last_checkpoint_is_told_and_the_best_one_used(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "RUN")
    damaged = bytearray((tmp_path / "RUN" / "last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "RUN" / "last.ckpt").write_bytes(damaged)
    argv = ["finetune", "--resume", "--output-dir", str(tmp_path / "RUN"), "--epochs", "3"]
    assert run(argv) == 0
    error = capsys.readouterr().err
    assert "last.ckpt is damaged" in error
    assert "continuing from best.ckpt instead" in error
    (tmp_path / "RUN" / "last.ckpt").write_bytes(b"")
    (tmp_path / "RUN" / "best.ckpt").write_bytes(b"")
    assert run([*argv[:-1], "5"]) == 76


@pytest.mark.long
def test_a_run_on_a_terminal_shows_its_progress_and_ends_well(images, tmp_path):
    options = [option for option in TRAIN if option != "--quiet"]
    argv = [sys.executable, "-m", "flashtask", "finetune", str(images), *options, "--output-dir", str(tmp_path / "RUN")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    terminal, end = os.openpty()
    process = subprocess.Popen(argv, env=environment, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    assert b"Warning" not in shown
    assert b"images/s" in shown
    assert b"best epoch" in shown


def test_a_killed_run_resumes_to_the_same_numbers(images, tmp_path):
    long = [*OPTIONS.split(), "--epochs", "4"]
    assert run(["finetune", str(images), *long, "--output-dir", str(tmp_path / "WHOLE")]) == 0
    argv = ["finetune", str(images), *long, "--output-dir", str(tmp_path / "KILLED")]
    process = warm.start("import sys\nfrom flashtask.cli import run\nsys.exit(run(sys.argv[1:]))", *argv)
    while not (tmp_path / "KILLED" / "last.ckpt").exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run([*argv, "--resume"]) == 0
    assert losses(tmp_path / "KILLED") == losses(tmp_path / "WHOLE")


@pytest.mark.long
def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, tmp_path, capsys):
    (tmp_path / "RUN").mkdir()
    shutil.copy(finished / "recipe.yaml", tmp_path / "RUN")
    assert run(["finetune", "--resume", "--output-dir", str(tmp_path / "RUN")]) == 0
    assert "before its first checkpoint" in capsys.readouterr().err
    assert losses(tmp_path / "RUN") == losses(finished)


def test_a_folder_of_classes_is_split(images, tmp_path):
    argv = ["finetune", str(images / "train"), *TRAIN, "--max-steps", "1", "--output-dir", str(tmp_path / "RUN")]
    assert run(argv) == 0
    recipe = yaml.safe_load((tmp_path / "RUN" / "recipe.yaml").read_text())
    assert recipe["data"]["from_folders"]["val_split"] == 0.2
    assert "val_accuracy" in (tmp_path / "RUN" / "metrics.csv").read_text()


@pytest.mark.long
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_bad_image_is_named_and_the_policy_decides(policy, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    half = (images / "train" / "red" / "0.png").read_bytes()
    (tmp_path / "data" / "train" / "red" / "half.png").write_bytes(half[: len(half) // 2])
    (tmp_path / "data" / "train" / "blue" / "page.png").write_text("<html>not found</html>")
    argv = ["finetune", str(tmp_path / "data"), *TRAIN, "--max-steps", "1", "--on-bad-image", policy]
    assert run([*argv, "--output-dir", str(tmp_path / "RUN")]) == (65 if policy == "error" else 0)
    error = capsys.readouterr().err
    assert "half.png" in error
    assert "page.png" in error
    assert (tmp_path / "RUN").exists() == (policy == "skip")


def test_a_run_that_fails_before_it_starts_leaves_no_empty_folders(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["finetune", str(images), *TRAIN, "--set", "model.lr_scheduler=cosin"]
    assert run(argv) == 2
    assert "cosin" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    Path("mine").mkdir()
    assert run([*argv, "--output-dir", "mine"]) == 2
    assert run([*argv, "--output-dir", "a/b"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_class_is_refused_and_nothing_is_left_behind(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "train" / "green").mkdir()
    assert run(["finetune", str(tmp_path / "data"), *TRAIN, "--output-dir", str(tmp_path / "RUN")]) == 65
    assert "'green'" in capsys.readouterr().err
    assert not (tmp_path / "RUN").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*holds NaN:UserWarning")
def test_json_holds_null_where_a_metric_is_no_number(finished, images, tmp_path, capsys):
    content = read_checkpoint(finished / "best.ckpt")
    for name, tensor in content["state_dict"].items():
        if name.startswith("head."):
            content["state_dict"][name] = tensor * float("nan")
    content.pop("hyperparameters")
    write_checkpoint(tmp_path / "nan.ckpt", content)
    assert run(["validate", str(tmp_path / "nan.ckpt"), str(images), "--json", "--quiet"]) == 0
    metrics = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert metrics["val_loss"] is None
    argv = ["predict", str(tmp_path / "nan.ckpt"), str(images / "test"), "--format", "jsonl", "--top-k", "2"]
    assert run(argv) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0], parse_constant=pytest.fail)
    assert row["score"] is None
    assert row["scores"] == [None, None]


@pytest.mark.long
def test_predict_a_folder_in_order_in_every_format(finished, images, capsys):
    expected = [str(images / "test" / name) for name in ("blue/0.png", "blue/1.png", "red/0.png", "red/1.png")]
    argv = ["predict", str(finished / "best.ckpt"), str(images / "test")]
    assert run([*argv, "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["path"] for row in rows] == expected
    assert {row["label"] for row in rows} <= {"red", "blue"}
    assert list(rows[0]) == ["path", "label", "score"]
    assert run([*argv, "--format", "jsonl", "--top-k", "2"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in objects] == expected
    for row, other in zip(objects, rows, strict=True):
        assert row["labels"][0] == row["label"] == other["label"]
        assert row["scores"][0] == row["score"] == float(other["score"])
        assert sum(row["scores"]) == pytest.approx(1)
    assert run(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "label", "score"]
    assert [line.split()[0] for line in lines[1:]] == expected
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1


def test_predict_single_images_keeps_their_order_and_the_paths_as_typed(finished, images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    inputs = ["test/red/1.png", "test/blue", "val/red/0.png"]
    assert run(["predict", str(finished / "best.ckpt"), *inputs, "--format", "csv", "--top-k", "2"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["path"] for row in rows] == ["test/red/1.png", "test/blue/0.png", "test/blue/1.png", "val/red/0.png"]
    assert sorted(json.loads(rows[0]["labels"])) == ["blue", "red"]


def test_predict_writes_a_file_only_when_it_is_whole(finished, images, tmp_path, capsys):
    output, bad = tmp_path / "p.csv", tmp_path / "bad.png"
    bad.write_text("no image")
    argv = ["predict", str(finished / "best.ckpt"), str(bad), str(images / "test"), "--format", "csv"]
    assert run([*argv, "--output", str(output)]) == 65
    assert str(bad) in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [bad]
    assert run([*argv, "--output", str(output), "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"left out {str(bad)!r}" in printed.err
    assert len(output.read_text().splitlines()) == 5
    assert sorted(tmp_path.iterdir()) == [bad, output]


def test_predict_refuses_more_labels_than_there_are(finished, images, capsys):
    assert run(["predict", str(finished / "best.ckpt"), str(images / "test"), "--top-k", "3"]) == 2
    assert "--top-k 2" in capsys.readouterr().err


def test_predict_refuses_a_task_without_labels(images, tmp_path, capsys):
    task = ImageEmbedder("test_resnet", pretrained=False)
    content = {**task.describe(), "state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    write_checkpoint(tmp_path / "embedder.ckpt", content)
    assert run(["predict", str(tmp_path / "embedder.ckpt"), str(images / "test")]) == 2
    assert "the predictions of image_embedding in" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(("stage", "part"), [("validate", "val"), ("test", "test")])
def test_metrics_are_one_flat_object_alone_on_stdout(stage, part, finished, images, capsys):
    assert run([stage, str(finished / "best.ckpt"), str(images), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert set(metrics) == {f"{part}_loss", f"{part}_accuracy"}
    assert run([stage, str(finished / "best.ckpt"), str(images / part), "--json", "--batch-size", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(metrics, rel=0.01)
    assert run([stage, str(finished / "best.ckpt"), str(images)]) == 0
    assert f"{part}_accuracy  {metrics[f'{part}_accuracy']:.4f}\n" in capsys.readouterr().out


def test_validation_agrees_with_the_best_epoch_of_the_run(finished, images, capsys):
    best = json.loads((finished / "summary.json").read_text())["best"]
    assert run(["validate", str(finished / "best.ckpt"), str(images), "--json", "--batch-size", "4"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["val_accuracy"] == best["val_accuracy"]
    assert metrics["val_loss"] == pytest.approx(best["val_loss"], rel=0.01)


def test_evaluation_writes_nothing(finished, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["validate", str(finished / "best.ckpt"), str(images), "--json"]) == 0
    assert list(tmp_path.iterdir()) == []
