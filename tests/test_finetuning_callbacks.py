"""Finetuning as a callback: `BaseFinetuning` and `BackboneFinetuning`."""

from __future__ import annotations

import pytest
import torch
from small import Net, digest, loaders

from flashtask import BackboneFinetuning, BaseFinetuning, Trainer
from flashtask.core.errors import UsageError


def quiet(tmp_path, *callbacks, **options) -> Trainer:
    given = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, **options}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **given)


class Filtering(Net):
    """Its optimizer has what wants gradients when it is made; notes what trains in each epoch, and at which rates."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            groups = self.trainer.optimizers[0].param_groups
            trains = sorted({name.split(".")[0] for name, p in self.named_parameters() if p.requires_grad})
            self.seen.append((trains, [group["lr"] for group in groups]))


def made() -> Filtering:
    torch.manual_seed(1)
    return Filtering()


class AtEpoch(BaseFinetuning):
    def __init__(self, epoch=1):
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, current_epoch, optimizer):
        if current_epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=5.0)


class WithNumber(AtEpoch):
    """As Lightning 1.x calls it."""

    def finetune_function(self, pl_module, current_epoch, optimizer, opt_idx):
        assert opt_idx == 0
        super().finetune_function(pl_module, current_epoch, optimizer)


@pytest.mark.parametrize("kind", [AtEpoch, WithNumber])
def test_a_schedule_of_ones_own_freezes_and_unfreezes(tmp_path, kind):
    module = made()
    quiet(tmp_path, kind(), max_epochs=3).fit(module, loaders(16)[0])
    assert module.seen == [(["head"], [0.1]), *[(["backbone", "head"], [0.1, 0.02])] * 2]
    assert all(p.requires_grad for p in module.parameters())


def test_what_is_frozen_stays_as_it_is_with_its_statistics(tmp_path):
    module = made()
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    quiet(tmp_path, AtEpoch(9), max_epochs=2).fit(module, loaders(16)[0])
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())
    quiet(tmp_path, AtEpoch(0), max_epochs=1).fit(module, loaders(16)[0])
    assert not torch.equal(module.backbone[2].running_mean, before["2.running_mean"])


def test_the_rate_of_a_backbone_grows_up_to_that_of_the_head(tmp_path, capsys):
    module = made()
    callback = BackboneFinetuning(1, lambda_func=lambda epoch: 4.0, train_bn=False, verbose=True)
    quiet(tmp_path, callback, max_epochs=5).fit(module, loaders(16)[0])
    rates = [group[1:] for _, group in module.seen]
    assert rates == [[], [pytest.approx(0.01)], [pytest.approx(0.04)], [0.1], [0.1]]
    assert module.seen[0][0] == ["head"]
    assert "epoch 1: learning rate 0.1, of the backbone 0.01" in capsys.readouterr().err


def test_batchnorm_of_a_frozen_backbone_may_train(tmp_path):
    module = made()
    before = module.backbone[2].running_mean.clone(), module.backbone[0].weight.detach().clone()
    quiet(tmp_path, BackboneFinetuning(5), max_epochs=1).fit(module, loaders(16)[0])
    assert module.seen == [(["backbone", "head"], [0.1])]
    assert not torch.equal(module.backbone[2].running_mean, before[0])
    assert torch.equal(module.backbone[0].weight, before[1])


def test_a_resumed_run_has_the_groups_that_were_added(tmp_path):
    """Two epochs after two give the bits of four, whether the backbone was unfrozen before or after the stop."""
    for epoch in (1, 2):
        whole, first, second = made(), made(), made()
        quiet(tmp_path, BackboneFinetuning(epoch), max_epochs=4).fit(whole, loaders(24)[0])
        run = tmp_path / str(epoch)
        quiet(tmp_path, BackboneFinetuning(epoch), max_epochs=2, output_dir=run).fit(first, loaders(24)[0])
        again = quiet(tmp_path, BackboneFinetuning(epoch), max_epochs=4, output_dir=run)
        again.fit(second, loaders(24)[0], ckpt_path="last")
        assert digest(whole) == digest(second)
        assert whole.seen[2:] == second.seen


def test_modules_are_flattened_and_filtered():
    module = made()
    flat = BaseFinetuning.flatten_modules([module.backbone, torch.nn.ModuleDict({"head": module.head})])
    assert flat == [*module.backbone, module.head]
    BaseFinetuning.freeze(module.backbone)
    norm = list(module.backbone[2].parameters())
    assert list(BaseFinetuning.filter_params(module.backbone)) == norm
    assert list(BaseFinetuning.filter_params(module.backbone, train_bn=False)) == []
    assert len(list(BaseFinetuning.filter_params(module.backbone, requires_grad=False))) == 4
    optimizer = torch.optim.SGD(norm, lr=0.1)
    rest = BaseFinetuning.filter_on_optimizer(optimizer, module.backbone.parameters())
    assert len(rest) == 4
    BaseFinetuning.make_trainable(module.backbone)
    assert all(p.requires_grad for p in module.parameters())


def test_a_schedule_that_is_not_written_is_reported(tmp_path):
    with pytest.raises(UsageError, match="BaseFinetuning has no freeze_before_training"):
        quiet(tmp_path, BaseFinetuning(), max_epochs=1).fit(made(), loaders(16)[0])
