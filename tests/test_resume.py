"""A run that was interrupted, killed or resumed ends with the same bits as one that never was."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
from small import Net, digest, loaders, net
from torch.utils.data import DataLoader

from flashtask import Callback, DataModule, Trainer, read_checkpoint, seeded
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError


def trainer(folder: Path, **options) -> Trainer:
    options = {"max_epochs": 4, "seed": 3, **options}
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def state_digest(path: Path) -> str:
    """Weights, buffers, optimizer, schedule and random state of a checkpoint, as one hash."""
    content = read_checkpoint(path)
    kept = {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "random", "global_step")}
    return digest_of(kept)


def digest_of(value) -> str:
    import hashlib

    found = hashlib.sha256()

    def walk(part):
        if isinstance(part, dict):
            for key in part:
                found.update(repr(key).encode())
                walk(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                walk(item)
        elif isinstance(part, torch.Tensor):
            found.update(part.contiguous().view(torch.uint8).numpy().tobytes() if part.ndim else part.numpy().tobytes())
        else:
            found.update(repr(part).encode())

    walk(value)
    return found.hexdigest()


class SignalAt(Callback):
    """Sends this process a signal in a hook of the run."""

    def __init__(self, hook: str, count: int, number: int) -> None:
        self.count, self.number = count, number
        setattr(self, f"on_{hook}", self._hook)

    def _hook(self, *arguments) -> None:
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer(folder).fit(net(), *loaders())
    return state_digest(folder / "last.ckpt")


def test_a_run_continued_after_an_epoch_has_the_same_bits(tmp_path, undisturbed):
    trainer(tmp_path, max_epochs=2).fit(net(), *loaders())
    trainer(tmp_path).fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert state_digest(tmp_path / "last.ckpt") == undisturbed


@pytest.mark.long
@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("train_batch_start", 3),
        ("train_batch_end", 10),
        ("before_optimizer_step", 7),
        ("validation_batch_end", 4),
        ("epoch_end", 2),
        ("train_batch_start", 1),
    ],
)
def test_a_run_stopped_by_sigterm_anywhere_continues_with_the_same_bits(tmp_path, undisturbed, hook, count):
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, callbacks=SignalAt(hook, count, signal.SIGTERM)).fit(net(), *loaders())
    assert stopped.value.code == 143
    trainer(tmp_path).fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert state_digest(tmp_path / "last.ckpt") == undisturbed
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3"]


def test_ctrl_c_raises_keyboard_interrupt_after_saving(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=SignalAt("train_batch_end", 9, signal.SIGINT)).fit(net(), *loaders())
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert (saved["epoch"], saved["progress"]["samples"], saved["global_step"]) == (1, 16, 9)
    trainer(tmp_path).fit(net(seed=9), *loaders(), ckpt_path="last")
    assert state_digest(tmp_path / "last.ckpt") == undisturbed


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path, max_epochs=1).fit(net(), *loaders())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_accumulation_and_finetuning_stages_resume_with_the_same_bits(tmp_path):
    digests = []
    for name, stop in (("whole", None), ("stopped", 11)):
        folder = tmp_path / name
        options = {"accumulate_grad_batches": 3, "max_epochs": 4}
        if stop:
            with pytest.raises(SystemExit):
                trainer(folder, callbacks=SignalAt("train_batch_end", stop, signal.SIGTERM), **options).finetune(
                    net(), *loaders(), strategy="freeze_unfreeze:1"
                )
        resumed = folder / "last.ckpt" if stop else None
        trainer(folder, **options).finetune(net(), *loaders(), strategy="freeze_unfreeze:1", ckpt_path=resumed)
        digests.append(state_digest(folder / "last.ckpt"))
    assert digests[0] == digests[1]


def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    trainer(tmp_path).fit(net(), *loaders())
    trainer(tmp_path).fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert state_digest(tmp_path / "last.ckpt") == undisturbed


def test_another_thread_count_or_seed_is_reported(tmp_path, capsys):
    trainer(tmp_path, max_epochs=1).fit(net(), *loaders())
    trainer(tmp_path, max_epochs=2, seed=4).fit(net(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert "not be bit-equal (seed 3 -> 4)" in capsys.readouterr().err


def test_other_settings_are_reported_in_the_same_line(tmp_path, capsys):
    train, val = loaders()
    trainer(tmp_path, max_epochs=1).finetune(net(), train, val, strategy="no_freeze")
    again = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
    again.finetune(net(), loaders(batch_size=4)[0], val, strategy="freeze", ckpt_path=tmp_path / "last.ckpt")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bit-equal" in line]
    for said in ("accumulate_grad_batches 1 -> 2", "gradient_clip_val None -> 1.0", "batch_size 8 -> 4"):
        assert said in line
    assert "strategy no_freeze -> freeze" in line


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [("32", "16-mixed"), ("16-mixed", "32")])
def test_a_run_resumed_in_another_precision_says_so_and_starts_a_fresh_scaler(tmp_path, capsys, first, second):
    trainer(tmp_path, max_epochs=1, precision=first).fit(net(), *loaders())
    trainer(tmp_path, max_epochs=2, precision=second).fit(net(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert f"precision {first} -> {second}" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "last.ckpt")["precision"]["name"] == second


def test_another_strategy_cannot_resume(tmp_path):
    class Grouped(Net):
        def configure_optimizers(self):
            groups = self.trainer.fit_run.freezing.parameter_groups()
            return torch.optim.SGD([{"params": g.parameters, "name": g.name} for g in groups], lr=0.1)

    trainer(tmp_path, max_epochs=1).finetune(Grouped(), *loaders(), strategy="freeze")
    with pytest.raises(UsageError, match="parameter groups"):
        trainer(tmp_path).finetune(Grouped(), *loaders(), strategy="no_freeze", ckpt_path=tmp_path / "last.ckpt")


def test_a_file_with_weights_only_cannot_be_resumed(tmp_path):
    first = trainer(tmp_path / "a", max_epochs=1)
    first.fit(net(), *loaders())
    first.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(UsageError, match="weights only"):
        trainer(tmp_path / "b").fit(net(), *loaders(), ckpt_path=tmp_path / "weights.ckpt")


def test_a_damaged_checkpoint_is_refused_and_named(tmp_path):
    trainer(tmp_path, max_epochs=1).fit(net(), *loaders())
    path = tmp_path / "last.ckpt"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"last\.ckpt") as caught:
        trainer(tmp_path).fit(net(), *loaders(), ckpt_path=path)
    assert caught.value.exit_code == 76


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(MissingInputError, match=r"lost\.ckpt"):
        trainer(tmp_path / "run").fit(net(), *loaders(), ckpt_path=tmp_path / "lost.ckpt")


class Noisy(torch.utils.data.Dataset):
    """A user's dataset whose transform draws from torch, random and NumPy."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        import numpy as np

        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return noise * (1 if index % 2 else -1), index % 2


