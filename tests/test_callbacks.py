"""The callbacks beside checkpoints and early stopping: what they log, say, write and change."""

from __future__ import annotations

import csv
import os
import pty
import sys
import time
from datetime import timedelta

import pytest
import torch
from small import Net, loaders, net

from flashtask import Callback, Trainer, read_checkpoint
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.accumulation import GradientAccumulationScheduler
from flashtask.trainer.callbacks.callback import LambdaCallback
from flashtask.trainer.callbacks.model_summary import ModelSummary, layers_of
from flashtask.trainer.callbacks.monitors import DeviceStatsMonitor, LearningRateMonitor
from flashtask.trainer.callbacks.prediction_writer import BasePredictionWriter
from flashtask.trainer.callbacks.timing import Timer, read_duration


def quiet(tmp_path, *callbacks, **options):
    settings = {
        "output_dir": tmp_path / "run",
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return [float(row[name]) for row in rows_of(path) if row.get(name)]


# ---- learning rates


class Scheduled(Net):
    """A module whose optimizers are made outside."""

    def training_step(self, batch, batch_idx, optimizer_idx=0):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self)


def scheduled(make, kind=Scheduled):
    module = kind()
    module.make = make
    return module


def halving(module, interval, name=None, kind=torch.optim.Adam):
    optimizer = kind(module.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval, "name": name}}


def test_s40_learning_rate_monitor_logs_a_row_an_epoch(tmp_path):
    trainer = quiet(tmp_path, LearningRateMonitor("epoch"), max_epochs=3)
    trainer.fit(scheduled(lambda m: halving(m, "epoch")), loaders()[0])
    assert column(tmp_path / "run" / "metrics.csv", "lr-Adam") == [0.5, 0.25, 0.125]
    assert trainer.callback_metrics["lr-Adam"] == 0.125


def test_s40_the_name_comes_from_the_schedulers_settings(tmp_path):
    quiet(tmp_path, LearningRateMonitor("epoch"), max_epochs=2).fit(
        scheduled(lambda m: halving(m, "epoch", "my_rate")), loaders()[0]
    )
    assert column(tmp_path / "run" / "metrics.csv", "my_rate") == [0.5, 0.25]
    assert "lr-Adam" not in rows_of(tmp_path / "run" / "metrics.csv")[0]


def test_s40_the_rate_of_a_logged_step_is_the_one_that_the_step_used(tmp_path):
    quiet(tmp_path, LearningRateMonitor("step"), log_every_n_steps=2).fit(
        scheduled(lambda m: halving(m, "step")), loaders()[0]
    )
    # steps 2, 4 and 6 of 7; the rate is halved after each step
    rows = rows_of(tmp_path / "run" / "steps.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert column(tmp_path / "run" / "steps.csv", "lr-Adam") == [0.25, 0.0625, 0.015625]


@pytest.mark.parametrize(("interval", "file"), [("step", "steps.csv"), ("epoch", "metrics.csv")])
def test_s40_without_an_interval_each_scheduler_brings_its_own(tmp_path, interval, file):
    quiet(tmp_path, LearningRateMonitor(), log_every_n_steps=7).fit(
        scheduled(lambda m: halving(m, interval, "rate")), loaders()[0]
    )
    found = {name for name in ("steps.csv", "metrics.csv") if _has_column(tmp_path / "run" / name, "rate")}
    assert found == {file}


def _has_column(path, name):
    return path.exists() and name in rows_of(path)[0]


def test_s40_groups_and_several_optimizers_get_names_of_their_own(tmp_path):
    def make(module):
        backbone = {"params": module.backbone.parameters(), "lr": 0.1, "name": "backbone"}
        head = {"params": module.head.parameters(), "lr": 0.2}
        first = torch.optim.SGD([backbone, head], momentum=0.9, weight_decay=0.01)
        others = [torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2)]
        return [first, *others]

    class Three(Scheduled):
        def training_step(self, batch, batch_idx, optimizer_idx=0):
            return None if optimizer_idx else super().training_step(batch, batch_idx)

    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    quiet(tmp_path, monitor).fit(scheduled(make, Three), loaders()[0])
    row = rows_of(tmp_path / "run" / "metrics.csv")[0]
    assert {name: float(value) for name, value in row.items() if name.startswith("lr-")} == {
        "lr-SGD/backbone": 0.1,
        "lr-SGD/backbone-momentum": 0.9,
        "lr-SGD/backbone-weight_decay": 0.01,
        "lr-SGD/pg2": 0.2,
        "lr-SGD/pg2-momentum": 0.9,
        "lr-SGD/pg2-weight_decay": 0.01,
        "lr-Adam": 0.3,
        "lr-Adam-momentum": 0.9,
        "lr-Adam-weight_decay": 0.0,
        "lr-Adam-1": 0.3,
        "lr-Adam-1-momentum": 0.9,
        "lr-Adam-1-weight_decay": 0.0,
    }


