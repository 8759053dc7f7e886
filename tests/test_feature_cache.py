"""Features of a frozen backbone are computed once: the same results, when it is right, and what is kept of it."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
import warm
from small import colour_folders, made_long_ago
from torch import nn

from flashtask import Callback, ImageClassificationData, ImageClassifier, Phase, Trainer
from flashtask.cli import run as flashtask
from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.feature_store import FeatureStore, content_key
from flashtask.core.known_files import content_hashes
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer import feature_cache

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
    made.preprocessing = Preprocessing(input_size=(3, size, size)).resolved()  # ImageNet's mean and deviation
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


@pytest.mark.long
def test_each_image_goes_through_the_backbone_once(tmp_path, folders):
    counted, uncached = Counted(), Counted()
    fit(tmp_path, folders, "cached", callbacks=[counted])
    fit(tmp_path, folders, "plain", callbacks=[uncached], feature_cache=False)
    assert counted.images == 24 + 10
    assert uncached.images == EPOCHS * (24 + 10)


@pytest.mark.long
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


@pytest.mark.long
def test_the_frozen_epochs_of_freeze_unfreeze_use_it_and_the_others_do_not(tmp_path, folders):
    counted = Counted()
    _, module = fit(tmp_path, folders, "cached", strategy=("freeze_unfreeze", 2), callbacks=[counted])
    assert counted.images == (24 + 10) + (24 + 10)
    _, plain = fit(tmp_path, folders, "plain", strategy=("freeze_unfreeze", 2), feature_cache=False)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_second_run_with_another_head_and_rate_reads_no_image_and_runs_no_backbone(tmp_path, folders, capsys):
    fit(tmp_path, folders, "first")
    counted = Counted()
    module = model(head="mlp", learning_rate=3e-3)
    trainer, _ = fit(tmp_path, folders, "second", module=module, callbacks=[counted])
    assert counted.images == 0
    assert "are in the cache" in capsys.readouterr().err
    losses = [row["train_loss"] for row in trainer.fit_run.history]
    assert losses[-1] < losses[0]


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "runs"),
    [
        pytest.param(lambda root: None, 0, marks=pytest.mark.long),
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
    made_long_ago(root.rglob("*.*"))


def _repaint(root):
    from PIL import Image

    first = min(root.rglob("*.*"))
    Image.new("RGB", (40, 40), "green").save(first)


@pytest.mark.long
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


def test_rows_that_other_data_has_are_taken_and_have_the_bits_of_a_pass_over_all(tmp_path, monkeypatch, capsys):
    folder = colour_folders(tmp_path / "many", each=30)

    def features(name, fold, cache):
        monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / cache))
        settings = {"max_epochs": 1, "seed": 3, "enable_progress_bar": False, "num_sanity_val_steps": 0}
        trainer = Trainer(output_dir=tmp_path / name, **settings)
        made = ImageClassificationData.from_folders(folder, fold=fold, num_workers=0)
        trainer.finetune(model(), datamodule=made, strategy="freeze")
        return {one.key: FeatureStore().open(one.key) for one in FeatureStore().entries()}

    features("first", "1/4", "shared")
    capsys.readouterr()
    shared = features("second", "2/4", "shared")
    said = capsys.readouterr().err
    alone = features("alone", "2/4", "empty")
    # 44 and 16 images: what is in full batches of 16 can be taken, the rest of a pass is computed.
    assert "computing the features of 44 training images, once" in said
    assert "of them are in the cache" in said
    assert len(alone) == 2
    for key, values in alone.items():
        assert np.array_equal(shared[key].view(np.uint32), values.view(np.uint32))


@pytest.mark.long
def test_damaged_features_are_computed_anew(tmp_path, folders):
    fit(tmp_path, folders, "first")
    for file in FeatureStore().folder.glob("*.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    counted = Counted()
    fit(tmp_path, folders, "second", callbacks=[counted])
    assert counted.images == 34


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("the training data is augmented at random", {"settings": {"augment": "light"}}),
        ("the run sees fewer samples than there are", {"limit_train_batches": 1, "max_epochs": 1}),
        ("Watching.on_train_batch_end reads batches", {"callbacks": "watching"}),
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
    assert f"features are computed again in each epoch: {why}" in capsys.readouterr().err.replace("\n", " ")
    assert not FeatureStore().entries()
    with pytest.raises(UsageError, match="feature_cache=True cannot be used"):
        fit(tmp_path, folders, "again", feature_cache=True, **options)


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


def test_a_warm_start_opens_no_image(tmp_path, folders):
    """In processes of their own, every file that is opened is noted."""
    made_long_ago(one for folder in folders for one in folder.rglob("*.*"))
    first = _opened_by(tmp_path, folders, "first", "linear")
    assert len(first) == 24 + 10
    assert _opened_by(tmp_path, folders, "second", "mlp") == set()
    _repaint(folders[0])
    assert _opened_by(tmp_path, folders, "third", "linear") >= {str(min(folders[0].rglob("*.*")))}


def _opened_by(tmp_path, folders, name, head):
    train, val = map(str, folders)
    code = f"""
