"""Features of a frozen backbone over several processes: each image once over all of them, and the heads of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small import colour_folders

from flashtask import Callback, ImageClassificationData, ImageClassifier, Trainer
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.feature_cache.store import FeatureStore

#: Sums are taken in another order.
TOLERANCE = 1e-6
IMAGES = 14 + 6


@pytest.fixture
def folders(tmp_path):
    return colour_folders(tmp_path / "images", each=7), colour_folders(tmp_path / "val", each=3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))


class Counted(Callback):
    """On how many images the backbone ran, by process."""

    def __init__(self):
        self.images, self.by_process = 0, []

    def setup(self, trainer, module, stage):
        module.backbone.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.images += len(inputs[0])

    def note(self, trainer, module):
        self.by_process = trainer.strategy.gather(self.images)

    on_fit_end = on_validation_end = on_test_end = note


def model(**options):
    torch.manual_seed(7)  # the random weights of the backbone
    options = {"backbone": "timm/test_vit", "pretrained": False, "learning_rate": 1e-2, **options}
    return ImageClassifier(**options)


def data(folders, processes, **options):
    """With six images a step, whatever the number of processes."""
    made = ImageClassificationData.from_folders(*folders, **{"batch_size": 6 // processes, "num_workers": 0, **options})
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    return made


def trainer_of(tmp_path, processes, name, **options):
    several = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    quiet = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0}
    run = {"accelerator": "cpu", "precision": "32", "seed": 3, "max_epochs": 2, "output_dir": tmp_path / name}
    return Trainer(**{**quiet, **run, **several, **options})


def fit(tmp_path, folders, processes, name, *, module=None, strategy="freeze", settings=None, callbacks=(), **options):
    counted = Counted()
    module = model() if module is None else module
    trainer = trainer_of(tmp_path, processes, name, callbacks=[counted, *callbacks], **options)
    made = data(folders, processes, **(settings or {}))
    trainer.finetune(module, datamodule=made, strategy=strategy, restore_best=False)
    return trainer, module, counted.by_process


def assert_same(found, expected):
    (trainer, module, _), (other, plain, _) = found, expected
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=TOLERANCE)
    assert len(trainer.fit_run.history) == len(other.fit_run.history)
    for row, expected_row in zip(trainer.fit_run.history, other.fit_run.history, strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy", "step"):
            assert row[name] == pytest.approx(expected_row[name], abs=TOLERANCE)


def apart(monkeypatch, tmp_path, name):
    """A cache folder of its own for what is compared with."""
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / name))


@pytest.mark.parametrize("processes", [2, 3])
def test_each_image_goes_through_the_backbone_once_over_all_processes(tmp_path, folders, monkeypatch, capfd, processes):
    found = fit(tmp_path, folders, processes, "several")
    said = capfd.readouterr().err
    assert said.count("computing the features of 14 training images") == 1
    assert said.count("computing the features of 6 validation images") == 1
    assert said.count("kept in the cache") == 2
    assert sum(found[2]) == IMAGES
    assert len(found[2]) == processes
    assert min(found[2]) >= IMAGES // processes - 2
    assert [entry.about["samples"] for entry in FeatureStore().entries()].count(14) == 1
    again = fit(tmp_path, folders, processes, "again")
    assert again[2] == [0] * processes
    assert capfd.readouterr().err.count("are in the cache") == 2
    apart(monkeypatch, tmp_path, "of one")
    expected = fit(tmp_path, folders, 1, "one")
    assert_same(found, expected)
    assert_same(again, expected)
