"""Features of a frozen backbone are computed once: the same results, when it is right, and what is kept of it."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from small import colour_folders
from torch import nn

from flashtask import Callback, ImageClassificationData, ImageClassifier, Trainer
from flashtask.cli import run as flashtask
from flashtask.core.cache import cache_folder
from flashtask.core.errors import UsageError
from flashtask.core.known_files import content_hashes
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.feature_cache.store import FeatureStore, content_key

EPOCHS = 3


@pytest.fixture
def folders(tmp_path):
    return colour_folders(tmp_path / "images", each=12), colour_folders(tmp_path / "val", each=5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))


def data(folders, **options):
    train, val = folders
    size = options.pop("size", 32)
    made = ImageClassificationData.from_folders(
        train_folder=train, val_folder=val, **{"batch_size": 5, "num_workers": 0, **options}
    )
    made.preprocessing = Preprocessing(input_size=(3, size, size))
    return made


def model(**options):
    torch.manual_seed(7)  # the random weights of the backbone
    options = {"backbone": "timm/test_resnet", "pretrained": False, "learning_rate": 1e-2, **options}
    return ImageClassifier(**options)


def fit(tmp_path, folders, name, *, strategy="freeze", module=None, settings=None, callbacks=None, **options):
    options = {"max_epochs": EPOCHS, "precision": "32", "seed": 3, "enable_progress_bar": False, **options}
    trainer = Trainer(output_dir=tmp_path / name, callbacks=callbacks, num_sanity_val_steps=0, **options)
    module = model() if module is None else module
    trainer.finetune(module, datamodule=data(folders, **(settings or {})), strategy=strategy, restore_best=False)
    return trainer, module


class Counted(Callback):
    """How often the backbone ran, and on how many images."""

    images = 0

    def setup(self, trainer, module, stage):
        module.backbone.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.images += len(inputs[0])


def test_each_image_goes_through_the_backbone_once(tmp_path, folders):
    counted, uncached = Counted(), Counted()
    fit(tmp_path, folders, "cached", callbacks=[counted])
    fit(tmp_path, folders, "plain", callbacks=[uncached], feature_cache=False)
    assert counted.images == 24 + 10
    assert uncached.images == EPOCHS * (24 + 10)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "64-true"])
def test_the_head_and_every_metric_are_those_of_the_uncached_path(tmp_path, folders, precision):
    settings = {"head": "mlp", "head_options": {"dropout": 0.2}}
    found = []
    for name, cache in (("cached", "auto"), ("plain", False)):
        module = model(**settings)
        trainer, module = fit(tmp_path, folders, name, module=module, feature_cache=cache, precision=precision)
        found.append((trainer.fit_run.history, module.head.state_dict(), module.backbone.state_dict()))
    (rows, head, backbone), (plain_rows, plain_head, plain_backbone) = found
    tolerance = {"32": 1e-5, "bf16-mixed": 2e-2, "64-true": 1e-6}[precision]
    for name, value in plain_head.items():
        torch.testing.assert_close(head[name], value, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(backbone[name], value) for name, value in plain_backbone.items())
    for row, plain in zip(rows, plain_rows, strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy"):
            assert row[name] == pytest.approx(plain[name], abs=tolerance * 10)
        assert row["step"] == plain["step"]


def test_the_frozen_epochs_of_freeze_unfreeze_use_it_and_the_others_do_not(tmp_path, folders):
    counted = Counted()
    _, module = fit(tmp_path, folders, "cached", strategy=("freeze_unfreeze", 2), callbacks=[counted])
    assert counted.images == (24 + 10) + (24 + 10)
    _, plain = fit(tmp_path, folders, "plain", strategy=("freeze_unfreeze", 2), feature_cache=False)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_second_run_with_another_head_and_rate_reads_no_image_and_runs_no_backbone(tmp_path, folders, capsys):
    fit(tmp_path, folders, "first")
    counted = Counted()
    module = model(head="mlp", learning_rate=3e-3)
    trainer, _ = fit(tmp_path, folders, "second", module=module, callbacks=[counted])
    assert counted.images == 0
    assert "are in the cache" in capsys.readouterr().err
    losses = [row["train_loss"] for row in trainer.fit_run.history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        (lambda root: None, 0),
        (lambda root: _touch(root), 0),  # a new time and the same content
        (lambda root: _repaint(root), 24),
    ],
)
def test_features_belong_to_the_content_of_files(tmp_path, folders, change, runs):
    fit(tmp_path, folders, "first")
    change(folders[0])
    counted = Counted()
    fit(tmp_path, folders, "second", callbacks=[counted])
    assert counted.images == runs


def _touch(root):
    for file in root.rglob("*.*"):
        os.utime(file, (1, 1))


def _repaint(root):
    from PIL import Image

    first = min(root.rglob("*.*"))
    Image.new("RGB", (40, 40), "green").save(first)


@pytest.mark.parametrize("other", ["weights", "precision", "size"])
def test_features_belong_to_weights_precision_and_preprocessing(tmp_path, folders, other):
    fit(tmp_path, folders, "first")
    counted = Counted()
    module = model()
    if other == "weights":
        with torch.no_grad():
            next(module.backbone.parameters()).add_(1e-3)
    options = {"precision": "bf16-mixed"} if other == "precision" else {}
    settings = {"size": 48} if other == "size" else None
    fit(tmp_path, folders, "second", module=module, settings=settings, callbacks=[counted], **options)
    assert counted.images == 24 + 10


def test_damaged_features_are_computed_anew(tmp_path, folders):
    fit(tmp_path, folders, "first")
    for file in FeatureStore().folder.glob("*.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    counted = Counted()
    fit(tmp_path, folders, "second", callbacks=[counted])
    assert counted.images == 34


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("the training data is augmented at random", {"settings": {"augment": "light"}}),
        ("the run sees fewer samples than there are", {"limit_train_batches": 1, "max_epochs": 1}),
        ("Watching.on_train_batch_end is told of batches", {"callbacks": "watching"}),
        ("the steps of Own want the inputs themselves", {"module": "own"}),
    ],
)
def test_where_it_is_not_right_it_is_not_used_and_that_is_said(tmp_path, folders, capsys, why, options):
    class Watching(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert batch[0].shape[1:] == (3, 32, 32)

    class Own(ImageClassifier):
        def training_step(self, batch, batch_idx):
            assert batch[0].shape[1] == 3
            return super().training_step(batch, batch_idx)

    if "callbacks" in options:
        options = {"callbacks": [Watching()]}
    if "module" in options:
        torch.manual_seed(7)
        options = {"module": Own(backbone="timm/test_resnet", pretrained=False)}
    fit(tmp_path, folders, "run", **options)
    assert f"features are computed anew in each epoch: {why}" in capsys.readouterr().err.replace("\n", " ")
    assert not FeatureStore().entries()
    with pytest.raises(UsageError, match="feature_cache=True cannot be used"):
        fit(tmp_path, folders, "again", feature_cache=True, **options)


def test_a_number_of_views_of_augmented_images_is_gone_through_in_turn(tmp_path, folders):
    counted = Counted()
    options = {"settings": {"augment": "light"}, "max_epochs": 5}
    trainer, _ = fit(tmp_path, folders, "two", feature_cache=2, callbacks=[counted], **options)
    assert counted.images == 2 * 24 + 10
    losses = [row["train_loss"] for row in trainer.fit_run.history]
    assert len(set(losses)) == 5
    again = Counted()
    fit(tmp_path, folders, "again", feature_cache=2, callbacks=[again], **options)
    assert again.images == 0


def test_a_run_that_is_stopped_and_resumed_has_the_bits_of_one_that_was_not(tmp_path, folders):
    constant = {"lr_scheduler": "constant"}
    _, whole = fit(tmp_path, folders, "whole", module=model(**constant), max_epochs=4)
    fit(
        tmp_path, folders, "part", module=model(**constant), max_steps=7, max_epochs=4
    )  # in the middle of the second epoch
    FeatureStore().remove(FeatureStore().entries()[0].key)  # one of the two is computed again
    module = model(**constant)
    trainer = Trainer(
        output_dir=tmp_path / "part",
        max_epochs=4,
        precision="32",
        seed=3,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.finetune(
        module, datamodule=data(folders), strategy="freeze", restore_best=False, ckpt_path=tmp_path / "part/last.ckpt"
    )
    assert all(torch.equal(module.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_a_head_that_is_solved_uses_features_that_are_there(tmp_path, folders):
    fit(tmp_path, folders, "first")
    counted = Counted()
    _, module = fit(tmp_path, folders, "second", module=model(head="ridge"), callbacks=[counted])
    assert counted.images == 0
    _, plain = fit(tmp_path, folders, "plain", module=model(head="ridge"), feature_cache=False)
    for name, value in plain.head.state_dict().items():
        torch.testing.assert_close(module.head.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_backbone_of_the_users_own_is_cached_for_the_run_alone(tmp_path, folders):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, images):
            return self.layer(images).mean(dim=(2, 3))

    counted = Counted()
    with pytest.warns(UserWarning, match="cannot be stored"):
        module = ImageClassifier(backbone=Own())
    fit(tmp_path, folders, "run", module=module, callbacks=[counted])
    assert counted.images == 34
    assert not FeatureStore().entries()


# ---- what is kept


def test_the_store_is_bounded_and_drops_what_was_not_used_for_longest(tmp_path):
    store = FeatureStore(tmp_path / "store")
    features = np.zeros((25, 9), dtype=np.float32)
    for number in range(3):
        assert store.keep(f"k{number}", features, {})
        os.utime(tmp_path / "store" / f"k{number}.json", (number, number))
    assert store.open("k0") is not None  # used just now
    store.limit = 3 * store.entries()[0].size
    assert store.keep("k3", features, {})
    assert {entry.key for entry in store.entries()} == {"k0", "k2", "k3"}
    assert not store.keep("large", np.zeros((1000, 9), dtype=np.float32), {})
    assert len(store.entries()) == 3


def test_a_key_depends_on_every_part():
    parts = {"weights": "a", "draws": [1, 2], "frozen": {"backbone": "x"}}
    keys = {content_key(parts), *(content_key({**parts, name: "other"}) for name in parts)}
    assert len(keys) == 4
    assert content_key(dict(reversed(parts.items()))) == content_key(parts)


def test_hashes_of_files_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    from flashtask.core import known_files

    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
        os.utime(file, (1, 1))
    read = []
    real = known_files.sha256_file
    monkeypatch.setattr(known_files, "sha256_file", lambda path: read.append(str(path)) or real(path))
    paths = [str(file) for file in files]
    first = content_hashes(paths)
    assert content_hashes(paths) == first
    assert len(read) == 3
    files[1].write_text("other")
    os.utime(files[1], (2, 2))
    assert content_hashes(paths)[1] != first[1]
    assert read[3:] == [paths[1]]
    files[2].write_text("young")  # changed just now: not trusted yet
    content_hashes(paths)
    content_hashes(paths)
    assert read[4:] == [paths[2]] * 2
    assert flashtask(["cache", "clear", "files"]) == 0
    assert content_hashes(paths)[0] == first[0]
    assert len(read) == 9


def test_the_command_line_lists_and_clears(tmp_path, folders, capsys):
    fit(tmp_path, folders, "first")
    capsys.readouterr()
    assert flashtask(["cache", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["folder"] == str(cache_folder())
    assert sorted(entry["samples"] for entry in shown["features"]) == [10, 24]
    assert flashtask(["cache"]) == 0
    text = capsys.readouterr().out
    assert "features of frozen backbones" in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert flashtask(["cache", "clear", "features"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not FeatureStore().entries()
    assert (cache_folder() / "files.sqlite").exists()
    assert flashtask(["cache", "clear"]) == 0
    assert not (cache_folder() / "files.sqlite").exists()
    assert flashtask(["cache", "clear", "feature"]) == 2
    assert "did you mean 'features'" in capsys.readouterr().err


def test_the_time_of_a_pass_does_not_count_twice(tmp_path, folders):
    started = time.monotonic()
    trainer, _ = fit(tmp_path, folders, "run")
    assert sum(row["seconds"] for row in trainer.fit_run.history) <= time.monotonic() - started
