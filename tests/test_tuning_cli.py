"""`flashtask tune`, and `auto` for the batch size and the learning rate of `flashtask finetune` and its recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fingerprints import of_files
from small import colour_folders

from flashtask.cli import run
from flashtask.core.yaml_reader import read_yaml

SMALL = ["--backbone", "timm/test_resnet", "--no-pretrained", "--num-workers", "0", "--val-split", "4"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of 12 training images, and 4 to validate on, beside which one stands."""
    monkeypatch.chdir(tmp_path)
    return colour_folders(tmp_path / "data", each=8).name


def recipe_of(folder):
    return read_yaml(Path(folder, "recipe.yaml")).content


def numbers(content):
    """(batch size, rate of the head, rate of the backbone) of a recipe."""
    model = content["model"]
    return content["data"]["from_folders"]["batch_size"], model["learning_rate"], model["backbone_learning_rate"]


@pytest.mark.long
def test_s33_auto_is_searched_for_printed_and_written_down_as_numbers(data, capsys):
    code = run(["finetune", data, *SMALL, "--epochs", "1", "--lr", "auto", "--batch-size", "auto", "--output-dir", "a"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    first, second, *_ = printed.out.splitlines()
    assert first == "batch size 8: there are 12 training samples"
    assert second.startswith("learning rate ")
    assert all(len(line) <= 80 for line in (first, second))
    size, rate, backbone_rate = numbers(recipe_of("a"))
    assert size == 8
    assert f"{rate:.3g}" == second.split()[2].rstrip(":")
    assert 1e-8 < rate <= 1
    # Without pretrained weights the backbone trains as fast as the head.
    assert backbone_rate == rate

    # The recipe repeats the run, bit for bit, and searches no more.
    assert run(["finetune", "a/recipe.yaml", "--output-dir", "b"]) == 0
    assert "learning rate" not in capsys.readouterr().out
    assert recipe_of("a") == recipe_of("b")
    losses = [line.split(",")[2:5] for run_ in "ab" for line in Path(run_, "metrics.csv").read_text().splitlines()[1:]]
    assert losses[0] == losses[1]

    # Resuming takes the numbers that were found; nothing is searched for, and other numbers are another run.
    assert run(["finetune", data, *SMALL, "--epochs", "2", "--lr", "auto", "--output-dir", "a", "--resume"]) == 0
    assert "learning rate" not in capsys.readouterr().out
    assert numbers(recipe_of("a")) == (size, rate, backbone_rate)
    assert run(["finetune", data, *SMALL, "--lr", "0.5", "--output-dir", "a", "--resume"]) == 2
    assert "model.learning_rate is" in capsys.readouterr().err


@pytest.mark.long
def test_s28_auto_in_a_recipe_means_the_same(data, capsys):
    Path("r.yaml").write_text(
        f"data: {{from_folders: {{train_folder: {data}, val_split: 4, batch_size: auto, num_workers: 0}}}}\n"
        "model: {backbone: timm/test_resnet, pretrained: false, learning_rate: 0.02}\n"
        "trainer: {max_steps: 1}\n"
    )
    code = run(["finetune", "r.yaml", "--output-dir", "a"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.splitlines()[0] == "batch size 8: there are 12 training samples"
    assert numbers(recipe_of("a")) == (8, 0.02, 0.02)


@pytest.mark.long
def test_tune_prints_what_it_finds_and_writes_nothing(data, capsys):
    before = of_files(Path())
    assert run(["tune", data, *SMALL, "--strategy", "freeze"]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first == "batch size 8: there are 12 training samples"
    assert second.startswith("learning rate ")
    assert "looking for a batch size" in printed.err
    assert of_files(Path()) == before

    assert run(["tune", data, *SMALL, "--strategy", "freeze", "--json", "--quiet", "--picture", "curve.png"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert set(found) == {"batch_size", "batch_size_bound", "learning_rate", "learning_rate_clear"}
    assert (found["batch_size"], found["batch_size_bound"]) == (8, "data")
    assert f"{found['learning_rate']:.3g}" in second
    assert "looking for" not in printed.err
    assert set(of_files(Path())) - set(before) == {"curve.png"}


@pytest.mark.long
def test_tune_searches_only_for_what_is_not_given(data, capsys):
    assert run(["tune", data, *SMALL, "--lr", "0.02", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"batch_size": 8, "batch_size_bound": "data"}
    Path("r.yaml").write_text(
        f"data: {{from_folders: {{train_folder: {data}, batch_size: 4}}}}\nmodel: {{learning_rate: 0.1}}\n"
    )
    assert run(["tune", "r.yaml", *SMALL, "--batch-size", "auto"]) == 0
    assert capsys.readouterr().out == "batch size 8: there are 12 training samples\n"


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tune", "data", "--lr", "0.1", "--batch-size", "4"], "--batch-size auto, or --lr auto"),
        (["tune", "data", "--lr", "0.1", "--picture", "a.png"], "--lr auto"),
        (["tune", "data", "--picture", "a.docx", *SMALL], "pictures end in"),
        (["tune", "data", "--picture", "missing/a.png", *SMALL], "no such folder"),
        (["tune", "data", "--lr", "aut"], "did you mean 'auto'"),
        (["tune", "data", "--batch-size", "0"], "must be at least 1"),
        (["tune", "data", "--output-dir", "a"], "it is an option of `flashtask finetune`"),
        (["tune", "nothing"], "nothing"),
        (["tune"], "no data to train on"),
        (["finetune", "data", "--set", "model.learning_rate=automatic"], "not a number"),
        (["finetune", "data", "--auto_lr_find", "True"], "--lr auto"),
        (["finetune", "data", "--auto-scale-batch-size", "power"], "--batch-size auto"),
        (["validate", "a.ckpt", "data", "--batch-size", "auto"], "not a whole number"),
    ],
)
def test_what_cannot_be_meant_is_answered_and_writes_nothing(data, capsys, argv, words):
    before = of_files(Path())
    assert run(argv) in (2, 66, 73)
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert of_files(Path()) == before
