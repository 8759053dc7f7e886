"""What a plan tells is what a run then does; and a plan leaves nothing behind."""

from __future__ import annotations

import copy
import csv
import json
import time

import pytest
import torch
from small import Net, colour_folders, digest, loaders, net
from test_phases import grouped

from flashtask import GradientAccumulationScheduler, Phase, Plateau, Trainer
from flashtask.cli import run as command
from flashtask.core.errors import UsageError
from flashtask.trainer.finetuning_plan import _MOST_MEASURED


def trainer(**options) -> Trainer:
    return Trainer(enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 4, "seed": 3, **options})


STRATEGIES = [
    "freeze",
    "no_freeze",
    "freeze_unfreeze:2",
    "unfreeze_milestones:1,3:1",
    "lp_ft:1",
    "gradual:1",
    "layer_decay:0.5",
    "bitfit",
    "norm_only",
    "lora:1",
    [Phase("head", epochs=1), Phase(["backbone.3.*"], epochs=1), Phase("biases", epochs=1)],
]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_steps_parameters_and_rates_are_those_of_the_run(tmp_path, strategy):
    """Per epoch, as metrics.csv has them; the rates are those of the first step of each phase."""
    planned = trainer().plan(grouped(), *loaders(), strategy=strategy, measure=False)
    seen = {}

    class Watching(type(grouped())):
        def on_before_optimizer_step(self, optimizer):
            seen.setdefault(self.current_epoch, {g["name"]: g["lr"] for g in optimizer.param_groups})

    torch.manual_seed(1)
    run = trainer(output_dir=tmp_path)
    run.finetune(Watching(), *loaders(), strategy=strategy)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(p.trainable, p) for p in planned.phases for _ in range(p.epochs)]
    assert [int(row["trainable_parameters"]) for row in rows] == [count for count, _ in expected]
    assert planned.steps == run.global_step == sum(phase.steps for phase in planned.phases)
    assert planned.epochs == len(rows)
    assert {phase.trainable + phase.frozen for phase in planned.phases} == {planned.parameters}
    for phase in planned.phases:
        if phase.epochs:
            assert {g.name: g.rate for g in phase.groups}.items() <= seen[phase.start].items()
            assert sum(group.parameters for group in phase.groups) == phase.trainable


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"accumulate_grad_batches": 2}, 16),
        ({"accumulate_grad_batches": {0: 1, 2: 4}}, 18),
        ({"callbacks": GradientAccumulationScheduler({0: 2, 3: 7})}, 13),
        ({"max_steps": 9}, 9),
        ({"limit_train_batches": 3}, 12),
        ({"max_epochs": 1}, 7),
        ({"max_epochs": -1, "max_steps": 17}, 17),
    ],
)
def test_steps_with_everything_that_changes_them(tmp_path, options, steps):
    if options.get("max_epochs") == -1:
        options = {**options, "max_epochs": None}
    planned = trainer(**options).plan(grouped(), *loaders(), strategy="freeze_unfreeze:2", measure=False)
    run = trainer(output_dir=tmp_path, **copy.deepcopy(options))
    run.finetune(grouped(), *loaders(), strategy="freeze_unfreeze:2")
    assert planned.steps == run.global_step == steps
    assert sum(phase.steps for phase in planned.phases) == steps
    assert planned.epochs == run.fit_run.history[-1]["epoch"] + 1


def test_what_depends_on_the_run_is_not_told():
    strategy = [Phase("head", epochs=1), Phase("biases", plateau=Plateau("val_loss")), Phase("all")]
    planned = trainer().plan(grouped(), *loaders(), strategy=strategy, measure=False)
    assert [(p.start, p.epochs, p.steps) for p in planned.phases] == [(0, 1, 7), (1, None, None), (None, None, None)]
    assert planned.phases[1].until == "val_loss has not improved for 2 epochs"
    assert planned.phases[2].groups[0].rate is None
    assert (planned.epochs, planned.steps) == (4, 28)


