"""When a fit ends early, why, and what of it survives a resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small import Net, loaders, net

from flashtask import Module, Trainer, read_checkpoint
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.early_stopping import EarlyStopping


class Scripted(Module):
    """Logs the values it was given, one an epoch, and trains nothing to speak of."""

    def __init__(self, values, name="val_loss", where="validation"):
        super().__init__()
        self.values, self.name, self.where = values, name, where
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if self.where == "training":
            self.log(self.name, self.values[self.current_epoch], on_step=False, on_epoch=True)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.where == "validation":
            self.log(self.name, self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(tmp_path, module, stopping, *, ckpt_path=None, val=True, **options):
    settings = {
        "output_dir": tmp_path / "run",
        "max_epochs": 10,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(callbacks=[stopping], **{**settings, **options})
    trainer.fit(module, loaders()[0], loaders()[1] if val else None, ckpt_path=ckpt_path)
    return trainer


def epochs_of(trainer):
    return len(trainer.fit_run.history)


def test_s41_training_stops_after_three_bad_epochs(tmp_path, capsys):
    stopping = EarlyStopping(monitor="val_loss")
    trainer = fit(tmp_path, Scripted([1.0, 0.5, 0.6, 0.55, 0.51, 0.1, 0.1]), stopping)
    assert epochs_of(trainer) == 5
    assert (stopping.stopped_epoch, stopping.wait_count, stopping.best_score) == (4, 3, 0.5)
    assert stopping.stopping_reason == "patience"
    assert stopping.stopping_reason_message == "val_loss did not improve in 3 epochs; the best was 0.5"
    assert trainer.fit_run.stop_reason == stopping.stopping_reason_message
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == stopping.stopping_reason_message
    assert "epoch 4: stopping, val_loss did not improve" in capsys.readouterr().err


def test_s41_mode_max_takes_a_higher_value_as_better(tmp_path):
    values = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.1]
    stopping = EarlyStopping(monitor="val_acc", mode="max", patience=2)
    assert epochs_of(fit(tmp_path, Scripted(values, "val_acc"), stopping)) == 6
    assert stopping.best_score == 0.3


def test_s41_a_value_just_as_good_is_no_bad_epoch(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", patience=1)
    assert epochs_of(fit(tmp_path, Scripted([0.5] * 4), stopping, max_epochs=4)) == 4
    assert (stopping.stopped_epoch, stopping.stopping_reason) == (None, "")


def test_s41_min_delta_is_what_an_epoch_must_gain(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", min_delta=0.25, patience=2)
    assert epochs_of(fit(tmp_path, Scripted([1.0, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5]), stopping)) == 6
    assert stopping.best_score == 0.5


def test_s41_the_modules_own_monitor_brings_its_mode(tmp_path):
    class Own(Scripted):
        monitor, monitor_mode = "val_acc", "max"

    for number, stopping in enumerate((EarlyStopping(patience=1), EarlyStopping("val_acc", patience=1))):
        trainer = fit(tmp_path / str(number), Own([0.1, 0.2, 0.1, 0.3], "val_acc"), stopping)
        assert epochs_of(trainer) == 3


def test_s41_only_epochs_that_measure_the_metric_count(tmp_path):
    values = [1.0, 0.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]  # of these, epochs 1, 3, 5 and 7 are validated
    stopping = EarlyStopping(monitor="val_loss", patience=2)
    trainer = fit(tmp_path, Scripted(values), stopping, check_val_every_n_epoch=2)
    assert (epochs_of(trainer), stopping.wait_count, stopping.best_score) == (6, 2, 0.9)


@pytest.mark.parametrize(("check", "expected"), [(None, 3), (True, 3), (False, 6)])
def test_s41_a_training_metric_is_looked_at_each_epoch_unless_told_otherwise(tmp_path, check, expected):
    module = Scripted([float(epoch) for epoch in range(8)], "loss", "training")
    stopping = EarlyStopping(monitor="loss", patience=2, check_on_train_epoch_end=check)
    assert epochs_of(fit(tmp_path, module, stopping, check_val_every_n_epoch=2)) == expected


def test_s41_insisting_on_every_epoch_refuses_one_without_the_metric(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", check_on_train_epoch_end=True)
    with pytest.raises(UnknownNameError, match="no metric to monitor named 'val_loss'"):
        fit(tmp_path, Scripted([1.0] * 4), stopping, check_val_every_n_epoch=2)


def test_s41_a_mistyped_metric_is_an_error_that_names_the_right_one(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'val_loss'"):
        fit(tmp_path, Scripted([1.0]), EarlyStopping(monitor="val_los"))


def test_s41_strict_false_warns_and_trains_on(tmp_path):
    with pytest.warns(UserWarning, match="did you mean 'val_loss'"):
        trainer = fit(tmp_path, Scripted([1.0] * 2), EarlyStopping("val_los", mode="min", strict=False), max_epochs=2)
    assert epochs_of(trainer) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_s41_check_finite_ends_a_fit_whose_metric_is_lost(tmp_path, bad):
    stopping = EarlyStopping(monitor="val_loss")
    assert epochs_of(fit(tmp_path, Scripted([1.0, bad, 1.0]), stopping)) == 2
    assert (stopping.stopping_reason, stopping.best_score) == ("not_finite", 1.0)


def test_s41_without_check_finite_nan_is_a_bad_epoch_and_never_best(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", check_finite=False, patience=2)
    trainer = fit(tmp_path, Scripted([math.nan, 1.0, math.nan, 0.5, math.nan, math.nan, 0.1]), stopping)
    assert (epochs_of(trainer), stopping.best_score) == (6, 0.5)


def test_s41_thresholds_end_a_fit_at_once(tmp_path):
    good = EarlyStopping(monitor="val_acc", mode="max", stopping_threshold=0.9)
    assert epochs_of(fit(tmp_path / "a", Scripted([0.5, 0.9, 0.95], "val_acc"), good)) == 2
    assert (good.stopping_reason, good.best_score) == ("stopping_threshold", 0.9)
    bad = EarlyStopping(monitor="val_loss", divergence_threshold=5.0)
    assert epochs_of(fit(tmp_path / "b", Scripted([1.0, 5.0, 5.5, 1.0]), bad)) == 3
    assert bad.stopping_reason_message == "val_loss 5.5 is worse than 5"


def test_s41_verbose_says_how_it_stands(tmp_path, capsys):
    fit(tmp_path, Scripted([1.0, 2.0]), EarlyStopping("val_loss", verbose=True), max_epochs=2)
    said = capsys.readouterr().err
    assert "epoch 0: val_loss 1, the best so far" in said
    assert "epoch 1: val_loss 2, 1 of 3 bad epochs" in said


def test_s41_a_resumed_run_counts_on(tmp_path):
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    fit(tmp_path, Scripted(values), EarlyStopping("val_loss"), max_epochs=3)
    stored = read_checkpoint(tmp_path / "run" / "last.ckpt")["callbacks"]["EarlyStopping(val_loss)"]
    assert (stored["wait_count"], stored["best_score"]) == (2, 1.0)
    stopping = EarlyStopping("val_loss")
    trainer = fit(tmp_path, Scripted(values), stopping, ckpt_path=tmp_path / "run" / "last.ckpt")
    assert (epochs_of(trainer), stopping.stopped_epoch) == (4, 3)


@pytest.mark.long
def test_s41_a_stopped_run_stays_stopped_unless_it_gets_more_patience(tmp_path):
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    last = tmp_path / "run" / "last.ckpt"
    assert epochs_of(fit(tmp_path, Scripted(values), EarlyStopping("val_loss", patience=2))) == 3
    assert epochs_of(fit(tmp_path, Scripted(values), EarlyStopping("val_loss", patience=2), ckpt_path=last)) == 3
    patient = EarlyStopping("val_loss", patience=4)
    assert epochs_of(fit(tmp_path, Scripted(values), patient, ckpt_path=last)) == 5
    assert (patient.stopped_epoch, patient.wait_count) == (4, 4)


def test_s41_an_epoch_that_was_cut_short_is_looked_at_once(tmp_path):
    values = [1.0, 2.0, 2.0, 2.0]
    stopping = EarlyStopping("val_loss", patience=2)
    fit(tmp_path, Scripted(values), stopping, max_steps=10)  # 7 batches an epoch
    assert stopping.wait_count == 0
    trainer = fit(tmp_path, Scripted(values), stopping, ckpt_path=tmp_path / "run" / "last.ckpt")
    assert (epochs_of(trainer), stopping.wait_count) == (3, 2)


def test_s41_a_second_fit_begins_anew(tmp_path):
    stopping = EarlyStopping("val_loss", patience=1)
    assert epochs_of(fit(tmp_path / "a", Scripted([1.0, 2.0]), stopping)) == 2
    assert epochs_of(fit(tmp_path / "b", Scripted([9.0, 8.0, 9.0]), stopping)) == 3


@pytest.mark.parametrize("wrong", [{"mode": "auto"}, {"patience": -1}, {"patience": 1.5}, {"min_delta": -0.1}])
def test_s41_wrong_arguments_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        EarlyStopping("val_loss", **wrong)


def test_s42_minus_one_from_on_train_batch_start_ends_the_epoch(tmp_path):
    class Short(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    torch.manual_seed(0)
    trainer = fit(tmp_path, Short(), EarlyStopping("val_loss"), max_epochs=2)
    assert (trainer.global_step, epochs_of(trainer)) == (4, 2)


def test_s43_the_monitored_value_is_the_mean_over_all_samples_of_validation(tmp_path):
    class Uneven(Scripted):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(batch_idx))

    # 50 samples in batches of 8: six full ones and one of 2
    stopping = EarlyStopping("val_loss")
    trainer = fit(tmp_path, Uneven([]), stopping, max_epochs=1)
    mean = (8 * (0 + 1 + 2 + 3 + 4 + 5) + 2 * 6) / 50
    assert stopping.best_score == pytest.approx(mean, rel=1e-12)
    assert trainer.callback_metrics["val_loss"] == stopping.best_score


def test_s43_a_real_module_stops_on_its_validation_loss(tmp_path):
    stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = fit(tmp_path, net(), stopping)
    assert epochs_of(trainer) == 2
    assert stopping.best_score == trainer.fit_run.history[0]["val_loss"]


def test_s41_a_mistyped_metric_costs_no_epoch(tmp_path):
    with pytest.raises(UnknownNameError, match="no metric to monitor named 'val_los'"):
        fit(tmp_path, Scripted([1.0, 0.9, 0.8]), EarlyStopping("val_los", mode="min"), max_epochs=3)
    saved = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (0, 7)
    again = fit(
        tmp_path,
        Scripted([1.0, 0.9, 0.8]),
        EarlyStopping("val_loss"),
        max_epochs=3,
        ckpt_path=tmp_path / "run/last.ckpt",
    )
    assert (again.current_epoch, again.global_step) == (3, 21)
    stopping = EarlyStopping("val_los", mode="min")
    with pytest.raises(UnknownNameError):  # after the last epoch too
        fit(tmp_path, Scripted([1.0]), stopping, max_epochs=1, output_dir=tmp_path / "short")


@pytest.mark.parametrize(
    "wrong",
    [
        {"monitor": 3},
        {"min_delta": "a"},
        {"min_delta": math.nan},
        {"stopping_threshold": "0.1"},
        {"divergence_threshold": True},
    ],
)
def test_s41_invalid_values_are_refused_at_construction(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        EarlyStopping(**wrong)
