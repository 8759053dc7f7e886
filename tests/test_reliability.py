"""Faults of docs/reliability.md that concern no single part: signals at bad times, temporary files, workers, leaks."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import time

import pytest
import torch
import warm
from small import Net, loaders, net, quiet
from test_resume import SignalAt, state_digest, trainer
from torch.utils.data import DataLoader, Dataset

from flashtask import Callback, DataModule, read_checkpoint
from flashtask.core.errors import DivergedError, ProcessLostError
from flashtask.core.failures import as_users_see_it

RUN = """
import sys
from pathlib import Path
from small import loaders, net
from test_resume import trainer
last = Path(sys.argv[1]) / "last.ckpt"
trainer(last.parent).fit(net(), *loaders(), ckpt_path=last if last.exists() else None)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    trainer(folder).fit(net(), *loaders())
    return folder


# ---- A


class Hangs(Callback):
    """A step that takes long."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
            began = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
            while time.monotonic() < began + 60:
                time.sleep(0.01)


def test_a5_a_second_ctrl_c_ends_the_step(tmp_path):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", callbacks=[Hangs()]).fit(net(), *loaders())
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a5_a_signal_during_a_save_is_obeyed_after_it(tmp_path, undisturbed, monkeypatch, number):
    rename, saves = os.replace, []

    def interrupted(source, target):
        saves.append(target)
        if len(saves) == 3:
            os.kill(os.getpid(), number)
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer(tmp_path / "run").fit(net(), *loaders())
    assert len(saves) >= 3
    trainer(tmp_path / "run").fit(net(), *loaders(), ckpt_path=tmp_path / "run" / "last.ckpt")
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(undisturbed / "last.ckpt")


# ---- B


@pytest.mark.parametrize("kind", ["missing", *(pytest.param(one, marks=pytest.mark.long) for one in ("full", "file"))])
def test_b4_no_checkpoint_passes_through_the_folder_for_temporary_files(tmp_path, monkeypatch, kind, undisturbed):
    place = {"missing": tmp_path / "nowhere", "full": "/dev/full", "file": tmp_path / "file"}[kind]
    (tmp_path / "file").touch()
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(place))
    done = warm.run(RUN, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(undisturbed / "last.ckpt")


@pytest.mark.parametrize(
    "gone", ["metrics.csv", *(pytest.param(one, marks=pytest.mark.long) for one in ("best.ckpt", "summary.json"))]
)
def test_b6_a_file_that_was_removed_is_written_again_by_the_resume(tmp_path, undisturbed, gone):
    with pytest.raises(SystemExit):
        trainer(tmp_path / "run", callbacks=[SignalAt("train_batch_end", 17, signal.SIGTERM)]).fit(net(), *loaders())
    (tmp_path / "run" / gone).unlink(missing_ok=True)
    trainer(tmp_path / "run").fit(net(), *loaders(), ckpt_path=tmp_path / "run" / "last.ckpt")
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(undisturbed / "last.ckpt")
    epochs = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert epochs == ["0", "1", "2", "3"]
    assert (tmp_path / "run" / gone).exists()


@pytest.mark.long
def test_b6_the_file_of_an_earlier_epoch_in_its_place_is_where_the_run_goes_on(tmp_path, undisturbed):
    trainer(tmp_path / "run", max_epochs=2).fit(net(), *loaders())
    shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "early.ckpt")
    trainer(tmp_path / "run", max_epochs=4).fit(net(), *loaders(), ckpt_path=tmp_path / "run" / "last.ckpt")
    shutil.copy(tmp_path / "early.ckpt", tmp_path / "run" / "last.ckpt")
    trainer(tmp_path / "run").fit(net(), *loaders(), ckpt_path=tmp_path / "run" / "last.ckpt")
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(undisturbed / "last.ckpt")


# ---- D


class Numbers(Dataset):
    """Samples of random numbers; what `act` does at one of them happens in a worker."""

    def __init__(self, act=None):
        self.act = act

    def __len__(self):
        return 32

    def __getitem__(self, index):
        if self.act is not None and index == 11:
            self.act()
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator), index % 3


class InWorkers(DataModule):
    def __init__(self, act=None, **options):
        super().__init__()
        self.act, self.options = act, options

    def train_dataloader(self):
        return DataLoader(Numbers(self.act), 4, shuffle=True, **{"num_workers": 1, **self.options})


def kill_once(mark):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class KillingWorkers(Callback):
    """SIGKILL of a process that loads data, after every third batch."""

    def __init__(self):
        self.batches = self.killed = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        workers = multiprocessing.active_children()
        if self.batches % 3 == 0 and workers:
            os.kill(workers[self.killed % len(workers)].pid, signal.SIGKILL)
            self.killed += 1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_d1_a_run_whose_workers_are_killed_has_the_same_bits(tmp_path, capfd, options):
    trainer(tmp_path / "whole").fit(net(), datamodule=InWorkers())
    killing = KillingWorkers()
    trainer(tmp_path / "run", callbacks=[killing]).fit(net(), datamodule=InWorkers(**options))
    assert killing.killed >= 2
    assert "others are started (1 of 2 times) for the same batch" in "".join(capfd.readouterr())
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(tmp_path / "whole" / "last.ckpt")


def test_d1_a_worker_that_dies_at_a_sample_is_started_again(tmp_path):
    trainer(tmp_path / "whole").fit(net(), datamodule=InWorkers())
    mark = tmp_path / "mark"
    trainer(tmp_path / "run").fit(net(), datamodule=InWorkers(lambda: kill_once(mark), num_workers=2))
    assert mark.exists()
    assert state_digest(tmp_path / "run" / "last.ckpt") == state_digest(tmp_path / "whole" / "last.ckpt")


def test_d1_a_batch_that_always_kills_its_worker_is_named(tmp_path):
    data = InWorkers(lambda: os.kill(os.getpid(), signal.SIGKILL), num_workers=2)
    with pytest.raises(ProcessLostError, match=r"died|killed") as caught:
        quiet(tmp_path).fit(net(), datamodule=data)
    named = re.search(r"at the samples ([\d, ]+) of epoch 0", str(caught.value))
    assert named is not None
    assert "11" in named[1].split(", ")


def test_d2_a_worker_that_hangs_is_a_lost_process(tmp_path):
    data = InWorkers(lambda: time.sleep(1000), timeout=1)
    with pytest.raises(ProcessLostError, match="gave no batch for 1 s") as caught:
        quiet(tmp_path).fit(net(), datamodule=data)
    assert "num_workers=0" in caught.value.fix


@pytest.mark.long
@pytest.mark.parametrize("text", ["received 0 items of ancdata", "unable to open </torch_1>: Too many open files (24)"])
def test_d3_too_few_descriptors_are_told(text):
    seen = as_users_see_it(RuntimeError(text))
    assert isinstance(seen, ProcessLostError)
    assert "ulimit -n" in seen.fix


@pytest.mark.long
def test_d3_a_run_with_few_descriptors_ends_with_what_to_do(tmp_path):
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from small import net, quiet\nfrom test_reliability import InWorkers\nimport os\n"
        "few = len(os.listdir('/proc/self/fd')) + 4\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))\n"
        "quiet(Path(sys.argv[1])).fit(net(), datamodule=InWorkers())\n"
    )
    done = warm.run(code, tmp_path)
    assert done.returncode != 0
    assert "too many open files" in done.stderr.lower()


# ---- K


class NanAt(Net):
    """The loss of one step is NaN."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.backbone = torch.nn.Linear(4, 8)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (float("nan") if self.global_step == self.step else 1.0)