def test_s40_momentum_that_no_optimizer_has_is_zero(tmp_path):
    module = scheduled(lambda m: torch.optim.Adagrad(m.parameters()))
    monitor = LearningRateMonitor(log_momentum=True)
    quiet(tmp_path, monitor).fit(module, loaders()[0])
    assert set(monitor.last_momentum_values.values()) == {0.0}


def test_s40_another_interval_is_refused():
    with pytest.raises(UsageError, match="logging_interval='batch'"):
        LearningRateMonitor("batch")


# ---- the device


def test_s94_device_stats_of_the_cpu_go_to_the_step_log(tmp_path):
    pytest.importorskip("psutil")
    quiet(tmp_path, DeviceStatsMonitor(), log_every_n_steps=3, accelerator="cpu").fit(net(), *loaders())
    rows = rows_of(tmp_path / "run" / "steps.csv")
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(float(row["device/process_bytes"]) > 1e7 for row in rows)
    assert all(0 < float(row["device/cpu_memory_percent"]) <= 100 for row in rows)


def test_s94_only_the_keys_that_were_asked_for_are_logged(tmp_path):
    pytest.importorskip("psutil")
    monitor = DeviceStatsMonitor(filter_keys=["cpu_percent"])
    quiet(tmp_path, monitor, log_every_n_steps=3, accelerator="cpu").fit(net(), *loaders())
    assert [n for n in rows_of(tmp_path / "run" / "steps.csv")[0] if n.startswith("device/")] == ["device/cpu_percent"]
    with pytest.raises(UsageError, match="choose from cpu_percent"):
        quiet(tmp_path / "b", DeviceStatsMonitor(filter_keys=["fans"]), accelerator="cpu").fit(net(), *loaders())


def test_s94_without_psutil_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(UsageError, match="pip install psutil"):
        quiet(tmp_path, DeviceStatsMonitor(), accelerator="cpu").fit(net(), *loaders())
    trainer = quiet(tmp_path / "b", DeviceStatsMonitor(cpu_stats=False), accelerator="cpu")
    trainer.fit(net(), *loaders())
    assert trainer.global_step == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_s94_device_stats_of_cuda_go_to_the_step_log(tmp_path):
    quiet(tmp_path, DeviceStatsMonitor(), log_every_n_steps=3, accelerator="cuda").fit(net(), *loaders())
    assert all(value > 0 for value in column(tmp_path / "run" / "steps.csv", "device/allocated_bytes.all.current"))


# ---- hooks


def test_s120_a_callback_may_have_any_subset_of_hooks(tmp_path):
    told = []

    class Two(Callback):
        def on_train_start(self, trainer, module):
            told.append(("start", type(module).__name__))

        def on_validation_end(self, trainer, module):
            told.append(("validated", "val_loss" in trainer.callback_metrics))

    quiet(tmp_path, Two()).fit(net(), *loaders())
    assert told == [("start", "Net"), ("validated", True)]


def test_s120_lambda_callback_calls_its_functions_with_the_hooks_arguments(tmp_path):
    told = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: told.append(stage),
        on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: told.append(batch_idx),
        on_save_checkpoint=lambda trainer, module, checkpoint: checkpoint.update(note="hello"),
        teardown=lambda trainer, module, stage: told.append(f"after {stage}"),
    )
    quiet(tmp_path, callback, limit_train_batches=2).fit(net(), *loaders())
    assert told == ["fit", 0, 1, "after fit"]
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["note"] == "hello"


