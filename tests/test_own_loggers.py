"""Loggers as Lightning has them: places of their own, classes of a user's, values of evaluations, several processes."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from small import Net, colour_folders, loaders, net
from test_loggers import quiet, rows_of, scalars, stepping, wandb_history, wandb_records

from flashtask import Callback, CSVLogger, Logger, TensorBoardLogger, Trainer, WandbLogger
from flashtask.cli import run
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.by_name import named_form, recipe_of_part
from flashtask.trainer.loggers.logger_registry import LOGGERS, make_loggers
from flashtask.trainer.loggers.mlflow_logger import MLFlowLogger


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Nothing is written elsewhere, nothing is sent, nobody is logged in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class Lightnings:
    """A logger as people have it from Lightning; it derives from nothing of ours."""

    name, version = "mine", "7"

    def __init__(self):
        self.calls = []
        self.experiment = self.calls

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", dict(metrics), step))

    def log_hyperparams(self, params):
        self.calls.append(("hyperparams", dict(params)))

    def save(self):
        self.calls.append(("save",))

    def close(self):
        raise AssertionError("Lightning 1.6 calls this; it takes no error")

    def finalize(self, status):
        self.calls.append(("finalize", status))

    def steps_of(self, name):
        return [(step, values[name]) for kind, *rest in self.calls if kind == "metrics" for values, step in [rest]
                if name in values]  # fmt: skip


class Using(Net):
    """Uses its logger in every step."""

    def training_step(self, batch, batch_idx):
        self.logger.log_metrics({"own": torch.tensor(0.25)}, step=self.global_step)
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.logger.experiment.add_scalar("seen_in_test", batch_idx, batch_idx)


# ---- places


def test_a_csv_log_is_written_beside_that_of_the_run_folder(tmp_path):
    logger = CSVLogger("logs", name="cats", version=3)
    trainer = quiet(tmp_path / "run", logger)
    assert (logger.save_dir, logger.name, logger.version) == ("logs", "cats", 3)
    assert logger.log_dir == os.path.join("logs", "cats", "version_3")
    trainer.fit(stepping(), *loaders())
    assert trainer.logger is logger
    for file in ("metrics.csv", "steps.csv"):
        assert (Path(logger.log_dir) / file).read_text() == (tmp_path / "run" / file).read_text()
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == {"width": 8, "learning_rate": 0.01}


def test_without_a_version_a_run_that_is_continued_finds_its_log(tmp_path):
    def trained(epochs, **options):
        logger = CSVLogger("logs")
        quiet(tmp_path / "run", logger, max_epochs=epochs).fit(stepping(), *loaders(), **options)
        return logger

    trained(1)
    logger = trained(2, ckpt_path="last")
    assert (logger.log_dir, logger.version) == (os.path.join("logs", "run"), "run")
    assert [row["step"] for row in rows_of(Path("logs/run/metrics.csv"))] == ["7", "14"]
    assert Path("logs/run/steps.csv").read_text() == (tmp_path / "run" / "steps.csv").read_text()


def test_a_log_that_is_replaced_is_named(tmp_path):
    for name in ("a", "b"):
        trainer = quiet(tmp_path / name, CSVLogger("logs", version="same"), max_epochs=1)
        if name == "a":
            trainer.fit(net(), *loaders())
        else:
            with pytest.warns(UserWarning, match=r"earlier run in logs/same is replaced"):
                trainer.fit(net(), *loaders())
    assert len(rows_of(Path("logs/same/metrics.csv"))) == 1


def test_versions_count_up_where_a_logger_is_asked_before_a_fit():
    Path("logs/cats/version_4").mkdir(parents=True)
    for kind in (CSVLogger, TensorBoardLogger):
        logger = kind("logs", "cats")
        assert logger.log_dir == os.path.join("logs", "cats", "version_5")
        assert (logger.version, logger.root_dir) == (5, os.path.join("logs", "cats"))


def test_tensorboard_takes_the_arguments_of_lightning(tmp_path):
    logger = TensorBoardLogger(save_dir="logs", name="cats", version="first", sub_dir="part")
    quiet(tmp_path / "run", logger, max_epochs=1).fit(stepping(), *loaders())
    assert logger.log_dir == os.path.join("logs", "cats", "first", "part")
    assert scalars(logger.log_dir, "epoch") == [(7, 0)]
    assert TensorBoardLogger().log_dir is None


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: TensorBoardLogger("a", log_graph=True), "add_graph"),
        (lambda: TensorBoardLogger("a", prefix="x"), r'self\.log\("prefix/loss"'),
        (lambda: make_loggers(("csv", {"flush_logs_every_n_steps": 5})), r"Trainer\(flush_logs_every_n_steps"),
        (lambda: WandbLogger(prefix="x"), r'self\.log\("prefix/loss"'),
        (lambda: MLFlowLogger(save_dir="a"), "tracking_uri="),
    ],
)
def test_an_argument_of_lightning_that_is_not_here_names_what_to_write(make, fix):
    with pytest.raises(UnknownNameError, match=f"fix: .*{fix}"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CSVLogger(name="cats"), "without save_dir"),
        (lambda: TensorBoardLogger("a", save_dir="b"), "are the same"),
        (lambda: WandbLogger(log_model="all"), "log_model=True"),
        (lambda: WandbLogger(id="a", version="b"), "are the same"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_the_writer_is_there_before_and_after_a_fit(tmp_path):
    logger = TensorBoardLogger("logs", name="cats")
    logger.experiment.add_scalar("before", 1.0, 0)
    quiet(tmp_path / "run", logger, max_epochs=1).fit(stepping(), *loaders())
    logger.experiment.add_scalar("after", 2.0, 7)
    logger.log_metrics({"accuracy": torch.tensor(0.5)}, step=7)
    logger.finalize("success")
    folder = logger.log_dir
    assert folder == os.path.join("logs", "cats", "version_0")
    assert (scalars(folder, "before"), scalars(folder, "epoch")) == ([(0, 1.0)], [(7, 0)])
    assert (scalars(folder, "after"), scalars(folder, "accuracy")) == ([(7, 2.0)], [(7, 0.5)])


def test_after_a_fit_the_logs_of_the_run_folder_can_be_written_to(tmp_path):
    trainer = quiet(tmp_path / "run", ["csv", "tensorboard"], max_epochs=1)
    trainer.fit(stepping(), *loaders())
    before = (tmp_path / "run" / "metrics.csv").read_text()
    csv_log, tensorboard = trainer.loggers
    for logger in (csv_log, tensorboard):
        logger.log_metrics({"later": 0.5})
        logger.log_hyperparams(Namespace(extra=1))
        logger.finalize()
    assert (tmp_path / "run" / "metrics.csv").read_text() == before
    assert [(row["step"], row["later"]) for row in rows_of(tmp_path / "run" / "steps.csv")][-1] == ("7", "0.5")
    assert scalars(tmp_path / "run" / "tensorboard", "later") == [(7, 0.5)]
    assert scalars(tmp_path / "run" / "tensorboard", "epoch") == [(7, 0)]


def test_the_writer_is_there_while_a_fit_is_made_ready(tmp_path):
    class Early(Net):
        def setup(self, stage):
            self.logger.experiment.add_scalar("early", 1.0, 0)

    quiet(tmp_path / "run", "tensorboard", max_epochs=1).fit(Early(), *loaders())
    folder = tmp_path / "run" / "tensorboard"
    assert (scalars(folder, "early"), scalars(folder, "epoch")) == ([(0, 1.0)], [(7, 0)])


@pytest.mark.long
def test_a_wandb_run_goes_on_over_script_fit_and_test(tmp_path):
    logger = WandbLogger(offline=True, save_dir="files", log_model=True)
    assert (logger.save_dir, logger.version) == ("files", None)
    logger.experiment.config.update({"note": "first"})
    trainer = quiet(tmp_path / "run", logger, max_epochs=1)
    trainer.fit(stepping(), *loaders())
    trainer.test(dataloaders=loaders()[1])
    first, second = wandb_records(Path("files"))
    assert wandb_history(first, "val_loss")[0][0] == 7
    assert [step for step, _ in wandb_history(second, "test_loss")] == [7]
    assert {r["run"]["run_id"] for part in (first, second) for r in part if r["type"] == "run"} == {logger.version}
    assert "model-" + logger.version in str(first)
    assert "best.ckpt" in str([r for r in first if r["type"] != "run"])
    assert not Path("wandb.json").exists()


# ---- loggers of a user's


def test_a_logger_with_the_methods_of_lightning_works_as_it_is(tmp_path):
    logger = Lightnings()
    trainer = quiet(tmp_path / "run", [logger])
    assert (trainer.logger, trainer.loggers[1]) == (logger, logger)
    trainer.fit(stepping(), *loaders())
    assert logger.calls[0] == ("hyperparams", {"width": 8, "learning_rate": 0.01})
    assert [step for step, _ in logger.steps_of("step_loss")] == [2, 4, 6, 8, 10, 12, 14]
    assert [step for step, _ in logger.steps_of("val_loss")] == [7, 14]
    assert all("epoch" in values and "step" not in values for _, values, _ in logger.calls[1:2])
    assert ("save",) in logger.calls
    assert logger.calls[-1] == ("finalize", "success")
    trainer.validate(dataloaders=loaders()[1])
    trainer.test(dataloaders=loaders()[1])
    assert [step for step, _ in logger.steps_of("test_loss")] == [14]
    assert len(logger.steps_of("val_loss")) == 3
    assert logger.calls.count(("finalize", "success")) == 3


def test_a_logger_that_can_only_log_is_enough(tmp_path):
    class Least:
        def __init__(self):
            self.seen = []

        def log_metrics(self, metrics, step):
            self.seen.append(step)

    logger = Least()
    quiet(tmp_path / "run", logger).fit(stepping(), *loaders())
    assert logger.seen == [2, 4, 6, 7, 8, 10, 12, 14, 14]


def test_a_run_that_fails_tells_it(tmp_path):
    class Ending(Callback):
        def on_train_epoch_end(self, trainer, module):
            raise RuntimeError("the light went out")

    logger = Lightnings()
    with pytest.raises(RuntimeError, match="light"):
        quiet(tmp_path / "run", logger, Ending()).fit(net(), *loaders())
    assert logger.calls[-1] == ("finalize", "failed")


def test_subclasses_may_have_the_methods_of_lightning(tmp_path):
    class Kept(Logger):
        def __init__(self):
            self.seen, self.started = [], 0

        def start(self, folder, history, step):
            self.started += 1

        def log_metrics(self, metrics, step=None):
            self.seen.append((step, sorted(metrics)))

    class Renamed(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics({f"my/{name}": value for name, value in metrics.items()}, step)

    kept, renamed = Kept(), Renamed("logs", version="v")
    trainer = quiet(tmp_path / "run", [kept, renamed], max_epochs=1)
    trainer.fit(stepping(), *loaders())
    assert (kept.started, [step for step, _ in kept.seen]) == (1, [2, 4, 6, 7])
    assert [step for step, _ in scalars("logs/v", "my/val_loss")] == [7]
    assert scalars("logs/v", "val_loss") == []


def test_what_a_class_writes_for_the_engine_is_called_and_reached_from_a_module(tmp_path):
    class Steps(Logger):
        def __init__(self):
            self.seen = []

        def log_step(self, values, step, epoch):
            self.seen.append((step, values))

    logger = Steps()
    trainer = quiet(tmp_path / "run", logger, max_epochs=1, limit_train_batches=2, log_every_n_steps=50)
    module = Using()
    trainer.fit(module, *loaders())
    assert logger.seen == [(0, {"own": 0.25}), (1, {"own": 0.25})]


@pytest.mark.parametrize("given", [Lightnings, [Lightnings], {"csv": 3}, object()])
def test_what_cannot_log_is_refused(given):
    with pytest.raises(UsageError, match=r"takes no class: Lightnings|a Logger, a name"):
        make_loggers(given)


# ---- evaluations


def test_values_of_validate_and_test_reach_the_logs_of_the_fit(tmp_path):
    trainer = quiet(tmp_path / "run", ["csv", "tensorboard"])
    trainer.fit(stepping(), *loaders())
    kept = {file: (tmp_path / "run" / file).read_text() for file in ("metrics.csv", "steps.csv")}
    found = trainer.test(dataloaders=loaders()[1])[0]
    trainer.validate(dataloaders=loaders()[1])
    rows = rows_of(tmp_path / "run" / "evaluations.csv")
    assert [(row["stage"], row["step"]) for row in rows] == [("test", "14"), ("validate", "14")]
    assert float(rows[0]["test_loss"]) == pytest.approx(found["test_loss"], rel=1e-5)
    assert scalars(tmp_path / "run" / "tensorboard", "test_loss") == [(14, pytest.approx(found["test_loss"]))]
    assert len(scalars(tmp_path / "run" / "tensorboard", "val_loss")) == 3
    assert {file: (tmp_path / "run" / file).read_text() for file in kept} == kept


def test_a_test_in_the_middle_of_a_fit_does_not_close_its_logs(tmp_path):
    class Testing(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.test(module, loaders()[1])

    logger = Lightnings()
    quiet(tmp_path / "run", [logger, "tensorboard"], Testing()).fit(stepping(), *loaders())
    assert len(logger.steps_of("test_loss")) == 2
    assert [call for call in logger.calls if call[0] == "finalize"] == [("finalize", "success")]
    assert scalars(tmp_path / "run" / "tensorboard", "epoch") == [(7, 0), (14, 1)]
    assert len(scalars(tmp_path / "run" / "tensorboard", "test_loss")) == 2


def test_a_module_that_uses_its_logger_can_be_tested_without_a_fit():
    Trainer(logger="tensorboard", enable_progress_bar=False).test(Using(), loaders()[1])
    (folder,) = Path("runs").iterdir()
    assert len(scalars(folder / "tensorboard", "seen_in_test")) > 1
    assert len(scalars(folder / "tensorboard", "test_loss")) == 1


def test_an_evaluation_without_a_fit_makes_no_folder_for_values_alone():
    logger = Lightnings()
    Trainer(logger=["tensorboard", logger], enable_progress_bar=False).test(net(), loaders()[1])
    assert list(Path().iterdir()) == []
    assert [step for step, _ in logger.steps_of("test_loss")] == [0]
    csv_log = CSVLogger("logs", version="test")
    Trainer(logger=csv_log, enable_progress_bar=False).test(net(), loaders()[1])
    assert [path.name for path in Path("logs/test").iterdir()] == ["evaluations.csv"]


def test_a_test_elsewhere_leaves_the_log_of_a_fit_as_it_is(tmp_path):
    quiet(tmp_path / "run", CSVLogger("logs", version="same")).fit(stepping(), *loaders())
    kept = {file: Path("logs/same", file).read_text() for file in ("metrics.csv", "steps.csv")}
    Trainer(logger=CSVLogger("logs", version="same"), enable_progress_bar=False).test(net(), loaders()[1])
    assert {file: Path("logs/same", file).read_text() for file in kept} == kept
    assert rows_of(Path("logs/same/evaluations.csv"))[0]["stage"] == "test"


# ---- several processes


class Everywhere(Using):
    """Uses its logger in all processes, and its folder."""

    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("of_the_first", float(self.trainer.strategy.global_rank), self.global_step)
        assert os.path.join(self.logger.log_dir, "x") == os.path.join("logs", "run", "x")
        assert (self.logger.name, self.logger.version) == ("tensorboard", "run")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_rank", float(self.trainer.strategy.global_rank), on_step=True, sync_dist=True)


class InAFile:
    """Writes down which process has called it."""

    def __init__(self, path):
        self.path = path

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


@pytest.mark.long
def test_other_processes_have_a_stand_in_that_does_nothing(tmp_path):
    opened = TensorBoardLogger("logs", version="run")
    opened.experiment.add_scalar("before", 1.0, 0)
    opened.save()
    logger = [opened, InAFile(tmp_path / "calls")]
    trainer = quiet(tmp_path / "run", logger, max_epochs=1, devices=2, strategy="ddp_spawn", accelerator="cpu")
    trainer.fit(Everywhere(), *loaders())
    assert trainer.test(dataloaders=loaders()[1])[0]["test_loss"] > 0
    assert len(set((tmp_path / "calls").read_text().split())) == 1
    assert {value for _, value in scalars("logs/run", "of_the_first")} == {0.0}
    assert scalars("logs/run", "before") == [(0, 1.0)]
    assert {value for _, value in scalars("logs/run", "val_rank_step")} == {0.0}  # of the process that writes
    assert [value for _, value in scalars("logs/run", "val_rank_epoch")] == [pytest.approx(0.5, abs=0.1)]
    assert len(scalars("logs/run", "test_loss")) == 1
    opened.close()


# ---- by name


@pytest.mark.parametrize(
    "given",
    [
        [("csv", {"save_dir": "logs", "name": "cats"})],
        ("csv", {"save_dir": "logs", "name": "cats"}),
        ["csv", {"save_dir": "logs", "name": "cats"}],
        {"csv": {"save_dir": "logs", "name": "cats"}},
        [{"csv": {"save_dir": "logs", "name": "cats"}}],
        [CSVLogger("logs", "cats")],
    ],
)
def test_a_logger_with_options_is_given_in_every_form(given):
    first, second = make_loggers(given)
    assert (first.save_dir, second.save_dir, second.name) == (None, "logs", "cats")
    assert recipe_of_part(second, LOGGERS) == {"csv": {"save_dir": "logs", "name": "cats"}}
    if not isinstance(given, list) or not isinstance(given[0], CSVLogger):
        assert named_form(given, LOGGERS) == [{"csv": {"save_dir": "logs", "name": "cats"}}]


def test_options_of_wandb_itself_are_in_the_recipe():
    (_, logger) = make_loggers({"wandb": {"offline": True, "tags": ["small"], "log_model": True}})
    assert recipe_of_part(logger, LOGGERS) == {"wandb": {"offline": True, "log_model": True, "tags": ["small"]}}


DATA = {"backbone": "timm/test_resnet", "batch-size": "4", "val-split": "0.25", "num-workers": "0"}
TINY = ["--no-pretrained", *(f"--{name}={value}" for name, value in DATA.items()), "--quiet"]


@pytest.mark.long
def test_a_logger_with_options_is_given_by_command_and_by_recipe(tmp_path):
    colour_folders(tmp_path / "images", each=6)

    def finetune(source, run_name, *words):
        return run(["finetune", str(source), "--output-dir", str(tmp_path / run_name), *words])

    size = "--set=data.from_folders.preprocessing={input_size: [3, 32, 32]}"
    options = "{save_dir: logs, name: cats}"
    asked = [*TINY, size, "--epochs"]
    assert finetune("images", "first", *asked, "1", f"--set=trainer.logger={{csv: {options}}}") == 0
    recipe = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert recipe["trainer"]["logger"] == [{"csv": {"save_dir": "logs", "name": "cats"}}]
    recipe["trainer"]["logger"] = {"csv": {"save_dir": "logs", "name": "cats"}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert finetune("mine.yaml", "second", "--quiet") == 0
    assert Path("logs/cats/second/metrics.csv").read_text().startswith("epoch,step")
    for given in (f"[csv, {options}]", f"[{{csv: {options}}}]"):
        assert finetune("images", "first", *asked, "2", f"--set=trainer.logger={given}", "--resume") == 0
    assert [row["epoch"] for row in rows_of(Path("logs/cats/first/metrics.csv"))] == ["0", "1"]
