"""`flashtask update`: further training on new data and replayed old images, refused where an old class falls."""

import csv
import json
from pathlib import Path

import pytest
from small import colour_folders

import flashtask
from flashtask.cli import run
from flashtask.reports.forgetting import forgetting
from flashtask.reports.judgement import Judged, Judgement, Pair

QUIET = ["--quiet", "--no-report"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    colour_folders(tmp_path / "old", each=15)
    colour_folders(tmp_path / "new", each=10, classes=("green", "red"))
    small = ["--backbone", "timm/test_resnet", "--no-pretrained", "--lr", "0.1", "--epochs", "4"]
    assert run(["finetune", "old", *small, "--output-dir", "run", *QUIET]) == 0
    return tmp_path


def test_an_accepted_model_knows_old_and_new_classes_and_is_installed(folder, capsys):
    capsys.readouterr()
    assert (
        run(["update", "run", "new", "--replay", "22", "--epochs", "15", "--install", "model.ckpt", "--json", *QUIET])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [(one["label"], one["samples"], one["before"]) for one in found["classes"]] == [
        ("blue", 3, 1.0),
        ("red", 3, 1.0),
    ]
    assert found["new"]["samples"] == 4
    assert not found["is_refused"]
    model = flashtask.load("model.ckpt")
    assert set(model.labels) == {"blue", "green", "red"}
    assert Path("model.ckpt").read_bytes() == Path("run-updated/best.ckpt").read_bytes()

    with Path("run-updated/samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["part"] == "train"]
    assert sum("/old/" in row["path"] for row in trained) == 22
    assert sum("/new/" in row["path"] for row in trained) == 16
    old = [row for row in rows if row["part"] == "val" and "/old/" in row["path"]]
    right = sum(
        one.label == row["label"] for one, row in zip(model.predict([r["path"] for r in old]), old, strict=True)
    )
    assert found["old"]["after"] == pytest.approx(right / len(old))


def test_a_model_that_forgets_replaces_nothing(folder, capsys):
    Path("model.ckpt").write_bytes(b"the model of before")
    words = ["update", "run", "new", "--replay", "2", "--install", "model.ckpt"]
    assert run([*words, *QUIET]) == 76
    said = capsys.readouterr()
    assert "nothing was replaced" in said.err
    assert "-100.0" in said.err
    assert Path("model.ckpt").read_bytes() == b"the model of before"
    assert run([*words, "--allow", "100", "--output-dir", "again", *QUIET]) == 0
    assert Path("model.ckpt").read_bytes() == Path("again/best.ckpt").read_bytes()

    assert run(words) == 73
    (folder / "alone").mkdir()
    (folder / "alone/best.ckpt").write_bytes(Path("run/best.ckpt").read_bytes())
    assert run(["update", "alone/best.ckpt", "new"]) == 2
    assert "does not lead to the data" in capsys.readouterr().err


def judged(target, said):
    return Judged(f"{target}.png", f"/{target}.png", target, said, {}, Judgement(0.0, pairs=(Pair(target, said),)))


def test_points_of_classes():
    before = [judged("a", "a")] * 50 + [judged("b", "b")] * 3 + [judged("b", "a")]
    after = [judged("a", "a")] * 49 + [judged("a", "b")] + [judged("b", "b")] * 4
    found = forgetting(before, after, [judged("c", "c"), judged("c", "a")], allowed=2.0)
    assert [(one.label, one.samples, round(one.points, 6)) for one in found.classes] == [
        ("a", 50, -2.0),
        ("b", 4, 25.0),
    ]
    assert found.fallen == ()
    assert found.old == (pytest.approx(53 / 54), pytest.approx(53 / 54))
    assert found.new == 0.5
    assert [one.label for one in forgetting(before, after, [], allowed=1.9).fallen] == ["a"]
    assert max(map(len, "\n".join(found.lines()).splitlines())) <= 80
