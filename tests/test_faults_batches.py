"""A last batch of one sample: BatchNorm cannot train on it, so it joins the batch before."""

import pytest
import torch
from small import digest, loaders, net

from flashtask import Callback, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.data_loaders import OrderedBatches

SETTINGS = {"seed": 3, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}


class Sizes(Callback):
    """The number of samples in each batch that a fit trained on."""

    def on_fit_start(self, trainer, module):
        """Of this fit."""
        self.sizes = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """A batch of inputs and targets."""
        self.sizes.append(len(batch[0]))


def trained(samples, batch_size=8, module=None, strategy=None, **settings):
    """(sizes of batches, the trainer, the module) of a fit on so many samples."""
    sizes, module = Sizes(), module or net()
    trainer = Trainer(**{**SETTINGS, "max_epochs": 2, "enable_checkpointing": False, **settings}, callbacks=[sizes])
    train, _ = loaders(samples, batch_size)
    if strategy is None:
        trainer.fit(module, train)
    else:
        trainer.finetune(module, train, strategy=strategy)
    return sizes.sizes, trainer, module


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(("samples", "batch_size", "expected"), [(17, 16, [17]), (17, 8, [8, 9]), (5, 2, [2, 3])])
def test_a_sample_that_is_left_over_joins_the_batch_before(accumulate, samples, batch_size, expected, tmp_path, capsys):
    settings = {"output_dir": tmp_path / "run", "accumulate_grad_batches": accumulate}
    sizes, trainer, _ = trained(samples, batch_size, **settings)
    assert sizes == expected * 2
    assert trainer.global_step == 2 * -(-len(expected) // accumulate) == trainer.fit_run.total_steps
    said = f"the last batch of an epoch has {batch_size + 1} samples: BatchNorm"
    assert "".join(capsys.readouterr()).count(said) == 1


@pytest.mark.parametrize("strategy", ["no_freeze", "freeze_unfreeze:1", "gradual:1", "norm_only"])
def test_whatever_the_strategy_trains(strategy, tmp_path):
    sizes, *_ = trained(17, strategy=strategy, output_dir=tmp_path / "run", max_epochs=3)
    assert sizes == [8, 9] * 3


def test_a_batchnorm_in_the_head_counts_and_a_frozen_one_does_not(tmp_path):
    sizes, *_ = trained(17, strategy="freeze", output_dir=tmp_path / "frozen")
    assert sizes == [8, 8, 1] * 2
    module = net()
    module.head = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    sizes, *_ = trained(17, module=module, strategy="freeze", output_dir=tmp_path / "head")
    assert sizes == [8, 9] * 2


def test_without_batchnorm_and_with_two_left_over_batches_are_as_ever(tmp_path, capsys):
    sizes, *_ = trained(18, output_dir=tmp_path / "two")
    assert sizes == [8, 8, 2] * 2
    module = net()
    module.backbone[2] = torch.nn.LayerNorm(8)
    sizes, *_ = trained(17, module=module, output_dir=tmp_path / "none")
    assert sizes == [8, 8, 1] * 2
    assert "BatchNorm cannot" not in "".join(capsys.readouterr())


def test_a_run_that_was_stopped_before_the_joined_batch_goes_on_with_it(tmp_path):
    _, _, whole = trained(17, output_dir=tmp_path / "whole")
    settings = {"output_dir": tmp_path / "run", "enable_checkpointing": True}
    trained(17, max_steps=1, **settings)
    sizes, module = Sizes(), net(5)
    trainer = Trainer(**SETTINGS, **settings, max_epochs=2, callbacks=[sizes])
    trainer.fit(module, loaders(17)[0], ckpt_path=tmp_path / "run" / "last.ckpt")
    assert sizes.sizes == [9, 8, 9]
    assert digest(module) == digest(whole)


def test_a_plan_tells_it(tmp_path):
    trainer = Trainer(**SETTINGS, output_dir=tmp_path, max_epochs=3)
    planned = trainer.plan(net(), loaders(17)[0], strategy="no_freeze", measure=False)
    assert (planned.batches, planned.steps) == (2, 6)
    assert planned.remark.startswith("the last batch of an epoch has 9 samples")
    assert trainer.plan(net(), loaders(16)[0], strategy="no_freeze", measure=False).remark == ""


@pytest.mark.parametrize("size", [1, 8])
def test_a_batch_of_one_that_cannot_be_avoided_is_told_by_name(size, tmp_path):
    samples = 1 if size == 8 else 4
    with pytest.raises(UsageError, match="BatchNorm cannot train on a batch of one") as caught:
        trained(samples, batch_size=size, output_dir=tmp_path / "run")
    assert "at least 2" in caught.value.fix
    batches = [(torch.randn(1, 4), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(UsageError, match="BatchNorm cannot"):
        Trainer(**SETTINGS, output_dir=tmp_path / "own", max_epochs=1).fit(net(), batches)


@pytest.mark.parametrize(("own", "processes"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (3, 3)])
def test_every_sample_has_its_turn_once_and_nobody_has_one_alone(own, processes):
    settings = {"shuffle": True, "drop_last": False, "seed": 3, "seeded": False, "fills": True, "joins_single": True}
    for length in range(1, 30):
        parts = [OrderedBatches(length, own, process=(rank, processes), **settings) for rank in range(processes)]
        batches = [list(part) for part in parts]
        assert {len(part) for part in parts} == {len(one) for one in batches}, "they take the same number of steps"
        first, seen = 0, []
        for together in zip(*batches, strict=True):
            shares = [part.share(first) for part in parts]
            assert {whole for _, whole in shares} == {sum(share for share, _ in shares)}
            for batch, (share, _) in zip(together, shares, strict=True):
                seen += batch[:share]
                assert len(batch) == share or share == 0
                assert len(batch) > 1 or own == 1 or length == 1
            first += shares[0][1]
        assert sorted(seen) == list(range(length))
        if own > 1:
            alone = OrderedBatches(length, own * processes, **settings)
            assert len(alone) == len(parts[0]), "as many steps as one process takes"


def test_a_last_sample_that_a_loader_drops_stays_dropped():
    order = OrderedBatches(9, 4, shuffle=False, drop_last=True, seed=0, seeded=False, joins_single=True)
    assert [len(batch) for batch in order] == [4, 4]
    assert (len(order), order.joined) == (2, None)