def test_s120_lambda_callback_can_skip_the_rest_of_an_epoch(tmp_path):
    skip = LambdaCallback(on_train_batch_start=lambda trainer, module, batch, batch_idx: -1 if batch_idx == 3 else None)
    trainer = quiet(tmp_path, skip)
    trainer.fit(net(), *loaders())
    assert trainer.global_step == 3


def test_s120_lambda_callback_takes_every_hook_of_the_base():
    hooks = [n for n in vars(Callback) if n.startswith("on_") or n in ("setup", "teardown")]
    callback = LambdaCallback(**{name: lambda *arguments: None for name in hooks})
    assert len(hooks) > 35
    assert all(name in vars(callback) for name in hooks)


def test_s120_lambda_callback_names_the_hook_that_was_probably_meant():
    with pytest.raises(UnknownNameError, match="did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(UnknownNameError, match="state_dict"):
        LambdaCallback(state_dict=dict)
    with pytest.raises(UsageError, match="on_fit_start=lambda trainer, module: "):
        LambdaCallback(on_fit_start=3)


# ---- accumulation


def test_accumulation_follows_its_schedule_by_epoch(tmp_path):
    steps = []
    watch = LambdaCallback(on_epoch_end=lambda trainer, module: steps.append(trainer.global_step))
    schedule = GradientAccumulationScheduler({3: 4, 1: 2})
    quiet(tmp_path, schedule, watch, max_epochs=4).fit(net(), loaders()[0])
    assert steps == [7, 7 + 4, 7 + 4 + 4, 7 + 4 + 4 + 2]  # 7 batches an epoch; the last group may be short


def test_accumulation_resumes_with_the_epochs_own_number(tmp_path):
    schedule = {1: 3}
    quiet(tmp_path, GradientAccumulationScheduler(schedule), max_epochs=2).fit(net(), loaders()[0])
    trainer = quiet(tmp_path, GradientAccumulationScheduler(schedule), max_epochs=3)
    trainer.fit(net(), loaders()[0], ckpt_path=tmp_path / "run" / "last.ckpt")
    assert trainer.global_step == 7 + 3 + 3


def test_accumulation_is_a_function_of_the_epoch_alone():
    schedule = GradientAccumulationScheduler(scheduling={4: 2, 8: 4})
    assert [schedule.batches_for_a_step(epoch) for epoch in range(10)] == [1, 1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert schedule.state_dict() == {}


@pytest.mark.parametrize("wrong", [{}, {-1: 2}, {0: 0}, {"a": 2}, {0: 1.5}, 4])
def test_accumulation_refuses_a_schedule_that_cannot_be_meant(wrong):
    with pytest.raises(UsageError, match="scheduling"):
        GradientAccumulationScheduler(wrong)


def test_accumulation_twice_is_a_contradiction(tmp_path):
    trainer = quiet(tmp_path, GradientAccumulationScheduler({2: 2}), accumulate_grad_batches=2)
    with pytest.raises(UsageError, match="contradicts"):
        trainer.fit(net(), loaders()[0])


# ---- time


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("01:02:03:04", ((24 + 2) * 60 + 3) * 60 + 4),
        ("400:00:00:00", 400 * 86400),
        (timedelta(minutes=3), 180),
        ({"hours": 1, "minutes": 0.5}, 3630),
        ("00:00:00:00", 0),
        ("90s", 90),
        ("10min", 600),
        ("1.5 h", 5400),
    ],
)
def test_a_duration_can_be_given_in_several_ways(given, seconds):
    assert read_duration(given).total_seconds() == seconds


@pytest.mark.parametrize("wrong", ["12:00", "ten", "90", "1d", "00:25:00:00", timedelta(-1), 30, {"hours": "1"}, None])
def test_what_is_no_duration_is_refused(wrong):
    with pytest.raises(UsageError, match=r"length of time|are a number"):
        read_duration(wrong)


def test_a_mistyped_part_of_a_duration_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'hours'"):
        Timer({"hour": 1})


def slow(seconds):
    return LambdaCallback(on_train_batch_start=lambda *arguments: time.sleep(seconds))


