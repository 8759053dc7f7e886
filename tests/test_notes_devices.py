"""The examples of the notes (docs/notes.md): data modules, debugging, GPUs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch as t
from small import Net as WholeNet
from small import digest, loaders, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flashtask as pl
from flashtask import Callback, DeviceStatsMonitor, EarlyStopping, Trainer
from flashtask.core.errors import UsageError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write into the working folder."""
    monkeypatch.chdir(tmp_path)


def steps_of(trainer):
    return list(csv.DictReader((trainer.output_dir / "steps.csv").read_text().splitlines()))


class Counting(Callback):
    """How many batches each part of a run had."""

    def __init__(self):
        self.train, self.val, self.test, self.sanity = 0, 0, 0, 0

    def on_train_batch_end(self, *arguments):
        self.train += 1

    def on_validation_batch_end(self, trainer, *arguments):
        self.sanity += trainer.sanity_checking
        self.val += not trainer.sanity_checking

    def on_test_batch_end(self, *arguments):
        self.test += 1


# ---- Data module


class Data(pl.LightningDataModule):
    """Every method that the notes name, in the order in which it is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def prepare_data(self):
        self.called.append("prepare_data")

    def setup(self, stage):
        self.called.append(f"setup {stage}")

    def teardown(self, stage):
        self.called.append(f"teardown {stage}")

    def _loader(self, name):
        self.called.append(name)
        return loaders()[1]

    def train_dataloader(self):
        return self._loader("train_dataloader")

    def val_dataloader(self):
        return self._loader("val_dataloader")

    def test_dataloader(self):
        return self._loader("test_dataloader")

    def predict_dataloader(self):
        return self._loader("predict_dataloader")


@pytest.mark.parametrize(
    ("stage", "asked"),
    [
        ("fit", ["train_dataloader", "val_dataloader"]),
        ("validate", ["val_dataloader"]),
        ("test", ["test_dataloader"]),
        ("predict", ["predict_dataloader"]),
    ],
)
def test_s79_to_s85_methods_of_a_data_module_are_called_with_the_stage(stage, asked):
    class Net(WholeNet):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    data = Data()
    getattr(Trainer(max_epochs=1), stage)(Net(), datamodule=data)
    assert data.called == ["prepare_data", f"setup {stage}", *asked, f"teardown {stage}"]


# ---- Debugging


def test_s89_fast_dev_run_takes_one_batch_of_everything_and_leaves_nothing(tmp_path):
    counting, stopping = Counting(), EarlyStopping("nothing logs this")
    trainer = Trainer(fast_dev_run=True, callbacks=[counting, stopping])
    trainer.fit(net(), *loaders())
    trainer.test(dataloaders=loaders()[1])
    assert (counting.train, counting.val, counting.test, counting.sanity) == (1, 1, 1, 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    counting = Counting()
    Trainer(fast_dev_run=3, callbacks=[counting]).fit(net(), *loaders())
    assert (counting.train, counting.val) == (3, 3)


def test_s90_epochs_are_shortened_by_share_or_number():
    train, val = loaders(samples=100, batch_size=1)
    counting = Counting()
    trainer = Trainer(limit_train_batches=0.1, limit_val_batches=0.01, max_epochs=2, callbacks=[counting])
    trainer.fit(net().eval(), DataLoader(train.dataset, batch_size=2), val)
    assert (counting.train, counting.val) == (2 * 5, 2 * 1)

    counting = Counting()
    trainer = Trainer(limit_train_batches=10, limit_val_batches=5, max_epochs=2, callbacks=[counting])
    trainer.fit(net(), DataLoader(train.dataset, batch_size=2), val)
    assert (counting.train, counting.val) == (2 * 10, 2 * 5)


@pytest.mark.parametrize(("options", "batches"), [({}, 2), ({"num_sanity_val_steps": 4}, 4)])
def test_s91_validation_is_checked_before_training(options, batches):
    counting = Counting()
    Trainer(max_epochs=1, callbacks=[counting], **options).fit(net(), *loaders())
    assert counting.sanity == batches


@pytest.mark.parametrize(("few", "batches"), [(0.01, 1), (10, 10)])
def test_s92_a_small_part_of_the_data_serves_all_of_training_and_test_unshuffled(few, batches):
    seen = {"train": [], "test": []}

    class Net(WholeNet):
        def training_step(self, batch, batch_idx):
            seen["train"].append(batch[0])
            return super().training_step(batch, batch_idx)

        def test_step(self, batch, batch_idx):
            seen["test"].append(batch[0])
            super().test_step(batch, batch_idx)

    train, val = loaders(samples=200, batch_size=2)
    counting = Counting()
    trainer = Trainer(overfit_batches=few, max_epochs=2, callbacks=[counting])
    trainer.fit(Net(), train, val)
    trainer.test()
    first = train.dataset.tensors[0][: 2 * batches]
    assert torch.equal(torch.cat(seen["train"]), torch.cat([first, first]))
    assert torch.equal(torch.cat(seen["test"]), first)
    assert (counting.val, counting.sanity) == (0, 0)


def test_s93_the_norm_of_the_gradients_is_logged():
    norms = []

    class Net(WholeNet):
        def on_before_zero_grad(self, optimizer):
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    trainer = Trainer(track_grad_norm=2, max_epochs=1, log_every_n_steps=1)
    trainer.fit(Net(), *loaders())
    (name,) = [name for name in steps_of(trainer)[0] if "norm" in name]
    assert [float(row[name]) for row in steps_of(trainer)] == pytest.approx(norms, rel=1e-4)


def test_s94_the_state_of_the_device_is_logged():
    pytest.importorskip("psutil")
    trainer = Trainer(callbacks=[DeviceStatsMonitor()], max_epochs=1, log_every_n_steps=1)
    trainer.fit(net(), *loaders())
    names = [name for name in steps_of(trainer)[0] if name.startswith("device/")]
    assert names
    assert all(float(row[name]) >= 0 for row in steps_of(trainer) for name in names)


# ---- GPUs


class BinaryNet(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(28 * 28, 1)
        self.loss_fn = nn.BCELoss()

    def forward(self, batch_x):
        y_hat = t.sigmoid(self.fc(batch_x))
        return t.squeeze(y_hat, dim=1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self(inputs)
        loss = self.loss_fn(outputs, targets.to(t.float32))
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return t.optim.SGD(self.parameters(), lr=0.1)


class BinaryData(pl.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        inputs = t.randn(64, 28 * 28, generator=t.Generator().manual_seed(0))
        self.trainset = TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def train_dataloader(self):
        return DataLoader(self.trainset, batch_size=self.hparams.batch_size)


@no_gpu
def test_s95_s99_the_same_code_trains_without_a_gpu(capsys):
    """`.to(torch.float32)` is fine: it says nothing of a device."""

    def main():
        model = BinaryNet()
        dm = BinaryData(batch_size=16)
        trainer = Trainer(gpus=-1, max_epochs=5)
        trainer.fit(model, dm)
        return trainer

    trainer = main()
    losses = [row["train_loss"] for row in trainer.fit_run.history]
    assert losses[-1] < losses[0]
    assert "there is no CUDA device here, so the CPU is used" in capsys.readouterr().err


def test_s102_ddp_with_all_gpus_is_one_process_where_there_is_none(capsys):
    trainer = Trainer(gpus=-1, strategy="ddp", max_epochs=1)
    trainer.fit(BinaryNet(), BinaryData(batch_size=16))
    assert trainer.global_step > 0
    assert (trainer.strategy.name, trainer.strategy.world_size) == ("ddp", 1)
    assert "there is no CUDA device here, so the CPU is used" in capsys.readouterr().err


@pytest.mark.long
def test_s102_ddp_starts_the_file_again_with_its_arguments_and_these_variables(tmp_path):
    """`MASTER_ADDR=... MASTER_PORT=... WORLD_SIZE=2 NODE_RANK=0 LOCAL_RANK=0 python my_file.py --devices 2 --etc`"""
    (tmp_path / "my_file.py").write_text(
        """
