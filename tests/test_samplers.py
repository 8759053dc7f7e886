"""`sampler`: shares of classes, draws from (seed, epoch), processes that share one order, and exact resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_trees import write_tree
from small import digest, quiet
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from flashtask import Callback, ImageClassificationData, ImageClassifier
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.seeded_sampler import EpochSampler, WeightedSampler
from flashtask.core.seeding import SeededDataset
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.trainer.data_loaders import OrderedBatches, rebuild_loader


class Numbers(SeededDataset):
    """Each sample is its index and the seed that it was drawn with."""

    generators = ()

    def __len__(self):
        return 60

    def sample(self, key):
        return torch.tensor([key.index, key.seed])


def loader(sampler, batch_size=8):
    return DataLoader(Numbers(), batch_size=batch_size, sampler=EpochSampler(sampler))


def epoch_of(sampler, seed=0, epoch=0, start=0, batch_size=8, **options):
    rebuilt = rebuild_loader(loader(sampler, batch_size), seed=seed, training=True, **options)
    rebuilt.batch_sampler.set_position(epoch, start=start)
    return torch.cat(list(rebuilt))


SAMPLERS = {
    "weighted": lambda: WeightedSampler(np.arange(60)),
    "torch weighted": lambda: WeightedRandomSampler([float(i) for i in range(60)], 60, generator=torch.Generator()),
    "torch subset": lambda: SubsetRandomSampler(range(0, 60, 2)),
    "torch random": lambda: RandomSampler(range(60), replacement=True, num_samples=100),
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_order_depends_on_seed_and_epoch_alone(name):
    first = epoch_of(SAMPLERS[name](), seed=3, epoch=1)
    torch.manual_seed(99)
    assert torch.equal(epoch_of(SAMPLERS[name](), seed=3, epoch=1), first)
    assert not torch.equal(epoch_of(SAMPLERS[name](), seed=3, epoch=2), first)
    assert not torch.equal(epoch_of(SAMPLERS[name](), seed=4, epoch=1), first)
    assert torch.equal(epoch_of(SAMPLERS[name](), seed=3, epoch=1, start=16), first[16:])
    again = first[first[:, 0] == first[:, 0].mode().values]
    assert len(again[:, 1].unique()) == len(again)  # the same sample is augmented otherwise each time


@pytest.mark.parametrize("name", SAMPLERS)
def test_processes_share_one_order(name):
    whole = epoch_of(SAMPLERS[name](), epoch=1, batch_size=8)
    parts = [rebuild_loader(loader(SAMPLERS[name](), 4), seed=0, training=True, process=(rank, 2)) for rank in range(2)]
    for part in parts:
        part.batch_sampler.set_position(1)
    together = torch.cat([batch for pair in zip(*parts, strict=True) for batch in pair])
    assert torch.equal(together[: len(whole)], whole)


def test_weights_are_the_shares_of_samples():
    weights = np.array([0.0, 1.0, 3.0] * 200)
    order = OrderedBatches(600, 50, shuffle=True, drop_last=False, seed=0, seeded=False, sampler=None)
    assert order.length == 600
    indices = np.concatenate([EpochSampler(WeightedSampler(weights)).indices(0, epoch) for epoch in range(10)])
    shares = np.bincount(indices % 3, minlength=3) / len(indices)
    assert shares == pytest.approx([0, 0.25, 0.75], abs=0.02)


class Seen(Callback):
    """The targets of all training batches."""

    def __init__(self):
        self.targets = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.targets += batch[1].tolist()


def tree(tmp_path):
    return write_tree(tmp_path / "train", {"many": 36, "few": 4}, (24, 24))


def fit(tmp_path, epochs=2, strategy="no_freeze", data=None, seen=None, ckpt=None, **options):
    torch.manual_seed(0)
    with building_without_weights():
        model = ImageClassifier("timm/test_resnet", image_size=32)
    options = {"sampler": "balanced", "batch_size": 8, "augment": "light", **options}
    data = data or ImageClassificationData.from_folders(tree(tmp_path), **options)
    trainer = quiet(tmp_path, max_epochs=epochs, seed=1, logger=False, callbacks=[seen] if seen else [])
    trainer.finetune(model, datamodule=data, strategy=strategy, ckpt_path=ckpt, restore_best=False)
    return model, trainer


@pytest.mark.long
def test_a_balanced_sampler_gives_the_classes_equal_shares(tmp_path):
    seen = Seen()
    fit(tmp_path, epochs=6, seen=seen)
    assert len(seen.targets) == 6 * 40
    assert np.mean(seen.targets) == pytest.approx(0.5, abs=0.1)  # else 0.9


class Stops(Callback):
    """Ends the fit in the middle of the second epoch, as a signal would."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            trainer.save_checkpoint(trainer.default_root_dir / "killed.ckpt")
            trainer.current_fit.leave()