def test_nothing_changes_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = net()
    before, modes = digest(module), [part.training for part in module.modules()]
    state = torch.get_rng_state()
    for measure in (False, True):
        planned = trainer(callbacks=[], default_root_dir=tmp_path).plan(
            module, *loaders(), strategy="lora:1", measure=measure
        )
    assert planned.phases[0].groups == ()  # the module makes its optimizer by itself
    assert digest(module) == before
    assert [part.training for part in module.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.trainer is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_estimate_of_time_is_of_the_right_order(tmp_path):
    class Slow(type(grouped())):
        def training_step(self, batch, batch_idx):
            time.sleep(0.06 if self.backbone[0].weight.requires_grad else 0.01)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            time.sleep(0.01)
            super().validation_step(batch, batch_idx)

    planned = trainer(max_epochs=2).plan(Slow(), *loaders(), strategy="freeze_unfreeze:1")
    assert planned.phases[0].seconds < planned.phases[1].seconds
    began = time.perf_counter()
    trainer(max_epochs=2, output_dir=tmp_path, num_sanity_val_steps=0).finetune(
        Slow(), *loaders(), strategy="freeze_unfreeze:1"
    )
    spent = time.perf_counter() - began
    assert spent / 10 < planned.seconds < spent * 10
    assert all(phase.memory > 2**20 for phase in planned.phases)
    assert "measured on 4 optimizer steps" in planned.how


@pytest.mark.long
def test_of_many_phases_some_are_measured_and_the_others_take_the_next_wider_one():
    measured = []

    class Counting(Net):
        def on_fit_start(self):
            measured.append(sum(p.numel() for p in self.parameters() if p.requires_grad))

    strategy = [Phase("head", epochs=1) for _ in range(20)] + [Phase("all")]
    planned = trainer(max_epochs=30).plan(Counting(), *loaders(), strategy=strategy)
    assert len(planned.phases) == 21
    assert all(phase.seconds is not None for phase in planned.phases)
    assert len(measured) - 1 <= _MOST_MEASURED


@pytest.mark.long
def test_a_head_that_is_solved_has_one_pass_and_no_steps(folder):
    from flashtask import ImageClassificationData, ImageClassifier

    data = ImageClassificationData.from_folders(train_folder=folder, val_split=0.25, batch_size=4, num_workers=0)
    model = ImageClassifier("timm/test_vit", head="ridge", pretrained=False)
    planned = trainer().plan(model, datamodule=data, strategy="freeze")
    (phase,) = planned.phases
    assert (planned.epochs, planned.steps, phase.epochs, phase.steps, phase.batches) == (1, 0, 1, 0, 5)
    assert phase.trains == "head, solved in one pass"
    assert phase.seconds > 0
    assert model.head is None


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("images") / "colours", each=12)


