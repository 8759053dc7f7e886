"""`fsdp`: each process has its share of a model, and everything else is as with one process."""

import copy
import subprocess
import sys

import pytest
import torch
from test_distribution import TOLERANCE, Small, assert_nobody_is_left, run_script, samples
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from flashtask import Callback, EMAWeightAveraging, GradientNormMonitor, Module, StochasticWeightAveraging, Trainer
from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import UsageError
from flashtask.trainer.distribution.blocks import blocks_of
from flashtask.trainer.distribution.sharded import ForkedFullyShardedDataParallel, FullyShardedDataParallel
from flashtask.trainer.placement.strategies import STRATEGIES, resolve_strategy


class Block(nn.Module):
    """Odd sizes, so that the shares of the processes differ."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, inputs):
        Block.calls += 1
        return inputs + torch.tanh(self.layer(self.norm(inputs)))


class Net(Module):
    """A backbone of blocks with BatchNorm before them, and a head; its step calls the module itself."""

    def __init__(self, normalises=False):
        super().__init__()
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)) if normalises else nn.Linear(4, 7)
        self.backbone = nn.Sequential(first, Block(), Block(), Block())
        self.head = nn.Linear(7, 3)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)
        self.log("val_count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def trainer_of(folder, processes, **options):
    several = {"devices": processes, "strategy": "fsdp_spawn"} if processes > 1 else {}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", output_dir=folder, **{"max_epochs": 2, **quiet, **several, **options})


def loaders(count, processes):
    """4 samples a step, whatever the number of processes."""
    size, data = 4 // processes, samples(count)
    return DataLoader(data, batch_size=size, shuffle=True), DataLoader(data, batch_size=size)


def fitted(folder, processes, count, module=None, ckpt_path=None, **options):
    module = module or Net()
    trainer = trainer_of(folder, processes, **options)
    trainer.fit(module, *loaders(count, processes), ckpt_path=ckpt_path)
    return module, trainer


def weights_of(module):
    return torch.cat([one.detach().flatten().float() for one in module.state_dict().values()])


def difference(one, two):
    return (weights_of(one) - weights_of(two)).abs().max()


# ---- the same numbers


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_s114_fsdp_reaches_the_weights_and_metrics_of_one_process(tmp_path, count):
    one, first = fitted(tmp_path / "1", 1, count)
    two, second = fitted(tmp_path / "2", 2, count)
    assert difference(one, Net()) > 0.01
    assert difference(one, two) <= TOLERANCE
    assert second.callback_metrics["val_count"] == count
    assert second.callback_metrics == pytest.approx(first.callback_metrics, abs=TOLERANCE)


@pytest.mark.parametrize("clipping", [{"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}])
def test_accumulated_gradients_are_clipped_as_with_one_process(tmp_path, clipping):
    class Sgd(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    one, _ = fitted(tmp_path / "1", 1, 13, Sgd(), accumulate_grad_batches=3, **clipping)
    two, _ = fitted(tmp_path / "2", 2, 13, Sgd(), accumulate_grad_batches=3, **clipping)
    free, _ = fitted(tmp_path / "3", 1, 13, Sgd(), accumulate_grad_batches=3)
    assert difference(one, two) <= TOLERANCE
    assert difference(one, free) > 0.001


def test_unfreezing_turns_gradients_on_and_shares_nothing_out_anew(tmp_path):
    found = []
    for processes in (1, 2):
        module = Net(normalises=True)
        trainer = trainer_of(tmp_path / str(processes), processes, max_epochs=4)
        phases = {"phases": [{"train": "head", "epochs": 2}, {"train": {"layers": 2}, "epochs": 2}]}
        trainer.finetune(module, *loaders(13, processes), strategy=phases)
        found.append(module)
    assert difference(*found) <= TOLERANCE
    assert not torch.equal(found[1].backbone[3].layer.weight, Net(normalises=True).backbone[3].layer.weight)
    assert torch.equal(found[1].backbone[0][0].weight, Net(normalises=True).backbone[0][0].weight)


def test_blocks_that_are_computed_again_have_the_same_gradients(tmp_path):
    plain, _ = fitted(tmp_path / "1", 2, 8)
    Block.calls = 0
    strategy = ForkedFullyShardedDataParallel(activation_checkpointing=True, auto_wrap_policy={Block})
    again, _ = fitted(tmp_path / "2", 2, 8, strategy=strategy)
    assert difference(plain, again) <= TOLERANCE
    assert Block.calls == 3 * (2 * 4 + 2 + 2 * 2)  # blocks * (twice in each step, sanity check, validation)
    assert "forward" not in vars(again.backbone[1])
