"""What `fit` and `finetune` give back: the epoch in the model, its metrics, the run folder; and that it is said."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from small import Net, colour_folders, loaders

from flashtask import (
    EarlyStopping,
    FitResult,
    ImageClassificationData,
    ImageClassifier,
    ModelCheckpoint,
    Trainer,
    read_checkpoint,
)
from flashtask.cli import run


class Scripted(Net):
    """Trains, and says what its validation loss is."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.values[self.current_epoch])
        self.log("beside", float(self.current_epoch), logger=False)


def quiet(folder, **options):
    settings = {"max_epochs": 4, "seed": 3, "num_sanity_val_steps": 0, "enable_progress_bar": False}
    return Trainer(output_dir=folder, **{**settings, **options})


@pytest.mark.long
def test_after_finetune_the_metrics_are_those_of_the_epoch_in_the_model(tmp_path):
    trainer, module = quiet(tmp_path / "run"), Scripted([3.0, 1.0, 2.0, 2.5])
    result = trainer.finetune(module, *loaders(), strategy="no_freeze")
    best = read_checkpoint(tmp_path / "run" / "best.ckpt")
    assert (result.epoch, result.is_best, result.num_epochs, result.stop_reason) == (1, True, 4, None)
    assert result.metrics == trainer.callback_metrics == best["metrics"]
    assert (result.metrics["val_loss"], result.metrics["beside"]) == (1.0, 1.0)
    assert result.run_folder == tmp_path / "run"
    assert result.checkpoint_path == tmp_path / "run" / "best.ckpt"
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in module.state_dict().items())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert result.metrics["train_loss"] == pytest.approx(float(rows[1]["train_loss"]), rel=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["epoch"] == 1
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert read_checkpoint(tmp_path / "saved.ckpt")["metrics"] == result.metrics


@pytest.mark.parametrize("how", ["fit", "restore_best=False"])
def test_where_nothing_is_put_back_they_are_those_of_the_last_epoch(tmp_path, how):
    trainer, module = quiet(tmp_path / "run"), Scripted([3.0, 1.0, 2.0, 2.5])
    if how == "fit":
        result = trainer.fit(module, *loaders())
    else:
        result = trainer.finetune(module, *loaders(), strategy="no_freeze", restore_best=False)
    assert (result.epoch, result.is_best, result.metrics["val_loss"]) == (3, False, 2.5)
    assert result.metrics == trainer.callback_metrics
    assert result.checkpoint_path == tmp_path / "run" / "last.ckpt"


def test_fit_with_a_strategy_gives_what_finetune_gives(tmp_path):
    result = quiet(tmp_path, max_epochs=2).fit(Scripted([1.0, 2.0]), *loaders(), strategy="freeze_unfreeze:1")
    assert (result.epoch, result.is_best) == (0, True)


def test_without_checkpoints_or_a_run_folder_the_result_says_so(tmp_path, capsys):
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    result = trainer.finetune(Scripted([1.0]), *loaders(), strategy="no_freeze")
    assert (result.epoch, result.is_best, result.run_folder, result.checkpoint_path) == (0, False, None, None)
    assert str(result) == "the model has epoch 0, the last of 1: val_loss 1.0000"
    assert capsys.readouterr().err.endswith(f"{result}\n")


def test_a_checkpoint_in_the_middle_of_an_epoch_brings_the_metrics_it_was_ranked_by(tmp_path):
    class Falling(Net):
        def training_step(self, batch, batch_idx):
            self.log("height", abs(self.global_step - 4.0), on_step=True, on_epoch=False)
            return super().training_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(monitor="height", mode="min", every_n_train_steps=1)
    trainer = quiet(tmp_path, max_epochs=2, callbacks=[checkpoint])
    result = trainer.finetune(Falling(), *loaders(), strategy="no_freeze")
    assert (result.epoch, result.metrics["height"]) == (0, 0.0)


def test_a_result_is_frozen_and_readable_and_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopping = EarlyStopping(patience=1)
    trainer = Trainer(max_epochs=9, callbacks=[stopping], enable_progress_bar=False, num_sanity_val_steps=0)
    result = trainer.finetune(Scripted([2.0, 1.0, 3.0]), *loaders(), strategy="no_freeze")
    told = "the model has epoch 1, the best of 3: val_loss 1.0000\nrun folder: runs/000"
    assert str(result) == told
    assert repr(result) == "FitResult(the model has epoch 1, the best of 3: val_loss 1.0000; run folder: runs/000)"
    assert result.stop_reason == "val_loss did not improve in 1 epochs; the best was 1"
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count(told) == 1
    assert isinstance(result, FitResult)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.epoch = 0
    trainer = Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(Scripted([2.0]), *loaders())
    assert "the model has" not in capsys.readouterr().err


@pytest.mark.long
def test_a_task_and_the_command_line_say_it_once_each(tmp_path, capsys):
    folders = colour_folders(tmp_path / "images")
    data = ImageClassificationData.from_folders(folders, val_split=0.25, batch_size=4)
    trainer = quiet(tmp_path / "a", max_epochs=2, callbacks=[ModelCheckpoint()])
    result = trainer.finetune(ImageClassifier("timm/test_resnet", pretrained=False), datamodule=data, strategy="freeze")
    (measured,) = trainer.validate(datamodule=data)
    assert {name: result.metrics[name] for name in measured} == pytest.approx(measured)
    assert capsys.readouterr().err.count("the model has epoch") == 1
    asked = ["finetune", str(folders), "--backbone", "timm/test_resnet", "--set", "model.pretrained=false"]
    assert run([*asked, "--epochs", "1", "--output-dir", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert "best epoch 0: val_loss" in shown.out
    assert "the model has" not in shown.out + shown.err


def test_a_value_that_was_measured_on_earlier_weights_is_not_of_those_in_the_model(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3, check_val_every_n_epoch=2)
    result = trainer.fit(Scripted([0.5, 0.4, 0.3]), *loaders())
    assert set(result.metrics) == {"train_loss"}
    assert "val_loss" not in str(result)
    assert set(read_checkpoint(tmp_path / "last.ckpt")["metrics"]) == {"train_loss"}
    assert set(read_checkpoint(tmp_path / "best.ckpt")["metrics"]) == {"train_loss", "val_loss", "beside"}
    assert trainer.callback_metrics["val_loss"] == 0.4
    again = quiet(tmp_path, max_epochs=3, check_val_every_n_epoch=2)
    assert again.fit(Scripted([0.5, 0.4, 0.3]), *loaders(), ckpt_path="last").metrics == result.metrics