class NoisyData(DataModule):
    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def train_dataloader(self):
        options = {"num_workers": self.num_workers, "persistent_workers": bool(self.num_workers)}
        return DataLoader(seeded(Noisy()), batch_size=4, shuffle=True, **options)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_0_1_and_4_workers_give_the_same_bits(tmp_path):
    digests = set()
    for workers in (0, 1, 4):
        module = net()
        trainer(tmp_path / str(workers), max_steps=30, max_epochs=None).fit(module, datamodule=NoisyData(workers))
        digests.add(digest(module))
    assert len(digests) == 1


SCRIPT = """
import sys, time
import torch
from pathlib import Path
from small import Net, loaders, net
from flashtask import Trainer

class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.002)
        return super().training_step(batch, batch_idx)

torch.manual_seed(1)
folder = Path(sys.argv[1])
last = folder / "last.ckpt"
trainer = Trainer(output_dir=folder, max_epochs=20, seed=3, enable_progress_bar=False, enable_model_summary=False)
(folder / "started").touch() if folder.exists() else None
trainer.fit(Slow(), *loaders(), ckpt_path=last if last.exists() else None)
"""


@pytest.mark.parametrize("starts", [6, pytest.param(25, marks=pytest.mark.long)])
def test_a2_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, starts):
    """SIGKILL at random times, also while files are written; the last start is left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert warm.run(SCRIPT, whole).returncode == 0
    times = random.Random(5)
    kills = 0
    for _ in range(starts):
        (killed / "started").unlink(missing_ok=True)
        process = warm.start(SCRIPT, killed)
        while not (killed / "started").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(times.uniform(0.02, 0.5))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        for leftover in killed.glob("metrics.csv"):
            if (killed / "last.ckpt").exists():
                continue
            leftover.unlink()  # a start that was killed before its first checkpoint begins anew
    assert kills >= min(4, starts)
    assert warm.run(SCRIPT, killed).returncode == 0
    assert state_digest(killed / "last.ckpt") == state_digest(whole / "last.ckpt")
    epochs = [line.split(",")[0] for line in (killed / "metrics.csv").read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(20)]
