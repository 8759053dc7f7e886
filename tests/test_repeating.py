"""A run is repeated by its recipe.yaml with the same bits, or the recipe says what it does not hold and is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from small import colour_folders
from torch import nn
from torchvision.transforms import v2

from flashtask import (
    CALLBACKS,
    TASKS,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ImageClassificationData,
    ImageClassifier,
    Logger,
    MixedPrecision,
    ModelCheckpoint,
    Phase,
    Precision,
    Preprocessing,
    TensorBoardLogger,
    Trainer,
    load,
    read_checkpoint,
    seed_everything,
)
from flashtask.cli import run
from flashtask.trainer.loop import Loops

SMALL = Preprocessing(input_size=(3, 24, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), crop_pct=0.75, decode="whole")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("images") / "train", each=8, size=40)


def from_python(images, folder, *, data=(), model=(), trainer=(), finetune=(), change=None, method="finetune"):
    """A short run of two epochs; `change` is given the data, the model and the trainer before it starts."""
    seed_everything(3, verbose=False)
    settings = {"val_split": 0.25, "batch_size": 4, "num_workers": 0, "preprocessing": {"input_size": [3, 32, 32]}}
    made = ImageClassificationData.from_folders(images, **{**settings, **dict(data)})
    options = {"backbone": "timm/test_resnet", "pretrained": False, "learning_rate": 0.01}
    module = ImageClassifier(**{**options, **dict(model)})
    quiet = {"max_epochs": 2, "precision": "32", "enable_progress_bar": False, "logger": "csv"}
    runner = Trainer(output_dir=folder, **{**quiet, **dict(trainer)})
    if change is not None:
        change(made, module, runner)
    if method == "fit":
        runner.fit(module, datamodule=made)
    else:
        runner.finetune(module, datamodule=made, **{"strategy": "no_freeze", **dict(finetune)})
    return runner


def numbers(folder: Path) -> tuple:
    """All that a repeat must have: losses and metrics as they are printed, and every bit of the best weights."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.endswith(("loss", "accuracy", "step", "epoch", "lr", "total"))]
    best = read_checkpoint(folder / "best.ckpt")
    weights = {name: value.numpy().tobytes() for name, value in best["state_dict"].items()}
    described = (best["epoch"], best["labels"], best["preprocessing"], best["precision"]["name"])
    return [[row[name] for name in names] for row in rows], weights, described


def recipe_in(folder: Path) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def set_on(owner: int, **attributes):
    """Attributes of the data (0), the model (1) or the trainer (2)."""

    def change(*owners):
        for name, value in attributes.items():
            setattr(owners[owner], name, value)

    return change