OPTIONS = [
    "--backbone",
    "timm/test_vit",
    "--no-pretrained",
    "--batch-size",
    "4",
    "--epochs",
    "3",
    "--val-split",
    "0.25",
]


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy",
    [
        "lora:4",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("gradual:1", "freeze_unfreeze:1", "layer_decay:0.75", "freeze_unfreeze:7")
        ),
    ],
)
def test_the_command_prints_80_columns_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys, strategy):
    monkeypatch.chdir(tmp_path)
    assert command(["plan", str(folder), *OPTIONS, "--strategy", strategy]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert f"strategy {strategy}" in out
    assert "MiB" in out or "GiB" in out
    assert "estimated time of the run" in out
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_what_finetune_then_does(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{from_folders: {{train_folder: {folder}, val_split: 0.25, batch_size: 4}}}}\n"
        "model: {backbone: timm/test_vit, pretrained: false}\n"
        "trainer: {max_epochs: 3}\n"
        "finetune:\n"
        "  strategy:\n"
        "    phases:\n"
        "      - {train: head, epochs: 1}\n"
        "      - {train: {layers: 3}, learning_rates: {backbone: 1e-4}, until: {epoch: 2}}\n"
        "      - {train: all, learning_rates: {head: 1e-3, backbone: 1e-5}, layer_decay: 0.75}\n"
    )
    assert command(["plan", str(recipe), "--no-measure", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["seconds"] is None
    assert command(["finetune", str(recipe), "--output-dir", str(tmp_path / "run"), "--quiet"]) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trainable_parameters"]) for row in rows] == [phase["trainable"] for phase in planned["phases"]]
    assert int(rows[-1]["step"]) == planned["steps"]
    assert command(["plan", str(tmp_path / "run" / "recipe.yaml"), "--no-measure"]) == 0
    assert "memory and time were not measured" in capsys.readouterr().out


@pytest.mark.long
def test_by_default_a_task_has_ten_epochs_of_freeze_in_python_and_on_the_command_line(folder, capsys):
    from flashtask import ImageClassificationData, ImageClassifier

    data = ImageClassificationData.from_folders(train_folder=folder, val_split=0.25, batch_size=4, num_workers=0)
    model = ImageClassifier("timm/test_vit", pretrained=False)
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    planned = Trainer(**silent).plan(model, datamodule=data, measure=False)
    command(["plan", str(folder), *OPTIONS[:5], *OPTIONS[7:], "--no-measure", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (planned.strategy, planned.epochs) == (printed["strategy"], printed["epochs"]) == ("freeze", 10)
    by_steps = Trainer(**silent, max_steps=7).plan(model, datamodule=data, measure=False)
    command(["plan", str(folder), *OPTIONS[:5], *OPTIONS[7:], "--max-steps", "7", "--no-measure", "--json"])
    assert by_steps.steps == json.loads(capsys.readouterr().out)["steps"] == 7
    plain = Trainer(**silent).plan(net(), *loaders(), measure=False)
    assert (plain.strategy, plain.epochs) == ("no_freeze", 1000)


def test_a_run_takes_the_defaults_of_its_module(tmp_path):
    class Brief(Net):
        default_strategy, default_max_epochs = "freeze", 2

    run = Trainer(output_dir=tmp_path / "a", enable_progress_bar=False)
    assert run.max_epochs is None
    run.finetune(Brief(), train_dataloader=loaders()[0])
    assert (run.max_epochs, run.fit_run.epoch, run.fit_run.finetuning.name) == (2, 2, "freeze")
    Trainer(output_dir=tmp_path / "b", enable_progress_bar=False).fit(Brief(), *loaders())
    with (tmp_path / "b" / "metrics.csv").open() as file:
        assert {int(row["trainable_parameters"]) for row in csv.DictReader(file)} == {
            sum(parameter.numel() for parameter in Brief().parameters())
        }
    with pytest.raises(UsageError, match="train_dataloader and train_dataloaders are the same"):
        run.finetune(Brief(), loaders()[0], train_dataloader=loaders()[0])


def test_an_error_in_a_recipe_names_file_line_and_key(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{from_folders: {{train_folder: {folder}}}}}\n"
        "finetune:\n  strategy:\n    phases:\n      - {train: head, until: {plateau: {monitr: val_loss}}}\n"
    )
    assert command(["plan", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml, line 3" in error
    assert "phases[0].until.plateau: there is no key 'monitr'" in error
    assert "did you mean 'monitor'?" in error


def test_a_number_that_is_to_be_searched_for_is_refused(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{from_folders: {{train_folder: {folder}, batch_size: auto}}}}\n")
    assert command(["plan", str(recipe), *OPTIONS[:3]]) == 2
    assert "flashtask tune finds it" in capsys.readouterr().err
    assert command(["plan", str(folder), "--lr", "auto"]) == 2


@pytest.mark.long
def test_a_run_with_lora_resumes_predicts_and_refuses_another_strategy_by_command(folder, tmp_path, capsys):
    options = [*OPTIONS, "--output-dir", str(tmp_path / "run"), "--quiet", "--strategy", "lora:2"]
    assert command(["finetune", str(folder), *options]) == 0
    assert command(["finetune", str(folder), *options, "--resume"]) == 0
    image = str(next(folder.rglob("*.png")))
    capsys.readouterr()
    assert command(["predict", str(tmp_path / "run" / "best.ckpt"), image]) == 0
    assert image in capsys.readouterr().out
    options[-1] = "lora:3"
    assert command(["finetune", str(folder), *options, "--resume"]) == 2
    assert "finetune.strategy is 'lora:2' in the run, 'lora:3' now" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_that_begins_from_factors_trains_them_on_or_merges_them_and_says_so(folder, tmp_path, capsys):
    first = [*OPTIONS, "--quiet", "--strategy", "lora:2", "--epochs", "1", "--output-dir", str(tmp_path / "first")]
    assert command(["finetune", str(folder), *first]) == 0
    for strategy, merged in (("lora:2", False), ("lora:3", True), ("no_freeze", True)):
        options = ["--from", str(tmp_path / "first" / "best.ckpt"), "--epochs", "1", "--batch-size", "4", "--quiet"]
        capsys.readouterr()
        place = ["--output-dir", str(tmp_path / strategy.replace(":", "")), "--strategy", strategy]
        assert command(["finetune", str(folder), *options, *place]) == 0
        assert ("merged the LoRA factors" in capsys.readouterr().err) is merged


def test_a_strategy_that_cannot_be_meant_is_refused_before_anything_is_measured():
    with pytest.raises(UsageError, match="did you mean 'bitfit'"):
        trainer().plan(net(), *loaders(), strategy="bitfitt")


def test_features_that_the_cache_has_from_another_split_take_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    folder = str(colour_folders(tmp_path / "colours", each=16))
    words = [folder, "--backbone", "timm/test_resnet", "--no-pretrained", "--image-size", "32", "--val-split", "16"]
    assert command(["finetune", *words, "--epochs", "1", "--no-report", "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert command(["plan", *words, "--set", "data.from_folders.split_seed=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 0
