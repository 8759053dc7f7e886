"""The examples of the notes (docs/notes.md): logging, saving and loading, hyper-parameters."""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchmetrics as tm
from omegaconf import OmegaConf
from small import Net as WholeNet
from small import digest, loaders
from torch import nn
from torch.optim import Adam
from torchmetrics.functional import accuracy

import flashtask as pl
from flashtask import Callback, Logger, ModelCheckpoint, ProgressBar, Trainer, read_checkpoint


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write into the working folder."""
    monkeypatch.chdir(tmp_path)


class Base(pl.LightningModule):
    """What the examples leave out: a layer, and steps."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, inputs):
        return self.fc(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return self.loss_fn(self(inputs), targets)

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.1)


def rows_of(trainer, file="metrics.csv"):
    return list(csv.DictReader((trainer.output_dir / file).read_text().splitlines()))


class Noting(Logger):
    """What it is told."""

    def __init__(self):
        self.charts, self.steps, self.epochs = [], [], []

    def draw_together(self, chart):
        self.charts.append(chart)

    def log_step(self, values, step, epoch):
        self.steps.append((step, values))

    def log_epoch(self, row):
        self.epochs.append(row)


# ---- Logging


def test_s44_what_tensorboard_shows_is_below_the_working_folder():
    """`tensorboard --logdir=runs` finds it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(max_epochs=2)
    trainer.fit(WholeNet(), *loaders())
    (file,) = Path("runs").rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(file.parent)).Reload()
    assert "val_loss" in shown.Tags()["scalars"]
    assert [point.step for point in shown.Scalars("val_loss")] == [7, 14]


def test_s52_one_value_is_one_chart():
    class Net(Base):
        def validation_step(self, batch, batch_idx):
            metric_val = 0.5
            self.log("metric_name", metric_val)

    logger = Noting()
    trainer = Trainer(max_epochs=1, logger=logger)
    trainer.fit(Net(), *loaders())
    assert rows_of(trainer)[0]["metric_name"] == "0.5"
    assert (logger.charts, logger.epochs[0]["metric_name"]) == ([], 0.5)


def test_s48_s53_a_dictionary_is_one_chart_with_a_graph_for_each_key():
    class Net(Base):
        def validation_step(self, batch, batch_idx):
            e, lo = 0.25, 0.5
            self.log("cost_metrics", {"entropy": e, "loss": lo})

    logger = Noting()
    trainer = Trainer(max_epochs=1, logger=logger)
    trainer.fit(Net(), *loaders())
    assert set(logger.charts) == {"cost_metrics"}
    row = rows_of(trainer)[0]
    assert (row["cost_metrics/entropy"], row["cost_metrics/loss"]) == ("0.25", "0.5")


def test_s54_log_dict_is_a_chart_for_each_key():
    class Net(Base):
        def validation_step(self, batch, batch_idx):
            val1, val2 = 0.25, 0.5
            self.log_dict({"metric_one": val1, "metric_two": val2})

    logger = Noting()
    trainer = Trainer(max_epochs=1, logger=logger)
    trainer.fit(Net(), *loaders())
    assert logger.charts == []
    assert (rows_of(trainer)[0]["metric_one"], rows_of(trainer)[0]["metric_two"]) == ("0.25", "0.5")


def test_s55_s56_s58_a_metric_object_is_computed_and_reset_by_itself():
    expected = []

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.acc = tm.Accuracy(task="multiclass", num_classes=3)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            outputs = self(inputs)
            loss = self.loss_fn(outputs, targets)
            return {"loss": loss, "outputs": outputs, "targets": targets}

        def training_step_end(self, retvals):
            outputs, targets = retvals["outputs"], retvals["targets"]
            self.acc(outputs, targets)
            self.log("train_acc_step", self.acc)

        def training_epoch_end(self, outs):
            self.log("avg_train_acc", self.acc)
            # what the metric should say, from what was kept of the epoch
            outputs, targets = (torch.cat([out[key] for out in outs]) for key in ("outputs", "targets"))
            expected.append(accuracy(outputs, targets, task="multiclass", num_classes=3).item())

    logger = Noting()
    trainer = Trainer(max_epochs=3, logger=logger, log_every_n_steps=1)
    model = Net()
    trainer.fit(model, loaders(samples=50)[0])
    assert [row["avg_train_acc"] for row in logger.epochs] == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert len([values["train_acc_step"] for _, values in logger.steps]) == 21
    assert model.acc._update_count == 0


def test_s59_values_of_steps_are_logged_every_50_steps_or_as_often_as_told():
    class Net(Base):
        def training_step(self, batch, batch_idx):
            self.log("batch_idx", float(batch_idx))
            return super().training_step(batch, batch_idx)

    n, logged = 20, {}
    for name, options in (("by default", {}), ("every n", {"log_every_n_steps": n})):
        trainer = Trainer(max_epochs=1, **options)
        trainer.fit(Net(), loaders(samples=110, batch_size=1)[0])
        logged[name] = [int(row["step"]) for row in rows_of(trainer, "steps.csv")]
    assert logged == {"by default": [50, 100], "every n": [20, 40, 60, 80, 100]}


def test_s60_logs_are_flushed_every_n_steps():
    on_disk = []

    class Looking(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            file = trainer.output_dir / "steps.csv"
            on_disk.append(len(rows_of(trainer, "steps.csv")) if file.exists() else 0)

    class Net(Base):
        def training_step(self, batch, batch_idx):
            self.log("batch_idx", float(batch_idx))
            return super().training_step(batch, batch_idx)

    n = 3
    trainer = Trainer(log_every_n_steps=1, flush_logs_every_n_steps=n, max_epochs=1, callbacks=Looking())
    trainer.fit(Net(), loaders(samples=8, batch_size=1)[0])
    assert on_disk == [0, 0, 0, 3, 3, 3, 6, 6]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn_by(options, log, monkeypatch):
    """What a bar on a terminal drew in a fit whose steps log as told, and the trainer."""

    class Net(Base):
        def training_step(self, batch, batch_idx):
            log(self, 0.125)
            return super().training_step(batch, batch_idx)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **options)
    trainer.fit(Net(), loaders()[0])
    lines = [line for line in terminal.getvalue().replace("\r", "\n").split("\n") if "/7" in line]
    return lines, trainer


def test_s61_s62_the_bar_shows_the_loss_and_can_be_slowed_or_left_out(monkeypatch):
    lines, _ = drawn_by({}, lambda model, val: model.log("metric_name", val), monkeypatch)
    assert lines
    assert all("loss" in line and "metric_name" not in line for line in lines)
    lines, trainer = drawn_by({"progress_bar_refresh_rate": 5}, lambda model, val: None, monkeypatch)
    assert [one.refresh_rate for one in trainer.callbacks if isinstance(one, ProgressBar)] == [5]
    assert [line.split()[2] for line in lines] == ["5/7"]
    lines, _ = drawn_by({"progress_bar_refresh_rate": 0}, lambda model, val: None, monkeypatch)
    assert lines == []


def test_s63_a_value_with_prog_bar_is_on_the_bar_and_in_the_log(monkeypatch):
    lines, trainer = drawn_by({}, lambda model, val: model.log("metric_name", val, prog_bar=True), monkeypatch)
    assert "metric_name 0.125" in lines[0]
    assert rows_of(trainer, "steps.csv")[0]["metric_name"] == "0.125"


def test_s64_a_value_with_trainer_false_is_on_the_bar_alone(monkeypatch):
    lines, trainer = drawn_by(
        {}, lambda model, val: model.log("metric_name", val, prog_bar=True, trainer=False), monkeypatch
    )
    assert "metric_name 0.125" in lines[0]
    assert not (trainer.output_dir / "steps.csv").exists()


# ---- Saving


def test_s65_s66_a_checkpoint_is_written_by_itself_and_holds_all_the_notes_list():
    trainer = Trainer(max_epochs=2)
    trainer.fit(WholeNet(), *loaders())
    ckpt = read_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert (ckpt["epoch"], ckpt["global_step"]) == (1, 14)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "hyperparameters"} <= set(ckpt)
    assert len(ckpt["optimizer_states"]) == len(ckpt["lr_schedulers"]) == 1


class Improving(Base):
    """A validation loss that falls, except that one epoch is far better than the others."""

    def validation_step(self, batch, batch_idx):
        val_loss = 0.01 if self.current_epoch == 6 else 1 / (1 + self.current_epoch)
        self.log("val_loss", val_loss)


def test_s68_s69_s70_a_checkpoint_callback_of_ones_own(tmp_path, capsys):
    class Net(Base):
        def validation_step(self, batch, batch_idx):
            val_loss = 1 / (1 + self.current_epoch)
            self.log("val_loss", val_loss)

    ckpt_cb = ModelCheckpoint(
        monitor="val_loss",
        dirpath="my/path",
        filename="sample-mnist-{epoch:02d}-{val_loss:.2f}",
        every_n_epochs=5,
        mode="min",
    )
    trainer = Trainer(default_root_dir=tmp_path / "rootdir", callbacks=[ckpt_cb], max_epochs=10)
    trainer.fit(Net(), *loaders())
    print(f"Best checkpoint available at: {ckpt_cb.best_model_path}")
    best = tmp_path / "rootdir" / "my" / "path" / "sample-mnist-epoch=09-val_loss=0.10.ckpt"
    assert f"Best checkpoint available at: {best}" in capsys.readouterr().out
    assert read_checkpoint(best)["epoch"] == 9


def test_s71_every_n_epochs_leaves_the_best_of_the_epochs_that_are_looked_at():
    """The notes ask whether it disables the best: no, but epoch 6 is not among those that can be."""
    ckpt_cb = ModelCheckpoint(monitor="val_loss", every_n_epochs=5)
    Trainer(callbacks=[ckpt_cb], max_epochs=10).fit(Improving(), *loaders())
    assert read_checkpoint(ckpt_cb.best_model_path)["epoch"] == 9
    ckpt_cb = ModelCheckpoint(monitor="val_loss")
    Trainer(callbacks=[ckpt_cb], max_epochs=10).fit(Improving(), *loaders())
    assert read_checkpoint(ckpt_cb.best_model_path)["epoch"] == 6


def test_s72_checkpointing_can_be_switched_off():
    Trainer(checkpoint_callback=False, max_epochs=1).fit(WholeNet(), *loaders())
    assert list(Path().rglob("*.ckpt")) == []


def test_s74_a_checkpoint_holds_the_hyperparameters(capsys):
    trainer = Trainer(max_epochs=1)
    trainer.fit(WholeNet(width=6), *loaders())
    ckpt_path = trainer.checkpoint_callback.best_model_path
    ckpt = read_checkpoint(ckpt_path)
    print(ckpt["hyperparameters"])
    assert "{'width': 6, 'learning_rate': 0.01}" in capsys.readouterr().out


def test_s75_a_checkpoint_is_saved_by_hand():
    hparams = {"width": 6}
    trainer = Trainer(max_epochs=1)
    model = WholeNet(**hparams)
    trainer.fit(model, *loaders())
    trainer.save_checkpoint("example.ckpt")
    assert digest(WholeNet.load_from_checkpoint("example.ckpt")) == digest(model)


# ---- Loading


@pytest.fixture
def saved():
    """A checkpoint of two epochs, by a path that is relative to the working folder."""
    trainer = Trainer(max_epochs=2, seed=3)
    model = WholeNet()
    trainer.fit(model, *loaders())
    Path("some/path").mkdir(parents=True)
    trainer.save_checkpoint("some/path/checkpoint.ckpt")
    return model


def test_s76_a_fit_is_resumed_from_a_path_relative_to_the_working_folder(saved, tmp_path):
    model = WholeNet()
    # The notes think of the root folder of the trainer: it is not asked.
    trainer = Trainer(default_root_dir=tmp_path / "elsewhere", max_epochs=3, seed=3)
    trainer.fit(model, *loaders(), ckpt_path="some/path/checkpoint.ckpt")
    assert [row["epoch"] for row in trainer.fit_run.history] == [0, 1, 2]
    assert trainer.global_step == 21


def test_s77_a_module_is_loaded_by_hand(saved, tmp_path):
    inputs = torch.randn(3, 4)
    model = WholeNet.load_from_checkpoint(tmp_path / "some" / "path" / "checkpoint.ckpt")
    model.eval()
    preds = model(inputs)
    assert torch.equal(preds, saved.eval()(inputs))


def test_s78_tensors_are_mapped_to_another_device(saved):
    model = WholeNet.load_from_checkpoint("some/path/checkpoint.ckpt", map_location={"cuda:1": "cuda:0"})
    assert (model.device, digest(model)) == (torch.device("cpu"), digest(saved))


# ---- Hyperparameters


@pytest.mark.parametrize(
    "given",
    [OmegaConf.create({"learning_rate": 0.25}), {"learning_rate": 0.25}, Namespace(learning_rate=0.25)],
    ids=["OmegaConf", "dict", "Namespace"],
)
def test_s86_s87_hyperparameters_are_one_object_that_comes_back_with_the_module(given):
    class Net(Base):
        def __init__(self, hp: OmegaConf):
            super().__init__()
            self.save_hyperparameters(hp)
            self.given = hp

        def configure_optimizers(self):
            return Adam(self.parameters(), lr=self.hparams.learning_rate)

    trainer = Trainer(max_epochs=1)
    trainer.fit(Net(given), loaders()[0])
    assert trainer.fit_run.history[0]["learning_rate"] == 0.25
    trainer.save_checkpoint("checkpoint.ckpt")

    model = Net.load_from_checkpoint("checkpoint.ckpt")
    assert model.hparams.learning_rate == 0.25
    assert type(model.given) is type(given)
    assert model.given == given


def test_s86_a_data_module_has_hyperparameters_too():
    class Data(pl.LightningDataModule):
        def __init__(self, batch_size, shuffle=True):
            super().__init__()
            self.save_hyperparameters()

    assert dict(Data(8).hparams) == {"batch_size": 8, "shuffle": True}
