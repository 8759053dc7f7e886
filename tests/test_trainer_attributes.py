"""What a trainer tells of its runs, and what stages and callbacks answer."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small import Net, loaders, net, quiet

from flashtask import (
    Callback,
    DataModule,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    ScaledPrecision,
    Timer,
    Trainer,
    read_checkpoint,
)
from flashtask.trainer.lightning1.trainer_base import NOT_THERE

# ---- before, in and after runs


def test_a_trainer_that_has_run_nothing(tmp_path):
    trainer = quiet(tmp_path)
    assert trainer.log_dir == str(tmp_path)
    assert quiet(tmp_path, output_dir=tmp_path / "own").log_dir == str(tmp_path / "own")
    assert (trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size) == (0, 0, 0, 1)
    assert (trainer.num_devices, trainer.device_ids) == (1, [0])
    assert (trainer.strategy.strategy_name, trainer.is_global_zero) == ("single", True)
    assert not any((trainer.training, trainer.validating, trainer.testing, trainer.predicting, trainer.interrupted))
    assert (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics) == ({}, {}, {})
    assert (trainer.test_dataloaders, trainer.predict_dataloaders, trainer.num_val_batches) == ([], [], [])
    assert (trainer.ckpt_path, trainer.scaler, trainer.precision_plugin.name) == (None, None, "32")
    assert (trainer.early_stopping_callback, trainer.progress_bar_callback, trainer.is_last_batch) == (
        None,
        None,
        False,
    )
    assert (trainer.num_training_batches, trainer.estimated_stepping_batches) == (math.inf, math.inf)


class Looking(Callback):
    """Notes which of the stages a trainer says that it is in."""

    def __init__(self):
        self.stages, self.last = {}, []

    def look(self, name, trainer):
        words = ("training", "validating", "testing", "predicting", "sanity_checking", "evaluating")
        self.stages[name] = [word for word in words if getattr(trainer, word)]

    def on_sanity_check_start(self, trainer, module):
        self.look("fit", trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.look("train", trainer)
        self.last.append(trainer.is_last_batch)
        self.bar = trainer.progress_bar_metrics

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.look("sanity" if "train" not in self.stages else "validate", trainer)

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.look("test", trainer)
        self.loaders = trainer.test_dataloaders

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.look("predict", trainer)


class Shown(Net):
    def training_step(self, batch, batch_idx):
        self.log("shown", float(batch_idx), prog_bar=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])


def test_a_trainer_says_what_it_does(tmp_path):
    looking, stopping = Looking(), EarlyStopping()
    trainer = quiet(tmp_path, callbacks=[looking, stopping, ProgressBar()], limit_test_batches=1)
    train, val = loaders(24)
    trainer.fit(Shown(), train, val)
    assert (trainer.num_training_batches, trainer.num_val_batches, trainer.num_sanity_val_batches) == (3, [3], [2])
    assert trainer.estimated_stepping_batches == 3
    trainer.test(dataloaders=val, ckpt_path="best")
    assert (trainer.num_test_batches, trainer.ckpt_path) == ([1], Path(trainer.checkpoint_callback.best_model_path))
    assert looking.loaders == trainer.test_dataloaders
    trainer.predict(dataloaders=[val, val])
    assert (trainer.num_predict_batches, len(trainer.predict_dataloaders), trainer.ckpt_path) == ([3, 3], 2, None)
    assert looking.stages == {
        "fit": ["training"],
        "sanity": ["sanity_checking"],
        "train": ["training"],
        "validate": ["validating", "evaluating"],
        "test": ["testing", "evaluating"],
        "predict": ["predicting"],
    }
    assert looking.last == [False, False, True]
    assert looking.bar == {"shown": 2.0}
    assert trainer.early_stopping_callbacks == [stopping]
    assert isinstance(trainer.progress_bar_callback, ProgressBar)
    assert trainer.logged_metrics["val_loss"].item() == trainer.callback_metrics["val_loss"]


class LogsOnBothLevels(Net):
    """Logs its loss on steps and epochs, and something that loggers are not given."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("both", batch_idx, on_step=True, on_epoch=True)
        self.log("hidden", 1.0, logger=False, on_step=True)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test_value", 3.0)


class LookingAtLogged(Callback):
    def __init__(self):
        self.in_steps, self.after_validation = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.in_steps.append(dict(trainer.logged_metrics))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.after_validation.append(trainer.logged_metrics["val_loss"])