def test_timer_measures_each_stage(tmp_path):
    timer = Timer()
    trainer = quiet(tmp_path, timer, slow(0.01), num_sanity_val_steps=2)
    trainer.fit(net(), *loaders())
    assert 0.07 < timer.time_elapsed() < 60
    assert 0 < timer.time_elapsed("validate") < timer.time_elapsed("train")
    assert timer.time_remaining() is None
    assert timer.time_elapsed("test") == 0
    trainer.test(dataloaders=loaders()[1])
    assert timer.time_elapsed("test") > 0
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        timer.time_elapsed("training")


def test_timer_ends_a_fit_between_two_steps_and_keeps_its_place(tmp_path, capsys):
    trainer = quiet(tmp_path, Timer(timedelta(milliseconds=50)), slow(0.02), max_epochs=5)
    trainer.fit(net(), loaders()[0])
    assert 1 <= trainer.global_step <= 3
    assert trainer.fit_run.stop_reason == "the time of 0:00:00.050000 is up"
    assert "stopping, the time of" in capsys.readouterr().err
    progress = read_checkpoint(tmp_path / "run" / "last.ckpt")["progress"]
    assert (progress["epoch_is_complete"], progress["batch_idx"]) == (False, trainer.global_step)


def test_timer_goes_on_with_more_time_and_trains_the_same(tmp_path):
    whole = quiet(tmp_path / "whole", max_epochs=2)
    whole.fit(net(), loaders()[0])
    cut = quiet(tmp_path, Timer(timedelta(milliseconds=50)), slow(0.02), max_epochs=2)
    cut.fit(net(), loaders()[0])
    timer = Timer(timedelta(hours=1))
    resumed = quiet(tmp_path, timer, max_epochs=2)
    resumed.fit(net(), loaders()[0], ckpt_path=tmp_path / "run" / "last.ckpt")
    assert resumed.global_step == whole.global_step == 14
    assert timer.time_elapsed() > 0.05  # what was used before counts
    for name, value in whole.fit_run.module.state_dict().items():
        assert torch.equal(value, resumed.fit_run.module.state_dict()[name]), name


def test_timer_ends_a_resumed_fit_at_once_if_no_time_is_left(tmp_path):
    duration = timedelta(milliseconds=50)
    first = quiet(tmp_path, Timer(duration), slow(0.02), max_epochs=5)
    first.fit(net(), loaders()[0])
    again = quiet(tmp_path, Timer(duration), max_epochs=5)
    again.fit(net(), loaders()[0], ckpt_path=tmp_path / "run" / "last.ckpt")
    assert again.global_step == first.global_step


def test_timer_by_epoch_finishes_the_epoch(tmp_path):
    trainer = quiet(tmp_path, Timer(timedelta(milliseconds=1), interval="epoch", verbose=False), max_epochs=5)
    trainer.fit(net(), loaders()[0])
    assert (trainer.global_step, len(trainer.fit_run.history)) == (7, 1)


def test_timer_by_step_still_takes_the_step_that_is_being_accumulated(tmp_path):
    trainer = quiet(tmp_path, Timer(timedelta(milliseconds=1)), slow(0.002), accumulate_grad_batches=3)
    trainer.fit(net(), loaders()[0])
    assert (trainer.global_step, trainer.fit_run.batch_idx) == (1, 3)


def test_timer_refuses_another_interval():
    with pytest.raises(UsageError, match="interval='batch'"):
        Timer("00:01:00:00", interval="batch")


# ---- the table of layers


def test_model_summary_counts_parameters_by_layer():
    module = net()
    module.backbone.requires_grad_(False)
    layers = layers_of(module, max_depth=1)
    assert [(layer.name, layer.type, layer.parameters, layer.trainable) for layer in layers] == [
        ("backbone", "Sequential", 40 + 16 + 72, 0),
        ("drop", "Dropout", 0, 0),
        ("head", "Linear", 27, 27),
        ("all", "Net", 155, 27),
    ]


def test_model_summary_goes_as_deep_as_it_is_told():
    assert [layer.name for layer in layers_of(net(), 0)] == ["all"]
    assert "backbone.0" in [layer.name for layer in layers_of(net(), 2)]
    assert layers_of(net(), -1) == layers_of(net(), 2)


