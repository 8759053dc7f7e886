"""Arguments of the Lightning 1.x Trainer: understood, or answered with what replaced them."""

from __future__ import annotations

import pytest
import torch
from small import loaders, net

from flashtask import Callback, EarlyStopping, ModelCheckpoint, ProgressBar, Timer, Trainer
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.callbacks.callback_registry import CALLBACKS, make_callbacks
from flashtask.trainer.lightning1.older_arguments import _INSTEAD, UNDERSTOOD

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@no_gpu
@pytest.mark.parametrize("gpus", [-1, "-1"])
def test_s99_all_gpus_of_a_machine_without_one_are_the_cpu_and_it_is_said(gpus, capsys):
    trainer = Trainer(gpus=gpus)
    assert trainer.accelerator == "cpu"
    assert "CPU" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [0, None])
def test_s99_no_gpus_are_the_cpu(gpus, capsys):
    assert Trainer(gpus=gpus).accelerator == "cpu"
    assert not capsys.readouterr().err


@no_gpu
@pytest.mark.parametrize("gpus", [2, [0], "0,1", 1])
def test_s99_gpus_that_are_not_here_are_an_error(gpus):
    with pytest.raises(UsageError, match="CUDA"):
        Trainer(gpus=gpus)


def test_s100_auto_select_gpus_needs_to_know_how_many():
    with pytest.raises(UsageError, match="gpus=2, auto_select_gpus=True"):
        Trainer(auto_select_gpus=True)
    assert Trainer(gpus=0, auto_select_gpus=True).accelerator == "cpu"


def test_s72_checkpoint_callback_false_writes_no_checkpoint(tmp_path):
    trainer = Trainer(checkpoint_callback=False, max_epochs=1, output_dir=tmp_path, enable_progress_bar=False)
    trainer.fit(net(), *loaders())
    assert not list(tmp_path.rglob("*.ckpt"))
    with pytest.raises(UsageError, match="True or False"):
        Trainer(checkpoint_callback=ModelCheckpoint())


def test_names_that_only_changed_mean_what_they_meant():
    assert Trainer(auto_batch_size_finder=True).auto_scale_batch_size is True
    assert Trainer(auto_scale_batch_size="power").auto_scale_batch_size == "power"
    assert Trainer(replace_sampler_ddp=False).use_distributed_sampler is False
    assert Trainer(auto_lr_find=True).auto_lr_find is True
    assert Trainer(flush_logs_every_n_steps=7).flush_logs_every_n_steps == 7


def test_a_thing_that_is_said_twice_is_told():
    with pytest.raises(UsageError, match="set the same thing"):
        Trainer(checkpoint_callback=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match="set the same thing"):
        Trainer(gpus=0, accelerator="cpu")


def test_callbacks_of_ones_own_stay_beside_what_an_older_name_adds():
    stopping = EarlyStopping()
    bar, own = Trainer(progress_bar_refresh_rate=2, callbacks=stopping).callbacks
    assert (type(bar), own) == (ProgressBar, stopping)


@pytest.mark.parametrize("name", sorted(_INSTEAD))
def test_a_name_that_was_replaced_is_answered_with_its_replacement(name):
    with pytest.raises(UsageError, match=f"no argument '{name}'") as caught:
        Trainer(**{name: 1})
    assert caught.value.fix == _INSTEAD[name]


@pytest.mark.parametrize("name", ["max_epoch", "gpu", "callback", "log_every_steps", "checkpoint_callbacks"])
def test_a_mistyped_name_is_answered_with_the_nearest(name):
    with pytest.raises(UsageError, match="did you mean"):
        Trainer(**{name: 1})


def test_no_older_name_is_both_understood_and_refused_or_an_argument_of_today():
    import inspect

    today = set(inspect.signature(Trainer).parameters)
    assert not (set(_INSTEAD) & set(UNDERSTOOD)) | (today & (set(_INSTEAD) | set(UNDERSTOOD)))


# ---- callbacks by name


def test_callbacks_have_names_that_can_be_listed():
    assert {"early_stopping", "model_checkpoint", "timer", "learning_rate_monitor"} <= set(CALLBACKS.names())
    for name in CALLBACKS.names():
        assert issubclass(CALLBACKS.get(name), Callback)


@pytest.mark.parametrize(
    "given",
    [
        ["early_stopping", ("timer", {"duration": "00:01:00:00"})],
        ["early_stopping", {"timer": {"duration": "00:01:00:00"}}],
        ({"early_stopping": None, "timer": {"duration": "00:01:00:00"}},),
    ],
)
def test_callbacks_are_made_from_names_and_options(given):
    stopping, timer = Trainer(callbacks=given).callbacks
    assert (type(stopping), type(timer)) == (EarlyStopping, Timer)
    assert timer.time_remaining() == 3600


def test_one_callback_needs_no_list():
    assert type(make_callbacks("early_stopping")[0]) is EarlyStopping
    assert make_callbacks(("early_stopping", {"patience": 7}))[0].patience == 7
    assert make_callbacks(None) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("early_stoping", "did you mean 'early_stopping'"),
        (("early_stopping", {"patiense": 3}), "did you mean 'patience'"),
    ],
)
def test_a_mistyped_callback_or_option_is_told(given, words):
    with pytest.raises(UnknownNameError, match=words):
        Trainer(callbacks=[given])


def test_max_time_ends_a_run(tmp_path):
    class Slow(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            import time

            time.sleep(0.05)

    options = {"enable_progress_bar": False, "output_dir": tmp_path, "callbacks": [Slow()]}
    trainer = Trainer(max_time={"seconds": 1}, **options)
    trainer.fit(net(), *loaders())
    assert trainer.max_epochs is None
    assert "is up" in trainer.fit_run.stop_reason
    assert 0 < trainer.global_step < 200
    with pytest.raises(UsageError, match="DD:HH:MM:SS"):
        Trainer(max_time="1 day")
    assert Trainer(max_time="1h").max_time == "1h"
