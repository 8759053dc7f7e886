"""Features of a frozen backbone over several processes: each image once over all of them, heads as of one process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from small import colour_folders

from flashtask import Callback, ImageClassificationData, ImageClassifier, Trainer
from flashtask.core.feature_store import FeatureStore
from flashtask.core.preprocessing import Preprocessing

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
    options = {"backbone": "timm/test_vit", "pretrained": False, "learning_rate": 1e-2, "optimizer": "sgd", **options}
    return ImageClassifier(**options)


def data(folders, processes, **options):
    """With six images a step, whatever the number of processes."""
    made = ImageClassificationData.from_folders(*folders, **{"batch_size": 6 // processes, "num_workers": 0, **options})
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    return made


def trainer_of(tmp_path, processes, name, distribution="ddp_spawn", **options):
    several = {"devices": processes, "strategy": distribution} if processes > 1 else {}
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


def test_each_image_goes_through_the_backbone_once_over_all_processes(tmp_path, folders, monkeypatch, capfd):
    found = fit(tmp_path, folders, 3, "several")
    said = capfd.readouterr().err
    assert said.count("computing the features of 14 training images") == 1
    assert said.count("computing the features of 6 validation images") == 1
    assert said.count("kept in the cache") == 2
    assert sorted(found[2]) == [6, 7, 7]
    assert [entry.about["samples"] for entry in FeatureStore().entries()].count(14) == 1
    again = fit(tmp_path, folders, 2, "again")
    assert again[2] == [0, 0]
    assert capfd.readouterr().err.count("are in the cache") == 2
    apart(monkeypatch, tmp_path, "of one")
    expected = fit(tmp_path, folders, 1, "one")
    assert_same(found, expected)
    assert_same(again, expected)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "views"), [(("freeze_unfreeze", 2), "auto"), ("freeze", 2)])
def test_features_serve_the_frozen_epochs_and_each_view(tmp_path, folders, monkeypatch, strategy, views):
    options = {"strategy": strategy, "feature_cache": views, "max_epochs": 3}
    settings = {"augment": "light"} if views == 2 else {}
    found = fit(tmp_path, folders, 2, "several", settings=settings, **options)
    # Then an epoch on images, of whose last batch two fill the second process's step, or the second view.
    assert sum(found[2]) == (IMAGES + IMAGES + 2 if views == "auto" else IMAGES + 14)
    apart(monkeypatch, tmp_path, "of one")
    assert_same(found, fit(tmp_path, folders, 1, "one", settings=settings, **options))


@pytest.mark.long
def test_stages_use_and_leave_features_in_every_process(tmp_path, folders, capfd):
    _, module, _ = fit(tmp_path, folders, 2, "first")
    others = colour_folders(tmp_path / "others", each=2)
    found = {}
    for name, stage, part, folder, processes in (
        ("known", "validate", "val_folder", folders[1], 2),
        ("computed", "test", "test_folder", others, 2),
        ("again", "test", "test_folder", others, 2),
        ("plain", "test", "test_folder", others, 1),
    ):
        counted = Counted()
        cache = False if name == "plain" else "auto"
        trainer = trainer_of(tmp_path, processes, name, callbacks=[counted], feature_cache=cache)
        made = ImageClassificationData.from_folders(**{part: folder}, batch_size=3, num_workers=0)
        made.preprocessing = Preprocessing(input_size=(3, 32, 32))
        (metrics,) = getattr(trainer, stage)(module, datamodule=made)
        found[name] = (counted.by_process, metrics)
    assert [found[name][0] for name in ("known", "computed", "again", "plain")] == [[0, 0], [2, 2], [0, 0], [4]]
    assert found["again"][1] == pytest.approx(found["plain"][1], abs=TOLERANCE)
    assert found["computed"][1] == pytest.approx(found["plain"][1], abs=TOLERANCE)
    assert capfd.readouterr().err.count("once for this model's backbone") == 1


# ---- machines that share no files, processes that are not alike


class Machines(Callback):
    """Each process is on a machine of its own, with a cache of its own."""

    def __init__(self, root):
        self.root = root

    def setup(self, trainer, module, stage):
        rank = trainer.strategy.global_rank
        os.environ["FLASHTASK_CACHE"] = str(self.root / str(rank))
        trainer.strategy.process = replace(trainer.strategy.process, local_rank=0, local_world_size=1)


def stored(root, machine):
    return {entry.key for entry in FeatureStore(root / str(machine) / "features").entries()}


@pytest.mark.long
def test_what_one_machine_has_alone_is_sent_to_the_others(tmp_path, folders, monkeypatch):
    root = tmp_path / "machines"
    machines = Machines(root)
    first = fit(tmp_path, folders, 2, "first", callbacks=[machines])
    keys = stored(root, 0)
    assert len(keys) == 2
    assert stored(root, 1) == keys
    for machine, key in enumerate(sorted(keys)):  # each lacks something that the other has
        FeatureStore(root / str(machine) / "features").remove(key)
    second = fit(tmp_path, folders, 2, "second", callbacks=[machines])
    assert second[2] == [0, 0]
    assert stored(root, 0) == stored(root, 1) == keys
    apart(monkeypatch, tmp_path, "of one")
    expected = fit(tmp_path, folders, 1, "one")
    assert_same(first, expected)
    assert_same(second, expected)


@pytest.mark.long
def test_where_one_process_cannot_use_features_none_does(tmp_path, folders, capfd):
    class Watching(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert batch[0].shape[1:] == (3, 32, 32)

    class InOne(Callback):
        def setup(self, trainer, module, stage):
            if trainer.strategy.global_rank == 1:
                trainer.active_run.callbacks.append(Watching())

    assert sum(fit(tmp_path, folders, 2, "run", callbacks=[InOne()])[2]) > IMAGES
    said = capfd.readouterr().err
    assert said.count("features are computed again in each epoch: Watching.on_train_batch_end reads batches") == 1


class Perturbed(Callback):
    """In the second process the backbone is another one, from the given hook on."""

    def __init__(self, hook):
        setattr(self, hook, self.perturb)

    @torch.no_grad()
    def perturb(self, trainer, module, stage=None):
        if trainer.strategy.global_rank == 1:
            for value in module.backbone.parameters():
                value.add_(torch.randn_like(value))


@pytest.mark.long
def test_features_are_those_of_the_first_process_s_backbone(tmp_path, folders, monkeypatch):
    found = fit(tmp_path, folders, 2, "several", callbacks=[Perturbed("on_fit_start")])
    apart(monkeypatch, tmp_path, "of one")
    assert_same(found, fit(tmp_path, folders, 1, "one"))


@pytest.mark.long
def test_a_model_that_each_process_has_drawn_at_random_is_that_of_the_first(tmp_path, folders):
    found = []
    for processes in (1, 2):
        trainer = trainer_of(tmp_path, processes, "run", callbacks=[Perturbed("setup")], feature_cache=False)
        made = data(folders, processes)
        module = model(labels=("blue", "red"))
        found += trainer.validate(module, datamodule=made)
    assert found[1] == pytest.approx(found[0], abs=TOLERANCE)


@pytest.mark.long
def test_a_signal_to_one_process_in_the_middle_of_a_pass_stops_all(tmp_path, folders):
    class Stops(Callback):
        def setup(self, trainer, module, stage):
            if trainer.strategy.global_rank == 1:
                module.backbone.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, folders, 2, "run", callbacks=[Stops()])
    assert caught.value.code == 143
    assert (tmp_path / "run" / "last.ckpt").exists()
    assert not FeatureStore().entries()


# ---- closed-form heads


@pytest.mark.long
@pytest.mark.parametrize("cache", ["auto", pytest.param(False, marks=pytest.mark.long)])
def test_a_head_that_is_solved_is_that_of_one_process(tmp_path, folders, monkeypatch, cache):
    """14 images are two batches of six and one of two: a process that has nothing left of it adds nothing."""
    found = fit(tmp_path, folders, 3, "several", module=model(head="prototype"), feature_cache=cache)
    apart(monkeypatch, tmp_path, "of one")
    expected = fit(tmp_path, folders, 1, "one", module=model(head="prototype"), feature_cache=cache)
    heads = [one.head.state_dict() for _, one, _ in (found, expected)]
    for name, value in heads[1].items():
        torch.testing.assert_close(heads[0][name], value, rtol=1e-4, atol=1e-5)
    rows = [trainer.fit_run.history[-1] for trainer, _, _ in (found, expected)]
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5)


@pytest.mark.long
def test_every_process_solves_on_the_samples_of_one_in_their_order_and_has_the_same_head(tmp_path, folders):
    class Own(ImageClassifier):
        def solve_head(self, features, targets):
            rank = self.trainer.strategy.global_rank
            torch.save((features, targets), tmp_path / f"{rank}.pt")
            said = super().solve_head(features, targets)
            if rank == 1:  # a solver that is not the same everywhere
                torch.nn.init.normal_(self.head.layer.weight)
            return said

        def on_fit_end(self):
            torch.save(self.head.state_dict(), tmp_path / f"head-{self.trainer.strategy.global_rank}.pt")

    found = []
    for processes in (1, 2):
        torch.manual_seed(7)
        module = Own("timm/test_vit", pretrained=False, head="ridge")
        fit(tmp_path, folders, processes, str(processes), module=module, feature_cache=False)
        found.append([torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)])
    ((expected, targets),) = found[0]
    for features, own_targets in found[1]:
        assert torch.equal(own_targets, targets)
        torch.testing.assert_close(features, expected, rtol=0, atol=TOLERANCE)
    heads = [torch.load(tmp_path / f"head-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(heads[1][name], value) for name, value in heads[0].items())