@pytest.mark.parametrize(
    "step", [0, 7, 13, *(pytest.param(one, marks=pytest.mark.long) for one in range(1, 21) if one not in (7, 13))]
)
def test_k1_a_nan_loss_at_any_step_leaves_files_with_the_finite_weights_before_it(tmp_path, step):
    torch.manual_seed(1)
    with pytest.raises(DivergedError, match=f"step {step}"):
        trainer(tmp_path / "run").fit(NanAt(step), *loaders())
    files = [*(tmp_path / "run").glob("*.ckpt")]
    assert bool(files) == (step >= 7)  # steps in an epoch
    for file in files:
        content = read_checkpoint(file)
        assert content["global_step"] <= step
        assert all(value.isfinite().all() for value in content["state_dict"].values() if value.is_floating_point())


class Measures(Callback):
    """What the process holds, a third of the way and at the end."""

    def __init__(self, steps):
        self.at, self.found = (steps // 3, steps), []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.at:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            held = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
            self.found.append((memory, *held))


@pytest.mark.long
@pytest.mark.parametrize("steps", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_k4_steps_leave_no_memory_descriptors_or_threads_behind(tmp_path, steps):
    measures = Measures(steps)
    quiet(tmp_path, max_epochs=-1, max_steps=steps, callbacks=[measures], logger="csv").fit(net(), *loaders())
    (memory, *before), (later, *after) = measures.found
    assert all(now <= then for now, then in zip(after, before, strict=True))
    assert later - memory < 30_000  # KiB