@pytest.mark.long
def test_a_run_that_was_stopped_in_an_epoch_goes_on_exactly(tmp_path):
    whole, _ = fit(tmp_path)
    root = tmp_path / "train"
    options = {"sampler": "balanced", "batch_size": 8, "augment": "light"}
    fit(tmp_path, data=ImageClassificationData.from_folders(root, **options), seen=Stops())
    again = ImageClassificationData.from_folders(root, **options)
    resumed, trainer = fit(tmp_path, data=again, ckpt=tmp_path / "killed.ckpt")
    assert trainer.global_step == 10
    assert digest(resumed) == digest(whole)


@pytest.mark.long
def test_the_feature_cache_takes_samples_as_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    root, heads = tree(tmp_path), []
    for cached in (True, False):
        torch.manual_seed(0)
        with building_without_weights():
            model = ImageClassifier("timm/test_resnet", class_weights="balanced", loss_fn="focal")
        data = ImageClassificationData.from_folders(root, sampler="balanced", batch_size=8)
        trainer = quiet(tmp_path, max_epochs=2, seed=1, feature_cache=cached)
        trainer.finetune(model, datamodule=data, strategy="freeze", restore_best=False)
        heads.append(model.head.state_dict())
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_weights_of_rows_draw_samples_and_then_do_not_weight_the_loss(tmp_path):
    root = write_tree(tmp_path / "images", {"a": 10, "b": 10}, (24, 24))
    rows = [f"{path},{path.parent.name},{3 if path.parent.name == 'a' else 1}" for path in sorted(root.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("file,label,w\n" + "\n".join(rows))
    make = ImageClassificationData.from_csv
    table = {"train_file": tmp_path / "t.csv", "weight_field": "w", "batch_size": 5}
    seen = Seen()
    fit(tmp_path, epochs=8, seen=seen, data=make("file", "label", **table, sampler="weighted"))
    assert np.mean(seen.targets) == pytest.approx(0.25, abs=0.1)
    with pytest.raises(UsageError, match="needs weights of the samples"):
        fit(tmp_path, data=make("file", "label", train_file=tmp_path / "t.csv", sampler="weighted"))


def test_what_is_no_sampler_is_refused(tmp_path):
    root = tree(tmp_path)
    with pytest.raises(UnknownNameError, match="no sampler named 'balancd'") as caught:
        ImageClassificationData.from_folders(root, sampler="balancd")
    assert "'balanced'" in caught.value.fix
    for wrong in (3, DistributedSampler(range(4), num_replicas=2, rank=0)):
        with pytest.raises(UsageError):
            ImageClassificationData.from_folders(root, sampler=wrong)


@pytest.mark.parametrize(("indices", "index"), [([0, 1, 60], 60), ([3, -1], -1)])
def test_an_index_that_no_sample_has_is_named(indices, index):
    with pytest.raises(UsageError, match=f"SubsetRandomSampler gave the index {index}, and there are 60 training"):
        epoch_of(SubsetRandomSampler(indices))