import sys
opened = set()
sys.addaudithook(lambda event, given: event == "open" and opened.add(str(given[0])))
import torch
from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.core.preprocessing import Preprocessing
data = ImageClassificationData.from_folders({train!r}, {val!r}, batch_size=5, num_workers=0)
data.preprocessing = Preprocessing(input_size=(3, 32, 32))
torch.manual_seed(7)
model = ImageClassifier("timm/test_resnet", pretrained=False, head={head!r})
trainer = Trainer(max_epochs=2, report=False, output_dir={str(tmp_path / name)!r})
trainer.finetune(model, datamodule=data, strategy="freeze")
print(*sorted(path for path in opened if path.startswith(({train!r}, {val!r}))), sep="\\n")
"""
    done = warm.run(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.long
def test_a_file_that_was_damaged_after_a_run_is_found_by_the_next(tmp_path, folders):
    made_long_ago(folders[0].rglob("*.*"))
    fit(tmp_path, folders, "first")
    file = min(folders[0].rglob("*.*"))
    file.write_bytes(b"\x00" * file.stat().st_size)
    made_long_ago([file], 2)
    with pytest.raises(BadDataError, match="1 of 34 images cannot be read"):
        fit(tmp_path, folders, "second")


def test_the_sanity_check_computes_the_features_that_validation_needs(tmp_path, folders, capsys):
    first, second = Counted(), Counted()
    for name, counted in (("first", first), ("second", second)):
        trainer = Trainer(output_dir=tmp_path / name, max_epochs=1, precision="32", callbacks=[counted])
        trainer.finetune(model(), datamodule=data(folders), strategy="freeze")
        said = capsys.readouterr().err
        assert said.index("10 validation images") < said.index("24 training images")
    assert first.images == 24 + 10
    assert second.images == 0


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "epochs"), [(("freeze_unfreeze", 1), 2), ("freeze", 1)])
def test_the_sanity_check_makes_no_pass_where_no_frozen_epoch_is_validated(tmp_path, folders, strategy, epochs):
    counted = Counted()
    trainer = Trainer(
        output_dir=tmp_path / "run", max_epochs=epochs, precision="32", callbacks=[counted], check_val_every_n_epoch=2
    )
    trainer.finetune(model(), datamodule=data(folders), strategy=strategy, restore_best=False)
    assert counted.images == 10 + epochs * 24 + (epochs - 1) * 10  # the sanity check's two batches of five first
    assert len(FeatureStore().entries()) == 1


def test_an_error_in_validation_is_found_before_training(tmp_path, folders):
    made_long_ago(folders[1].rglob("*.*"))
    fit(tmp_path, folders, "first", max_epochs=1)  # so that files are known to be good
    damaged, steps = min(folders[1].rglob("*.*")), []
    module, made = model(learning_rate=1e-3), data(folders, size=40)

    class Late(Callback):
        def on_fit_start(self, trainer, module):
            damaged.write_bytes(b"nothing")

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps.append(batch_idx)

    trainer = Trainer(output_dir=tmp_path / "run", max_epochs=1, precision="32", callbacks=[Late()])
    with pytest.raises(BadDataError, match=damaged.name):
        trainer.finetune(module, datamodule=made, strategy="freeze")
    assert not steps


@pytest.mark.long
def test_a_run_makes_one_copy_for_inference_and_lets_go_of_it(tmp_path, monkeypatch):
    folders = colour_folders(tmp_path / "images", each=20), colour_folders(tmp_path / "val", each=20)
    copies, real = [], ImageClassifier.inference_copy

    def noted(module, precision):
        copies.append(made := real(module, precision))
        return made

    monkeypatch.setattr(ImageClassifier, "inference_copy", noted)
    phases = [Phase("head", epochs=2), Phase("all", epochs=1), Phase("head", epochs=1)]
    trainer, _ = fit(tmp_path, folders, "run", strategy=phases, max_epochs=4)
    assert len(copies) == 2  # before and after the backbone was trained
    assert trainer.fit_run.loader.features.part._copy is None


@pytest.mark.long
def test_a_backbone_that_was_trained_between_frozen_epochs_has_other_features(tmp_path, folders):
    phases = [Phase("head", epochs=2), Phase("all", epochs=1), Phase("head", epochs=2)]
    counted = Counted()
    _, cached = fit(tmp_path, folders, "cached", strategy=phases, callbacks=[counted], max_epochs=5)
    assert counted.images == 3 * (24 + 10)
    _, plain = fit(tmp_path, folders, "plain", strategy=phases, feature_cache=False, max_epochs=5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("head", "inside"), [("mlp", 2), pytest.param("linear", 1, marks=pytest.mark.long)])
def test_small_steps_on_features_take_one_thread_and_the_pass_all(tmp_path, folders, monkeypatch, head, inside):
    monkeypatch.setattr(feature_cache, "_SMALL", 5000)  # between 5 x 96 x 2 and what the hidden layer multiplies
    before, seen = torch.get_num_threads(), {"pass": set(), "step": set()}

    class Threads(Callback):
        def setup(self, trainer, module, stage):
            module.backbone.register_forward_pre_hook(lambda *_: seen["pass"].add(torch.get_num_threads()))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen["step"].add(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        fit(tmp_path, folders, "run", module=model(head=head), callbacks=[Threads()])
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen == {"pass": {2}, "step": {inside}}
    assert after == 2


# ---- validation and test


def evaluated(module, stage, folder, **options):
    counted = Counted()
    trainer = Trainer(precision="32", enable_progress_bar=False, callbacks=[counted], logger=False, **options)
    made = ImageClassificationData.from_folders(
        **{f"{'val' if stage == 'validate' else stage}_folder": folder}, batch_size=5, num_workers=0
    )
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    (metrics,) = getattr(trainer, stage)(module, datamodule=made)
    return counted.images, metrics


@pytest.mark.long
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_stages_use_and_leave_features_of_a_backbone_that_was_frozen(tmp_path, folders, capsys, stage):
    _, module = fit(tmp_path, folders, "first")
    plainly, expected = evaluated(module, stage, folders[1], feature_cache=False)
    assert plainly == 10
    images, metrics = evaluated(module, stage, folders[1])
    assert images == 0  # the fit validated on them
    others = colour_folders(tmp_path / "others", each=3)
    assert evaluated(module, stage, others)[0] == 6
    assert "once for this model's backbone" in capsys.readouterr().err
    assert evaluated(module, stage, others)[0] == 0
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5)


def test_stages_leave_nothing_of_a_backbone_that_was_trained(tmp_path, folders):
    _, module = fit(tmp_path, folders, "run", strategy="no_freeze", max_epochs=1)
    for _ in range(2):
        assert evaluated(module, "test", folders[1])[0] == 10
    assert not FeatureStore().entries()


def test_stages_read_and_write_nothing_where_that_is_not_wanted(tmp_path, folders):
    _, module = fit(tmp_path, folders, "first")
    before = {entry.key for entry in FeatureStore().entries()}
    others = colour_folders(tmp_path / "others", each=3)
    assert evaluated(module, "test", others, feature_cache=False)[0] == 6
    assert evaluated(module, "test", others, limit_test_batches=1)[0] == 5  # a part is not worth a pass
    assert {entry.key for entry in FeatureStore().entries()} == before

    class Watching(Callback):
        def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            assert batch[0].shape[1:] == (3, 32, 32)

    trainer = Trainer(precision="32", enable_progress_bar=False, callbacks=[Watching()], logger=False)
    trainer.test(module, datamodule=ImageClassificationData.from_folders(test_folder=folders[1]))


# ---- what is said before


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("strategy", "options", "once", "words"),
    [
        ("freeze", {}, [True], "computed once unless they are in the cache"),
        (("freeze_unfreeze", 2), {}, [True, False], "computed once unless they are in the cache"),
        ("no_freeze", {}, [False], "the backbone trains from the first epoch on"),
        ("freeze", {"feature_cache": False}, [False], "feature_cache=False"),
        ("freeze", {"callbacks": "watching"}, [False], "Watching.on_train_batch_start reads batches"),
        ("freeze", {"limit_train_batches": 1, "max_epochs": 1}, [False], "fewer samples than there are"),
    ],
)
def test_a_plan_says_whether_features_are_computed_once_and_why_not(folders, strategy, options, once, words):
    class Watching(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            pass

    if "callbacks" in options:
        options = {"callbacks": [Watching()]}
    trainer = Trainer(**{"max_epochs": 3, "enable_progress_bar": False, **options})
    planned = trainer.plan(model(), datamodule=data(folders), strategy=strategy, measure=False)
    assert [phase.features_once for phase in planned.phases] == once
    assert words in planned.features
    assert not FeatureStore().entries()


def test_the_command_plan_says_it_in_words_and_in_json(folders, tmp_path, capsys):
    command = ["plan", str(folders[0]), "--backbone", "timm/test_resnet", "--no-pretrained", "--no-measure"]
    assert flashtask([*command, "--augment", "light"]) == 0
    assert "features are computed again in each epoch: the training data is augmented" in _unwrapped(capsys)
    assert flashtask([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["phases"][0]["features_once"] is True
    assert "once" in planned["features"]


def _unwrapped(capsys):
    return " ".join(capsys.readouterr().out.split())


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
    made_long_ago(files)
    read = []
    real = known_files.sha256_file
    monkeypatch.setattr(known_files, "sha256_file", lambda path: read.append(str(path)) or real(path))
    paths = [str(file) for file in files]
    first = content_hashes(paths)
    assert content_hashes(paths) == first
    assert len(read) == 3
    files[1].write_text("other")
    made_long_ago([files[1]], 2)
    assert content_hashes(paths)[1] != first[1]
    assert read[3:] == [paths[1]]
    files[2].write_text("young")  # changed just now: not trusted yet
    content_hashes(paths)
    content_hashes(paths)
    assert read[4:] == [paths[2]] * 2
    assert flashtask(["cache", "clear", "files"]) == 0
    assert content_hashes(paths)[0] == first[0]
    assert len(read) == 9


@pytest.mark.long
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


@pytest.mark.long
def test_the_time_of_a_pass_does_not_count_twice(tmp_path, folders):
    started = time.monotonic()
    trainer, _ = fit(tmp_path, folders, "run")
    assert sum(row["seconds"] for row in trainer.fit_run.history) <= time.monotonic() - started