def test_model_summary_counts_a_shared_parameter_once():
    module = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)])
    module[1].weight = module[0].weight
    assert layers_of(module)[-1].parameters == 9


def test_model_summary_says_what_the_first_epoch_trains(tmp_path, capsys):
    quiet(tmp_path, ModelSummary(), max_epochs=2).finetune(net(), *loaders(), strategy=("freeze_unfreeze", 1))
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines.count(["backbone", "Sequential", "128", "0"]) == 1
    assert [line for line in lines if line[:2] == ["all", "Net"]] == [["all", "Net", "155", "27"]]


def test_model_summary_draws_a_table_on_a_terminal(tmp_path, monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        quiet(tmp_path, ModelSummary(), enable_checkpointing=False, logger=False).fit(net(), loaders()[0])
        terminal.flush()
        shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "┃" in shown
    assert "Sequential" in shown


@pytest.mark.parametrize("wrong", [-2, 1.5, "all"])
def test_model_summary_refuses_another_depth(wrong):
    with pytest.raises(UsageError, match="max_depth"):
        ModelSummary(max_depth=wrong)


# ---- predictions


class Predicting(Net):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0]).argmax(1)


class Files(BasePredictionWriter):
    """A file a batch, and one with everything."""

    def __init__(self, folder, write_interval):
        super().__init__(write_interval)
        self.folder = folder

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        assert len(batch[0]) == len(batch_indices)
        torch.save((batch_indices, prediction), self.folder / f"{dataloader_idx}_{batch_idx}.pt")

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        torch.save((batch_indices, predictions), self.folder / "all.pt")


def predict(tmp_path, interval, given):
    (tmp_path / "files").mkdir()
    trainer = quiet(tmp_path, Files(tmp_path / "files", interval))
    torch.manual_seed(0)
    return trainer.predict(Predicting(), given), {p.name: torch.load(p) for p in (tmp_path / "files").iterdir()}


def test_prediction_writer_writes_batches_as_they_come(tmp_path):
    returned, files = predict(tmp_path, "batch", loaders()[1])
    assert sorted(files) == [f"0_{number}.pt" for number in range(7)]
    ordered = [files[f"0_{number}.pt"] for number in range(7)]
    assert [place for indices, _ in ordered for place in indices] == list(range(50))
    assert all(torch.equal(a, b) for (_, a), b in zip(ordered, returned, strict=True))


def test_prediction_writer_writes_everything_at_the_end(tmp_path):
    returned, files = predict(tmp_path, "epoch", loaders()[1])
    assert list(files) == ["all.pt"]
    indices, predictions = files["all.pt"]
    assert indices == [list(range(start, min(start + 8, 50))) for start in range(0, 50, 8)]
    assert torch.equal(torch.cat(predictions), torch.cat(returned))


def test_prediction_writer_does_both_and_counts_each_loader_from_zero(tmp_path):
    _, files = predict(tmp_path, "batch_and_epoch", [loaders(16)[1], loaders(10)[1]])
    assert sorted(files) == ["0_0.pt", "0_1.pt", "1_0.pt", "1_1.pt", "all.pt"]
    assert files["1_1.pt"][0] == [8, 9]
    assert files["all.pt"][0] == [[list(range(8)), list(range(8, 16))], [list(range(8)), [8, 9]]]


def test_prediction_writer_needs_the_method_of_its_interval(tmp_path):
    class Half(BasePredictionWriter):
        def write_on_batch_end(self, *arguments):
            pass

    with pytest.raises(UsageError, match="has no write_on_epoch_end"):
        quiet(tmp_path, Half("batch_and_epoch")).predict(Predicting(), loaders()[1])
    with pytest.raises(UnknownNameError, match="no write_interval named 'batches'"):
        Half("batches")


def test_s31_the_run_knows_its_steps_before_it_starts(tmp_path):
    seen = []
    watch = LambdaCallback(on_fit_start=lambda trainer, module: seen.append(trainer.estimated_stepping_batches))
    trainer = quiet(tmp_path, GradientAccumulationScheduler({1: 2, 3: 4}), watch, max_epochs=4)
    trainer.fit(net(), loaders()[0])
    assert seen == [7 + 4 + 4 + 2] == [trainer.global_step]