def test_logged_metrics_are_what_was_logged_last_on_steps_and_epochs(tmp_path):
    looking = LookingAtLogged()
    trainer = quiet(tmp_path, max_epochs=2, callbacks=looking, log_every_n_steps=100)
    train, val = loaders(24)
    trainer.fit(LogsOnBothLevels(), train, val)
    assert [seen["both_step"] for seen in looking.in_steps] == [0, 1, 2] * 2
    assert "both_epoch" not in looking.in_steps[2]
    assert [seen["both_epoch"] for seen in looking.in_steps[3:]] == [1.0] * 3
    logged = trainer.logged_metrics
    assert (logged["both_step"], logged["both_epoch"], logged["epoch"]) == (2, 1.0, 1)
    assert looking.after_validation[-1] == logged["val_loss"]
    assert "hidden" not in logged
    assert "both" not in logged
    trainer.test(dataloaders=val)
    assert trainer.logged_metrics["test_value"] == 3.0
    assert trainer.logged_metrics["both_step"] == 2


def test_a_scaler_is_found(tmp_path):
    precision = ScaledPrecision("cpu")
    assert quiet(tmp_path, precision=precision).scaler is precision.scaler


def test_a_fit_that_a_signal_ended_was_interrupted(tmp_path):
    class Stopped(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = quiet(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Stopped(), *loaders(24))
    assert trainer.interrupted
    trainer.fit(net(), *loaders(16))
    assert not trainer.interrupted


def test_what_is_not_there_names_what_to_do_instead(tmp_path):
    trainer = quiet(tmp_path)
    for name, instead in NOT_THERE.items():
        assert not hasattr(trainer, name)
        with pytest.raises(AttributeError) as error:
            getattr(trainer, name)
        assert str(error.value).endswith(f"{name!r}: {instead}")
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        trainer.fitt  # noqa: B018 - it raises


def test_print_prints_once(tmp_path, capsys):
    quiet(tmp_path).print("a", 1, end="!\n")
    assert capsys.readouterr().out == "a 1!\n"


# ---- stages


def test_a_test_prints_its_metrics_unless_told_otherwise(tmp_path, capsys):
    trainer, module, val = quiet(tmp_path), net(), loaders(16)[1]
    (found,) = trainer.test(module, val)
    shown = capsys.readouterr().err
    assert [line.split() for line in shown.splitlines()] == [
        ["test", "metric", "value"],
        ["test_loss", f"{found['test_loss']:.6g}"],
    ]
    trainer.test(module, val, verbose=False)
    trainer.validate(module, val)
    assert capsys.readouterr().err == ""
    trainer.validate(Shown(), [val, val], verbose=True)
    assert "loader 1" in capsys.readouterr().err


def test_a_learning_rate_is_found_by_the_name_of_its_attribute(tmp_path):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.speed = 1e-4

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.speed)

    module = Own()
    found = quiet(tmp_path, auto_lr_find="speed").tune(module, loaders(400)[0])
    assert module.speed == found.learning_rate.suggestion != 1e-4


