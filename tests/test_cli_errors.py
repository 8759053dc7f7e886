"""How the command line fails: exit codes, no needless torch, closed pipes, narrow and plain terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashtask.backbones import BACKBONES
from flashtask.cli import run
from flashtask.cli.flags import as_flags

COMMANDS = ["finetune", "tune", "predict", "validate", "test", "zoo"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def class_folders(tmp_path):
    from PIL import Image

    for name, colour in (("cat", "red"), ("dog", "blue")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    return tmp_path / "data"


def flashtask(*argv: str, python: str = "", shell: str = "", **environment: str) -> Any:
    """`python -m flashtask` in a process of its own; `shell` goes after the command (`| head -1`)."""
    command = " ".join([sys.executable, python, "-m", "flashtask", *argv])
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {shell}"], capture_output=True, text=True, env=env
    )


def test_help_and_wrong_options_answer_without_torch(tmp_path):
    for argv, code in (
        (["--help"], 0),
        (["--version"], 0),
        (["finetune", "d", "--epoch", "1"], 2),
        (["zoo", "heads"], 0),
    ):
        done = flashtask(*argv, python="-X importtime")
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert done.returncode == code
        assert "flashtask.cli" in imported
        assert not imported & {"torch", "timm", "torchvision", "numpy"}


def test_a_mistyped_backbone_answers_without_torch(class_folders):
    done = flashtask("finetune", str(class_folders), "--backbone", "resnt18", python="-X importtime")
    assert done.returncode == 2
    assert "did you mean 'resnet18'" in done.stderr
    assert "| torch\n" not in done.stderr


def test_j_a_closed_pipe_ends_quietly():
    done = flashtask("zoo", shell="| head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_a_full_disk_is_told_once():
    done = flashtask("zoo", shell="> /dev/full")
    assert done.returncode == 74
    assert done.stderr.startswith("error: a write failed: No space left")
    assert len(done.stderr.splitlines()) == 2


def test_j_plain_ascii_in_the_c_locale_and_narrow_terminals():
    done = flashtask("finetune", "--help", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0", COLUMNS="20")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    wrong = flashtask("h\u00e4user", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", COLUMNS="20")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", [80, 20])
def test_j_help_of_every_command(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: flashtask")
    assert "--debug" in text
    if columns == 80:
        assert max(map(len, text.splitlines())) <= 80


def test_without_arguments_the_help_is_shown(capsys):
    assert run([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RuntimeError("the moon is full"), 70, "RuntimeError: the moon is full"),
        (MemoryError(), 81, "--batch-size 8"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 81, "out of memory"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 71, "--num-workers 0"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_codes_of_what_nobody_expects(raised, code, words, class_folders, tmp_path, capsys):
    def broken(pretrained, in_chans):
        raise raised

    BACKBONES.register("cli_broken", broken, override=True)
    argv = ["finetune", str(class_folders), "--backbone", "cli_broken", "--output-dir", str(tmp_path / "run")]
    try:
        assert run(argv) == code
        plain = capsys.readouterr().err
        assert run([*argv, "--debug"]) == code
        with_debug = capsys.readouterr().err
    finally:
        BACKBONES.remove("cli_broken")
    assert words in plain
    assert "Traceback" not in plain
    assert "Traceback" in with_debug
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fix", "argv", "typed"),
    [
        ('leave them out with on_bad_image="skip"', "finetune d", "leave them out with --on-bad-image skip"),
        ("pretrained=False", "finetune d --debug", "--no-pretrained"),
        ("pretrained=True", "finetune d", "pretrained=True"),
        ("val_split=0.2 instead of val_folder", "finetune d", "--val-split 0.2 instead of val_folder"),
        ("pass gradient_clip_val=1.0", "finetune d", "pass --gradient-clip-val 1.0"),
        ("pass accumulate_grad_batches=2", "finetune d", "pass --set trainer.accumulate_grad_batches=2"),
        ("pass gradient_clip_val=1.0", "validate c d", "pass gradient_clip_val=1.0"),
        ("batch_size=4, or num_workers=0", "predict c d", "--batch-size 4, or --num-workers 0"),
        ("Task(pretrained=False, num_workers=0)", "finetune d", "Task(pretrained=False, num_workers=0)"),
        ("num_workers=0", "--debug", "num_workers=0"),
        ("--set trainer.seed=1", "finetune d", "--set trainer.seed=1"),
    ],
)
def test_a_fix_in_python_is_shown_as_it_is_typed(fix, argv, typed):
    assert as_flags(fix, argv.split()) == typed


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "loop/run"])
def test_b7_output_that_cannot_be_made_is_refused_before_anything(place, class_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    assert run(["finetune", str(class_folders), "--output-dir", place]) == 73
    error = capsys.readouterr().err
    assert error.startswith("error: cannot create output in")
    assert "why:" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file", "loop"]
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["finetune", "dat"], 66, 'did you mean DATA="{0}/data"'),
        (["finetune", "data/cats"], 66, 'did you mean DATA="{0}/data/cat"'),
        (["finetune", "recipe.yml"], 66, "recipe.yaml"),
        (["finetune", "--config", "recipe.yml"], 66, "recipe.yaml"),
        (["finetune", "recipe.yaml", "--config", "recipe.yaml"], 2, "two recipes"),
        (["predict", "bst.ckpt", "data"], 66, "best.ckpt"),
        (["predict", "best.ckpt", "dta/cat"], 66, "data/cat"),
        (["predict", "best.ckpt", "empty"], 65, "no images"),
        (["predict", "best.ckpt", "data", "--output", "nowhere/p.csv"], 73, "mkdir -p nowhere"),
        (["predict", "best.ckpt", "data", "--output", "data"], 73, "is a folder"),
        (["predict", "best.ckpt", "data"], 76, "best.ckpt"),
        (["validate", "best.ckpt", "dota"], 66, "data"),
        (["test", "", "data"], 2, "MODEL is empty"),
    ],
)
def test_inputs_that_are_not_there(argv, code, words, class_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("best.ckpt").write_text("no checkpoint at all")
    Path("recipe.yaml").write_text("task: image_classification\n")
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(argv) == code
    printed = capsys.readouterr()
    assert words.format(tmp_path) in printed.err
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before