RUNS = {
    "as it is": {},
    "the preprocessing of the data": {"change": set_on(0, preprocessing=SMALL)},
    "a preprocessing given to the constructor": {"data": {"preprocessing": SMALL}},
    "the preprocessing of the model": {"data": {"preprocessing": None}, "change": set_on(1, preprocessing=SMALL)},
    "one channel": {
        "model": {"in_chans": 1},
        "data": {"preprocessing": {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.2]}},
    },
    "augment and split": {"data": {"augment": "strong", "split_seed": 5, "val_split": 5}},
    "batch size changed later": {"change": set_on(0, batch_size=3)},
    "head": {"model": {"head": "mlp", "head_options": {"hidden_sizes": [6]}}},
    "optimizer and schedule": {
        "model": {"optimizer": ("sgd", {"momentum": 0.5}), "lr_scheduler": ("steplr", {"step_size": 1})}
    },
    "their options": {
        "model": {"optimizer": "SGD", "optimizer_options": {"momentum": 0.5}, "lr_scheduler_options": {"warm_up": 0.5}}
    },
    "rates": {"model": {"backbone_learning_rate": 0.002}, "change": set_on(1, learning_rate=0.05)},
    "a rate that the other follows": {"change": set_on(1, learning_rate=0.05)},
    "labels in another order": {"model": {"labels": ["red", "blue"]}},
    "labels of the data in another order": {"change": lambda data, model, trainer: data.set_labels(["red", "blue"])},
    "clipping and accumulation": {"trainer": {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}},
    "accumulation by epoch": {
        "trainer": {
            "accumulate_grad_batches": {0: 1, 1: 3},
            "gradient_clip_val": 0.001,
            "gradient_clip_algorithm": "value",
        }
    },
    "settings changed later": {"change": set_on(2, gradient_clip_val=0.01, limit_train_batches=2)},
    "precision and memory format": {"trainer": {"precision": "bf16-mixed", "memory_format": "contiguous"}},
    "a precision as an object": {"trainer": {"precision": MixedPrecision("cpu")}},
    "a precision as a plugin": {"trainer": {"precision": None, "plugins": [MixedPrecision("cpu")]}},
    "limits": {"trainer": {"limit_train_batches": 0.5, "limit_val_batches": 1, "track_grad_norm": "inf"}},
    "steps and a time": {"trainer": {"max_epochs": None, "max_steps": 4, "max_time": {"hours": 1}}},
    "fewer validations": {"trainer": {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "feature_cache": False}},
    "a seed of its own": {"trainer": {"seed": 3, "deterministic": True}},
    "callbacks by name": {
        "trainer": {"callbacks": ["learning_rate_monitor", ("ema_weight_averaging", {"decay": 0.5})]}
    },
    "callbacks by name, all in one": {"trainer": {"callbacks": {"early_stopping": {"patience": 1, "min_delta": 9.0}}}},
    "callbacks as objects": {
        "trainer": {"callbacks": [GradientAccumulationScheduler({1: 2}), ModelCheckpoint(monitor="val_loss")]}
    },
    "one callback as an object": {
        "trainer": {"callbacks": EarlyStopping("val_loss", 9.0, patience=1), "max_epochs": 4}
    },
    "loggers by name": {"trainer": {"logger": ["csv", {"tensorboard": {}}], "log_every_n_steps": 1}},
    "a logger as an object, and a profiler": {"trainer": {"logger": TensorBoardLogger(), "profiler": "simple"}},
    "a strategy": {"finetune": {"strategy": ("freeze_unfreeze", 1), "restore_best": False}},
    "phases": {
        "finetune": {"strategy": [Phase("head", epochs=1), Phase("all", factors={"head": 0.5}, layer_decay=0.5)]}
    },
    "factors": {"finetune": {"strategy": ("lora", 2)}},
    "fit": {"method": "fit"},
}