import os, sys
from test_notes_devices import BinaryData, BinaryNet
from flashtask import Trainer

def main():
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    trainer = Trainer(accelerator="cpu", devices=options["--devices"], strategy="ddp", max_epochs=1, logger=False)
    trainer.fit(BinaryNet(), BinaryData(batch_size=16))
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK")
    print(*(os.environ[name] for name in names), *sys.argv[1:])

if __name__ == "__main__":
    main()
"""
    )
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, "my_file.py", "--devices", "2", "--etc", "etc"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = sorted((line.split() for line in done.stdout.splitlines()), key=lambda words: words[3])
    assert first[:1] + first[2:] == ["127.0.0.1", "2", "0", "--devices", "2", "--etc", "etc"]
    assert second[:1] + second[2:] == ["127.0.0.1", "2", "1", "--devices", "2", "--etc", "etc"]
    assert first[1] == second[1]


def test_s95_new_tensors_take_the_type_of_old_ones_and_buffers_move_along():
    class Net(WholeNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("sigma", torch.eye(3))

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            noise = torch.zeros(inputs.shape).type_as(inputs)
            outputs = self(inputs + noise) @ self.sigma
            assert outputs.dtype == noise.dtype == self.sigma.dtype == torch.float64
            return nn.functional.cross_entropy(outputs, targets)

    trainer = Trainer(max_epochs=1, precision=64)
    trainer.fit(Net(), loaders()[0])
    assert trainer.global_step == 7


def test_s96_with_one_process_there_is_no_sampler_to_replace():
    digests = set()
    for flag in (True, False):
        model = net()
        Trainer(replace_sampler_ddp=flag, max_epochs=1).fit(model, *loaders())
        digests.add(digest(model))
    assert len(digests) == 1


def test_s98_values_are_synchronized_or_logged_by_the_first_process_alone():
    class Net(WholeNet):
        def validation_step(self, batch, batch_idx):
            val = float(batch_idx)
            self.log("my_custom_metric", val, on_step=True, on_epoch=True, sync_dist=True)
            self.log("val_loss", 1.0)

        def test_step(self, batch, batch_idx):
            redval = 0.5
            if self.trainer.is_global_zero:
                self.log("my_reduced_metric", redval, rank_zero_only=True)

    trainer = Trainer(max_epochs=1, limit_val_batches=5)
    trainer.fit(Net(), *loaders(samples=40))
    assert trainer.callback_metrics["my_custom_metric_epoch"] == 2.0
    assert trainer.test(dataloaders=loaders()[1]) == [{"my_reduced_metric": 0.5}]


@no_gpu
@pytest.mark.parametrize(
    "options",
    [{"gpus": 3}, {"gpus": [0, 1, 2]}, {"gpus": 3, "auto_select_gpus": True}, {"gpus": [1, 3]}],
    ids=["3", "[0, 1, 2]", "3 unoccupied", "[1, 3]"],
)
def test_s99_s100_gpus_that_are_not_here_are_an_error_that_says_what_to_do(options):
    with pytest.raises(UsageError, match="the CUDA devices here are: none") as told:
        Trainer(**options)
    assert "gpus=0 for the CPU" in str(told.value)


@no_gpu
def test_s99_all_gpus_or_none_are_the_cpu_here():
    for gpus in (-1, 0):
        trainer = Trainer(gpus=gpus, max_epochs=1)
        trainer.fit(net(), *loaders())
        assert trainer.fit_run.device == torch.device("cpu")
