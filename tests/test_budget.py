"""`budget`: a time in place of a strategy and a number of epochs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import yaml
from small import colour_folders

import flashtask.trainer.budget as budget_module
from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.trainer.budget import RULES, _seconds_of, seconds_of_budget
from flashtask.trainer.finetuning_plan import PhasePlan

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
MODEL = ["--backbone", "timm/test_resnet", "--no-pretrained", "--image-size", "32", "--batch-size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("budget") / "colours", each=6)


def phase(number, start, epochs, seconds, *, once=False):
    return PhasePlan(number, "", "", start, epochs, 1, 1, 1, 0, (), seconds=seconds, features_once=once)


def data_of(folder):
    return ImageClassificationData.from_folders(folder, val_split=0.25, batch_size=8)


def model():
    return ImageClassifier("timm/test_resnet", pretrained=False, image_size=32)


def test_the_time_of_the_first_epochs_of_a_plan():
    phases = (phase(0, 0, 2, 10.0, once=True), phase(1, 2, 18, 180.0))
    assert [_seconds_of(phases, epochs) for epochs in (1, 2, 3, 20)] == [10, 10, 20, 190]
    assert _seconds_of((phase(0, 0, 10, 100.0),), 4) == 40
    with pytest.raises(UsageError, match="cannot be estimated"):
        _seconds_of((phase(0, 0, None, None),), 4)


def test_budgets_are_lengths_of_time_or_best():
    assert [seconds_of_budget(budget) for budget in ("90s", {"hours": 1}, "best")] == [90, 3600, math.inf]
    for wrong in ("0s", "soon", 10):
        with pytest.raises(UsageError):
            seconds_of_budget(wrong)


def test_few_images_or_a_short_time_give_the_fastest_rule_and_one_without_limit_the_first(folder, monkeypatch):
    few, short = (
        Trainer(**QUIET).choose_within(budget, model(), datamodule=data_of(folder)) for budget in ("best", "0.01s")
    )
    for chosen in (few, short):
        assert (chosen.strategy.name, chosen.epochs) == (RULES[-1].strategy, RULES[-1].most)
    assert "budget has no room for more" in short.says
    assert "budget has no room for more" not in few.says
    monkeypatch.setattr(budget_module, "RULES", (replace(RULES[0], samples=8), RULES[1]))
    best = Trainer(**QUIET).choose_within("best", model(), datamodule=data_of(folder))
    assert (best.strategy.name, best.epochs) == (RULES[0].strategy, RULES[0].most)
    assert 0 < best.seconds < 600
    given = Trainer(**QUIET).choose_within("best", model(), datamodule=data_of(folder), strategy="bitfit")
    assert (given.strategy.name, given.epochs) == ("bitfit", 30)


@pytest.mark.parametrize("end", [{"max_epochs": 3}, {"max_steps": 3}, {"max_time": "10min"}])
def test_a_trainer_with_an_end_of_its_own_needs_no_budget(folder, end):
    with pytest.raises(UsageError, match=f"{next(iter(end))} says it too"):
        Trainer(**QUIET, **end).finetune(model(), datamodule=data_of(folder), budget="10min")


def test_several_processes_are_refused(folder):
    with pytest.raises(UsageError, match="in one process"):
        Trainer(**QUIET, devices=2).choose_within("10min", model(), datamodule=data_of(folder))


def test_a_run_holds_what_was_chosen_and_goes_on_with_it(folder, tmp_path, capsys):
    place = tmp_path / "run"
    command = ["finetune", str(folder), *MODEL, "--budget", "1s", "--output-dir", str(place), "--no-report"]
    assert run(command) == 0
    assert "freeze, 10 epochs" in capsys.readouterr().err
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    assert (recipe["finetune"]["strategy"], recipe["trainer"]["max_epochs"]) == ("freeze", 10)
    assert "budget" not in recipe["finetune"]
    assert json.loads((place / "summary.json").read_text())["epochs"] == 10
    assert run([*command, "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().err


def test_the_plan_shows_the_choice(folder, capsys):
    assert run(["plan", str(folder), *MODEL, "--budget", "1s", "--no-measure", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["epochs"] == 10
    assert planned["budget"].startswith("budget 1 s: freeze, 10 epochs")
    assert run(["plan", str(folder), *MODEL, "--budget", "soon"]) == 2
    assert "not a length of time" in capsys.readouterr().err