def test_should_stop_ends_the_epoch_after_the_batch(tmp_path):
    class Stopping(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 2:
                self.trainer.should_stop = True

    for least, steps in ((None, 2), (2, 6)):
        trainer = quiet(tmp_path, max_epochs=5, min_epochs=least)
        trainer.fit(Stopping(), *loaders(24))
        assert trainer.global_step == steps
        assert "val_loss" in trainer.callback_metrics


# ---- callbacks


def test_the_monitor_of_rates_keeps_what_it_has_read(tmp_path):
    class Sgd(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    quiet(tmp_path, max_epochs=3, callbacks=monitor).fit(Sgd(), *loaders(16))
    assert monitor.lrs == {"lr-SGD": [0.1, 0.05, 0.025]}
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.0}
    assert monitor.last_weight_decay_values == {"lr-SGD-weight_decay": 0.0}


def test_two_checkpoints_without_names_lie_side_by_side_and_are_found_again(tmp_path):
    def callbacks():
        return [ModelCheckpoint(), ModelCheckpoint(monitor="train_loss"), EarlyStopping(patience=9)]

    first = callbacks()
    trainer = quiet(tmp_path, callbacks=first, output_dir=tmp_path / "run")
    trainer.fit(net(), *loaders(16))
    assert [Path(one.best_model_path).name for one in first[:2]] == ["best.ckpt", "best-2.ckpt"]
    assert [one.dirpath for one in first[:2]] == [str(tmp_path / "run")] * 2
    again = callbacks()
    resumed = quiet(tmp_path, callbacks=again, output_dir=tmp_path / "run", max_epochs=2)
    resumed.fit(net(), *loaders(16), ckpt_path="last")
    assert [one.best_model_path for one in again[:2]] == [one.best_model_path for one in first[:2]]
    assert again[2].best_score <= first[2].best_score
    other = quiet(tmp_path, callbacks=again)
    other.fit(net(), *loaders(16))
    assert again[0].dirpath == str(other.output_dir)  # of the run that began last


def test_a_folder_that_is_set_later_counts(tmp_path):
    checkpoint = ModelCheckpoint()
    assert checkpoint.dirpath is None
    checkpoint.dirpath = tmp_path / "later"
    quiet(tmp_path, callbacks=checkpoint).fit(net(), *loaders(16))
    assert checkpoint.best_model_path == str(tmp_path / "later" / "best.ckpt")


def test_a_state_key_may_be_a_class(tmp_path):
    class Keeping(Callback):
        count = 0

        @property
        def state_key(self):
            return type(self)

        def on_train_epoch_end(self, trainer, module):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    run = tmp_path / "run"
    quiet(tmp_path, callbacks=Keeping(), output_dir=run).fit(net(), *loaders(16))
    callback = Keeping()
    quiet(tmp_path, callbacks=callback, output_dir=run, max_epochs=2).fit(net(), *loaders(16), ckpt_path="last")
    assert callback.count == 2


@pytest.mark.parametrize("duration", [timedelta(0), "00:00:00:00", {"seconds": 0}])
def test_no_time_at_all_trains_nothing(tmp_path, duration):
    trainer = quiet(tmp_path, callbacks=Timer(duration))
    trainer.fit(net(), *loaders(16))
    assert trainer.global_step == 0


# ---- data modules


class Data(DataModule):
    def __init__(self, samples: int = 16, batch_size: int = 8, name: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.told = []

    def train_dataloader(self):
        return loaders(self.hparams.samples, self.hparams.batch_size)[0]

    def val_dataloader(self):
        return loaders(self.hparams.samples, self.hparams.batch_size)[1]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["of_data"] = 5

    def on_load_checkpoint(self, checkpoint):
        self.told.append(checkpoint["of_data"])


def test_a_data_module_has_hooks_and_hyper_parameters_in_checkpoints(tmp_path):
    trainer = quiet(tmp_path, output_dir=tmp_path / "run")
    trainer.fit(net(), datamodule=Data(samples=24))
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["of_data"] == 5
    loaded = Data.load_from_checkpoint(tmp_path / "run" / "last.ckpt", batch_size=4)
    assert (loaded.hparams.samples, loaded.hparams.batch_size, loaded.told) == (24, 4, [5])
    resumed = Data(samples=24)
    quiet(tmp_path, output_dir=tmp_path / "run", max_epochs=2).fit(net(), datamodule=resumed, ckpt_path="last")
    assert resumed.told == [5]
    assert json.dumps(resumed.hparams_initial) == '{"samples": 24, "batch_size": 8, "name": null}'


def test_a_data_module_is_made_from_the_command_line():
    parser = Data.add_argparse_args(argparse.ArgumentParser())
    parser = Trainer.add_argparse_args(parser)
    parser.add_argument("--other", default=1)
    given = parser.parse_args(["--samples", "40", "--name", "x", "--max_epochs", "3"])
    data = Data.from_argparse_args(given, batch_size=2)
    assert dict(data.hparams) == {"samples": 40, "batch_size": 2, "name": "x"}
    assert Trainer.from_argparse_args(given).max_epochs == 3


def test_an_argument_without_a_default_has_to_be_given():
    class Own(DataModule):
        def __init__(self, folder, size=3):
            super().__init__()
            self.folder, self.size = folder, size

    parser = Own.add_argparse_args(argparse.ArgumentParser())
    assert Own.from_argparse_args(parser.parse_args(["--folder", "images"])).folder == "images"
    with pytest.raises(TypeError, match="folder"):
        Own.from_argparse_args(parser.parse_args([]))
