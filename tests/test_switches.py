"""All switches together: a run from the command line, its recipe, its repeat, its plan and its resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from small import colour_folders, quiet

import flashtask
from flashtask import EMAWeightAveraging, Trainer
from flashtask.cli import run as command_line

BASE = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet", "--epochs", "2", "--batch-size", "4"]
SWITCHES = [
    *("--image-size", "48", "--resize", "pad", "--augment", "rand_augment", "--flip", "both"),
    *("--random-erasing", "0.5", "--mixup-alpha", "0.2", "--cutmix-alpha", "1", "--loss", "focal:gamma=1"),
    *("--label-smoothing", "0.1", "--class-weights", "effective_number:beta=0.9", "--sampler", "balanced"),
    *(
        "--metrics",
        "f1_macro,f1_per_class",
        "--monitor",
        "val_f1_macro",
        "--optimizer",
        "lamb",
        "--weight-decay",
        "0.1",
    ),
    *("--drop-path-rate", "0.1", "--gradient-clip-val", "1", "--ema-decay", "0.5", "--strategy", "no_freeze"),
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        colour_folders(tmp_path / "data" / part, each=4)
    return tmp_path


def metrics(run):
    lines = Path(run, "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    kept = [i for i, name in enumerate(names) if "second" not in name]
    return [[line.split(",")[i] for i in kept] for line in lines]


def test_a_run_with_every_switch_repeats_itself_from_its_recipe_and_resumes(folders, capsys):
    assert command_line(["finetune", "data", *BASE, *SWITCHES, "--output-dir", "one"]) == 0
    recipe = yaml.safe_load(Path("one/recipe.yaml").read_text())
    assert "not_saved" not in recipe
    model, data = recipe["model"], recipe["data"]["from_folders"]
    assert (model["image_size"], model["loss_fn"], model["monitor"]) == (48, {"focal": {"gamma": 1.0}}, "val_f1_macro")
    assert (data["flip"], data["sampler"], data["random_erasing"]) == ("both", "balanced", 0.5)
    assert (recipe["trainer"]["ema_decay"], recipe["trainer"].get("callbacks")) == (0.5, None)
    assert command_line(["finetune", "one/recipe.yaml", "--output-dir", "two", "--quiet"]) == 0
    assert metrics("two") == metrics("one")
    assert "val_f1_macro" in metrics("one")[0]
    assert "val_f1_blue" in metrics("one")[0]
    # The same command, stopped after an epoch and continued.
    short = [*BASE[:-3], "1", *BASE[-2:]]
    assert command_line(["finetune", "data", *short, *SWITCHES, "--output-dir", "three"]) == 0
    assert command_line(["finetune", "data", *BASE, *SWITCHES, "--output-dir", "three", "--resume"]) == 0
    assert metrics("three")[0] == metrics("one")[0]
    other = [*SWITCHES, "--flip", "none"]
    assert command_line(["finetune", "data", *BASE, *other, "--output-dir", "three", "--resume", "--epochs", "3"]) == 2
    assert "flip is 'both' in the run, 'none' now" in capsys.readouterr().err


def test_the_plan_shows_the_switches_that_are_set(folders, capsys):
    assert command_line(["plan", "data", *BASE, *SWITCHES, "--no-measure"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("image_size=[48, 48]", "flip=both", "sampler=balanced", "ema_decay=0.5", "monitor=val_f1_macro"):
        assert part in shown
    assert (
        command_line(["plan", "data", *BASE, "--image-size", "48", "--mixup-alpha", "1", "--no-measure", "--json"]) == 0
    )
    planned = json.loads(capsys.readouterr().out)
    assert planned["switches"] == {"image_size": [48, 48], "mixup_alpha": 1.0}
    assert "mixup_alpha=1 mixes the images" in planned["features"]
    assert command_line(["plan", "data", *BASE, "--loss", "focal", "--class-weights", "balanced", "--no-measure"]) == 0
    assert "features of the frozen backbone are computed once" in capsys.readouterr().out


def test_ema_decay_is_the_callback_of_this_decay(tmp_path):
    trainer = Trainer(ema_decay=0.9)
    (callback,) = (one for one in trainer.callbacks if isinstance(one, EMAWeightAveraging))
    assert callback.decay == 0.9
    assert quiet(tmp_path).ema_callback is None
    with pytest.raises(flashtask.core.errors.UsageError, match="a number from 0 to below 1"):
        Trainer(ema_decay=1)
