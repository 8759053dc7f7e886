"""Arguments of the Trainer, of its strategies and devices: what cannot be meant is told when it is given."""

from __future__ import annotations

import inspect

import pytest
import torch

from flashtask import Callback, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.devices.accelerators import resolve_device
from flashtask.trainer.loggers.csv_logger import CSVLogger
from flashtask.trainer.loggers.logger import Logger

NOT_NONE = [
    "max_steps",
    "accelerator",
    "devices",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "num_sanity_val_steps",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
]


class Watch(Callback):
    """Does nothing."""


@pytest.mark.parametrize("name", NOT_NONE)
def test_none_is_refused_where_it_is_not_the_default(name):
    with pytest.raises(UsageError, match=name):
        Trainer(**{name: None})


def test_none_is_taken_where_it_is_the_default():
    Trainer(
        max_epochs=None,
        precision=None,
        memory_format=None,
        seed=None,
        default_root_dir=None,
        output_dir=None,
        callbacks=None,
        limit_train_batches=None,
        limit_val_batches=None,
        limit_test_batches=None,
        limit_predict_batches=None,
        gradient_clip_val=None,
    )


@pytest.mark.parametrize("value", [True, "1", -1, float("nan"), [1.0]])
def test_a_gradient_clip_val_is_a_number(value):
    with pytest.raises(UsageError, match="None or a number of at least 0"):
        Trainer(gradient_clip_val=value)
    Trainer(gradient_clip_val=0)
    Trainer(gradient_clip_val=0.5)


@pytest.mark.parametrize(
    "name", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"]
)
@pytest.mark.parametrize("value", [True, "3", -1, -0.1, 1.5, float("nan")])
def test_limits_of_batches_are_checked_at_construction(name, value):
    with pytest.raises(UsageError, match=rf"{name}=.*from 0.0 to 1.0"):
        Trainer(**{name: value})
    for good in (0, 5, 0.0, 0.5, 1.0):
        Trainer(**{name: good})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"callbacks": Watch}, "Watch()"),
        ({"callbacks": [Watch(), Watch]}, "Watch()"),
        ({"callbacks": 3}, "a Callback, a name or a list"),
        ({"callbacks": [None]}, "a Callback, a name or a list"),
        ({"callbacks": False}, "a Callback, a name or a list"),
        ({"logger": CSVLogger}, "CSVLogger()"),
        ({"logger": "csvv"}, "did you mean 'csv'"),
        ({"logger": [True]}, "True, False, a Logger"),
        ({"precision": "fp8"}, "no precision named 'fp8'"),
        ({"precision": "bf16mixed"}, "did you mean 'bf16-mixed'"),
        ({"precision": True}, "no precision"),
        ({"accelerator": "cpuu"}, "did you mean 'cpu'"),
        ({"accelerator": "tpu"}, "no TPU support"),
        ({"devices": 2, "strategy": "single"}, "devices=1"),
        ({"devices": True}, "devices=1"),
        ({"devices": [-1]}, "devices=1"),
        ({"enable_checkpointing": "no"}, "True or False"),
        ({"output_dir": ""}, "path of a folder"),
        ({"default_root_dir": 3}, "path of a folder"),
        ({"memory_format": "channel_last"}, "channels_last"),
        ({"seed": True}, "4294967295"),
    ],
)
def test_values_of_a_wrong_kind_are_told_at_construction(options, words):
    with pytest.raises(UsageError) as caught:
        Trainer(**options)
    assert words in str(caught.value)
    assert caught.value.fix


def test_good_callbacks_and_loggers_are_taken():
    Trainer(callbacks=Watch(), logger=Logger())
    Trainer(callbacks=(Watch(), Watch()), logger=[Logger(), CSVLogger()])
    Trainer(callbacks=[], logger=False)


def test_a_device_number_that_is_not_here_is_told():
    with pytest.raises(UsageError, match=r"numbered 0 to 0"):
        resolve_device("cpu", [1])
    assert resolve_device("cpu", [0]) == torch.device("cpu")


def test_arguments_that_belong_elsewhere_say_where():
    with pytest.raises(UsageError, match=r"trainer\.finetune\(.*strategy='freeze'"):
        Trainer(strategy="freeze")
    with pytest.raises(UsageError, match="ckpt_path"):
        Trainer(resume_from_checkpoint="last.ckpt")


@pytest.mark.parametrize(
    ("method", "returned"),
    [
        ("fit", "FitResult"),
        ("finetune", "FitResult"),
        ("validate", "list[dict[str, float]]"),
        ("test", "list[dict[str, float]]"),
        ("predict", "list[Any] | None"),
        ("tune", "TuningResult"),
        ("plan", "Plan"),
    ],
)
def test_a_method_says_what_it_returns(method, returned):
    assert inspect.signature(getattr(Trainer, method)).return_annotation == returned