#: At least one for each part of a recipe.
FEW = {
    *("the preprocessing of the model", "augment and split", "optimizer and schedule", "settings changed later"),
    *("precision and memory format", "callbacks as objects", "loggers by name", "phases", "fit"),
}
assert set(RUNS) > FEW


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in RUNS])
def test_a_run_from_python_is_repeated_by_its_recipe(name, images, tmp_path, capsys):
    from_python(images, tmp_path / "first", **RUNS[name])
    assert "cannot hold" not in capsys.readouterr().err
    assert (
        run(["finetune", str(tmp_path / "first" / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"])
        == 0
    )
    assert numbers(tmp_path / "again") == numbers(tmp_path / "first")
    assert recipe_in(tmp_path / "again") == recipe_in(tmp_path / "first")


DATA = {"backbone": "timm/test_resnet", "batch-size": "4", "val-split": "0.25", "num-workers": "0"}
TINY = ["--no-pretrained", *(f"--{name}={value}" for name, value in DATA.items())]
#: options, or values of `--set`
COMMANDS = {
    "options": ["--augment", "light", "--head", "mlp", "--optimizer", "sgd", "--seed", "5", "--precision", "bf16"],
    "callbacks": ["trainer.callbacks=early_stopping", "trainer.gradient_clip_val=0.5"],
    "callbacks with options": ["trainer.callbacks=[early_stopping, {timer: {duration: '00:01:00:00'}}]"],
    "loggers": ["trainer.logger={csv: {}}", "trainer.profiler=simple"],
    "a list of loggers": ["trainer.logger=[{tensorboard: {}}]"],
    "defaults": ["trainer.accumulate_grad_batches=1", "trainer.logger=true", "trainer.num_sanity_val_steps=2"],
    "lengths": ["trainer.max_time='00:01:00:00'", "model.num_classes=2", "trainer.accumulate_grad_batches={1: 2}"],
    "preprocessing": ["data.from_folders.preprocessing={input_size: [3, 24, 24], crop_pct: 1.0}"],
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("options", "loggers", "preprocessing") else pytest.mark.long)
        for name in COMMANDS
    ],
)
def test_a_command_is_repeated_by_its_recipe_and_continued_by_itself(name, images, tmp_path, capsys):
    size = [] if name == "preprocessing" else ["data.from_folders.preprocessing={input_size: [3, 32, 32]}"]
    values = [*size, *(value for value in COMMANDS[name] if "=" in value)]
    words = [word for word in COMMANDS[name] if "=" not in word] + [f"--set={value}" for value in values]
    asked = ["finetune", str(images), *TINY, *words]
    assert run([*asked, "--epochs", "2", "--output-dir", str(tmp_path / "whole"), "--quiet"]) == 0
    again = ["finetune", str(tmp_path / "whole" / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"]
    assert run(again) == 0
    assert numbers(tmp_path / "again") == numbers(tmp_path / "whole")
    restarted = [*asked, "--epochs", "2", "--output-dir", str(tmp_path / "whole"), "--quiet", "--resume"]
    assert run(restarted) == 0
    assert "nothing left to do" in capsys.readouterr().err
    recipe = recipe_in(tmp_path / "whole")
    assert run([*restarted, "--epochs", "3"]) == 0
    assert "resuming" in capsys.readouterr().err
    assert recipe_in(tmp_path / "whole") == {**recipe, "trainer": {**recipe["trainer"], "max_epochs": 3}}


def test_resume_still_refuses_other_callbacks_and_loggers(images, tmp_path, capsys):
    asked = ["finetune", str(images), *TINY]
    asked += ["--set", "data.from_folders.preprocessing={input_size: [3, 32, 32]}", "--output-dir", str(tmp_path / "R")]
    assert run([*asked, "--epochs", "1", "--set", "trainer.callbacks=early_stopping", "--quiet"]) == 0
    for other in (
        "trainer.callbacks={early_stopping: {patience: 4}}",
        "trainer.logger=tensorboard",
        "trainer.profiler=simple",
    ):
        assert run([*asked, "--epochs", "2", "--set", other, "--resume"]) == 2
        assert other.partition("=")[0] in capsys.readouterr().err


class Shout(Callback):
    pass


class OwnPrecision(Precision):
    pass


class OwnLoops(Loops):
    pass


class Smoothed(ImageClassifier):
    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


class Silent(Logger):
    pass


def smooth(data, model, trainer):
    model.loss = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


LOST = {
    "augment=<Compose>": {"data": {"transform": v2.Compose([v2.RandomHorizontalFlip()])}},
    "callbacks=<Shout>": {"trainer": {"callbacks": ["early_stopping", Shout()]}},
    "precision=<OwnPrecision>": {"trainer": {"precision": OwnPrecision()}},
    "loops=<your own>": {"change": set_on(2, loops=OwnLoops())},
    "head=<Linear>": {"model": {"head": nn.Linear(96, 2), "num_classes": 2}},
    "loss=<set on the object>": {"change": smooth},
    "monitor=<set on the object>": {"change": set_on(1, monitor="val_loss", monitor_mode="min")},
    "weights=<random, not drawn right after seed_everything(4)>": {"trainer": {"seed": 4}},
    "weights=<loaded from a file>": {"change": lambda data, model, trainer: model.load_state_dict(model.state_dict())},
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the hyper-parameter head:UserWarning")
@pytest.mark.parametrize("named", LOST)
def test_what_a_recipe_cannot_hold_is_said_at_the_start_and_a_repeat_is_refused(named, images, tmp_path, capsys):
    from_python(
        images, tmp_path / "run", **{**LOST[named], "trainer": {**LOST[named].get("trainer", {}), "max_epochs": 1}}
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipe.yaml")]
    assert line.startswith("recipe.yaml cannot hold ")
    assert named in line
    assert line.endswith("from Python")
    recipe = tmp_path / "run" / "recipe.yaml"
    assert run(["finetune", str(recipe), "--output-dir", str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert named.partition("=")[2] in error
    assert "recipe.yaml, line " in error
    assert "`not_saved`" in error
    assert not (tmp_path / "again").exists()
    kept = yaml.safe_load(recipe.read_text())
    del kept["not_saved"]
    recipe.write_text(yaml.safe_dump(kept))  # as the error says
    if "head" not in named:
        assert run(["finetune", str(recipe), "--output-dir", str(tmp_path / "again"), "--epochs", "1", "--quiet"]) == 0


def test_a_class_of_its_own_is_never_written_under_the_name_of_its_parent(images, tmp_path, capsys):
    seed_everything(3, verbose=False)
    data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0)
    for number, name in enumerate((None, "smoothed")):
        if name is not None:
            TASKS.register(name, Smoothed)
        try:
            trainer = Trainer(output_dir=tmp_path / str(number), max_steps=1, enable_progress_bar=False, logger=False)
            trainer.finetune(Smoothed("timm/test_resnet", pretrained=False), datamodule=data, strategy="freeze")
        finally:
            if name is not None:
                TASKS.remove(name)
    first, second = recipe_in(tmp_path / "0"), recipe_in(tmp_path / "1")
    assert first["not_saved"]["task"] == "<Smoothed>"
    assert "task" not in first
    assert second["task"] == "smoothed"
    assert "task" not in second.get("not_saved", {})
    assert "task=<Smoothed>" in capsys.readouterr().err
    assert run(["finetune", "--resume", "--output-dir", str(tmp_path / "0"), "--set", "trainer.max_steps=2"]) == 2
    assert "does not hold everything (task: <Smoothed>)" in capsys.readouterr().err


def test_data_of_ones_own_is_named_too(images, tmp_path, capsys):
    class OwnData(ImageClassificationData):
        pass

    seed_everything(3, verbose=False)
    data = OwnData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0)
    for given, named in ((data, "OwnData"), (None, "GivenLoaders")):
        loaders = {"datamodule": given}
        if given is None:
            data.setup("fit")
            loaders = {"train_dataloader": data.train_dataloader()}
        seed_everything(3, verbose=False)
        model = ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False)
        Trainer(output_dir=tmp_path / named, max_steps=1, enable_progress_bar=False).finetune(model, **loaders)
        assert f"recipe.yaml cannot hold data=<{named}>: a repeat needs it from Python" in capsys.readouterr().err
        assert recipe_in(tmp_path / named)["not_saved"] == {"data": f"<{named}>"}


@pytest.mark.long
def test_a_logger_of_ones_own_is_named_and_the_repeat_goes_without(images, tmp_path, capsys):
    from_python(images, tmp_path / "first", trainer={"logger": ["tensorboard", Silent()]})
    assert "recipe.yaml cannot hold logger=<Silent>: a repeat goes without" in capsys.readouterr().err
    again = ["finetune", str(tmp_path / "first" / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"]
    assert run(again) == 0
    assert "running without <Silent>, which the recipe cannot hold (trainer.logger)" in capsys.readouterr().err
    assert numbers(tmp_path / "again") == numbers(tmp_path / "first")


@pytest.mark.long
def test_a_second_fit_of_one_model_says_that_its_weights_are_those_of_the_first(images, tmp_path, capsys):
    trainer = from_python(images, tmp_path / "first", trainer={"max_epochs": 1})
    model, data = trainer.fit_run.module, trainer.fit_run.data
    capsys.readouterr()
    second = Trainer(output_dir=tmp_path / "second", max_epochs=1, enable_progress_bar=False)
    second.finetune(model, datamodule=data, strategy="no_freeze")
    assert "weights=<trained before this run>" in capsys.readouterr().err
    # A model that was read from a file begins where the recipe says.
    loaded = load(tmp_path / "first" / "best.ckpt")
    third = Trainer(output_dir=tmp_path / "third", max_epochs=1, precision="32", enable_progress_bar=False)
    third.finetune(loaded, datamodule=data, strategy="no_freeze")
    assert "cannot hold" not in capsys.readouterr().err
    assert (
        run(["finetune", str(tmp_path / "third" / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"])
        == 0
    )
    assert numbers(tmp_path / "again") == numbers(tmp_path / "third")


def test_a_resumed_run_keeps_what_its_recipe_does_not_hold_of_the_weights(images, tmp_path, capsys):
    from_python(images, tmp_path / "run", trainer={"max_epochs": 1, "seed": 4})
    lost = recipe_in(tmp_path / "run")["not_saved"]
    assert list(lost) == ["model.weights"]
    # The checkpoint holds them, so the command line may go on.
    assert run(["finetune", "--resume", "--output-dir", str(tmp_path / "run"), "--epochs", "2", "--quiet"]) == 0
    assert recipe_in(tmp_path / "run")["not_saved"] == lost


def test_arguments_of_callbacks_are_kept_however_they_were_given():
    from flashtask.trainer.by_name import recipe_of_part

    stopping = EarlyStopping("val_loss", 0.5, patience=3)
    assert recipe_of_part(stopping, CALLBACKS) == {"early_stopping": {"monitor": "val_loss", "min_delta": 0.5}}
    stopping.patience = 7
    assert recipe_of_part(stopping, CALLBACKS)["early_stopping"]["patience"] == 7
    assert recipe_of_part(EMAWeightAveraging(0.5), CALLBACKS) == {"ema_weight_averaging": {"decay": 0.5}}
    assert recipe_of_part(Shout(), CALLBACKS) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{input_size: [3, a, 32]}", "input_size must be"),
        ("{inptu_size: [3, 32, 32]}", "inptu_size"),
        ("32", "must be a mapping of its fields"),
        ("{input_size: [3, 32, 32], crop_pct: 2}", "crop_pct must be above 0"),
    ],
)
def test_a_preprocessing_that_cannot_be_is_refused(value, words, images, tmp_path, capsys):
    asked = ["finetune", str(images), *TINY, "--output-dir", str(tmp_path / "R")]
    assert run([*asked, "--set", f"data.from_folders.preprocessing={value}"]) == 2
    assert words in capsys.readouterr().err


def test_a_registered_class_may_set_in_its_constructor_what_its_parents_have(images, tmp_path, capsys):
    @TASKS.register("by_loss")
    class ByLoss(ImageClassifier):
        wanted = None

        def __init__(self, **options):
            super().__init__(**options)
            self.save_hyperparameters()
            self.monitor, self.monitor_mode, self.wanted = "val_loss", "min", 3

    try:
        seed_everything(3, verbose=False)
        data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0)
        trainer = Trainer(output_dir=tmp_path / "run", max_steps=1, enable_progress_bar=False)
        trainer.finetune(ByLoss(backbone="timm/test_resnet", pretrained=False), datamodule=data, strategy="freeze")
        assert "cannot hold" not in capsys.readouterr().err
        again = ["finetune", str(tmp_path / "run" / "recipe.yaml"), "--output-dir", str(tmp_path / "again"), "--quiet"]
        assert run(again) == 0
        assert recipe_in(tmp_path / "again") == recipe_in(tmp_path / "run")
    finally:
        TASKS.remove("by_loss")
