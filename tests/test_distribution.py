"""Several processes on one machine: the numbers of one process, every sample once, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Callback, Module, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.data_loaders import OrderedBatches
from flashtask.trainer.distribution.environment import ProcessInfo, process_info
from flashtask.trainer.distribution.group import cores_of
from flashtask.trainer.distribution.process_strategies import STRATEGIES

SCRIPT = Path(__file__).parent / "distributed_script.py"
#: Sums are taken in another order.
TOLERANCE = 1e-6
#: Seconds within which all have ended, on a busy machine too; an exchange waits for minutes.
SOON = 100


class Small(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        outputs = self.layers(batch[0])
        self.log("val_loss", torch.nn.functional.cross_entropy(outputs, batch[1]), sync_dist=True)
        self.log("val_count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)
        self.log("val_most", float(batch[0].max()), reduce_fx="max", sync_dist=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.layers(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def samples(count):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator))


def trainer_of(tmp_path, processes, name, **options):
    several = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", output_dir=tmp_path / name, **{"max_epochs": 2, **quiet, **several, **options})


def weights_of(module):
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def fitted(tmp_path, processes, count, name="", **options):
    """A fit with 4 samples a step, whatever the number of processes."""
    size, module = 4 // processes, Small()
    trainer = trainer_of(tmp_path, processes, name or f"{processes}-{count}", **options)
    data = samples(count)
    trainer.fit(module, DataLoader(data, batch_size=size, shuffle=True), DataLoader(data, batch_size=size))
    return module, trainer


# ---- the same numbers


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("count", [1, 3, 9, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 4, 5, 6, 7, 8, 33))])
def test_two_processes_reach_the_weights_and_metrics_of_one(tmp_path, count):
    one, first = fitted(tmp_path, 1, count)
    two, second = fitted(tmp_path, 2, count)
    assert (weights_of(one) - weights_of(two)).abs().max() <= TOLERANCE
    assert not torch.equal(weights_of(one), weights_of(Small()))
    assert second.global_step == first.global_step
    assert second.callback_metrics["val_count"] == count
    assert second.callback_metrics == pytest.approx(first.callback_metrics, abs=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("count", [9, *(pytest.param(n, marks=pytest.mark.long) for n in (5, 13))])
def test_uneven_shares_of_an_accumulation_group_count_as_they_should(tmp_path, count):
    one, _ = fitted(tmp_path, 1, count, accumulate_grad_batches=3)
    two, _ = fitted(tmp_path, 2, count, accumulate_grad_batches=3)
    assert (weights_of(one) - weights_of(two)).abs().max() <= TOLERANCE


@pytest.mark.long
def test_three_processes_are_no_other_than_two(tmp_path):
    found = []
    for processes, size in ((1, 6), (3, 2)):
        module = Small()
        trainer = trainer_of(tmp_path, processes, str(processes))
        trainer.fit(module, DataLoader(samples(20), batch_size=size, shuffle=True))
        found.append(weights_of(module))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("count", [1, 3, 8, 33])
def test_predictions_are_complete_and_in_order(tmp_path, count):
    data, module = samples(count), Small()
    outputs = trainer_of(tmp_path, 2, "two").predict(module, DataLoader(data, batch_size=2))
    assert (torch.cat(outputs) - module.layers(data.tensors[0]).detach()).abs().max() <= TOLERANCE


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_stands_in_the_share_of_one_process(world_size, drop_last):
    for length in range(34):
        whole = OrderedBatches(length, 2 * world_size, shuffle=True, drop_last=drop_last, seed=3, seeded=False)
        settings = {"shuffle": True, "drop_last": drop_last, "seed": 3, "seeded": False}
        parts = [OrderedBatches(length, 2, process=(rank, world_size), **settings) for rank in range(world_size)]
        batches = [list(part) for part in parts]
        assert [len(part) for part in parts] == [len(of_rank) for of_rank in batches]
        for number, expected in enumerate(whole):
            shares = [of_rank[number] if number < len(of_rank) else [] for of_rank in batches]
            assert [index for share in shares for index in share] == expected
        filling = [
            OrderedBatches(length, 2, process=(rank, world_size), fills=True, **settings) for rank in range(world_size)
        ]
        assert {len(list(part)) for part in filling} == {len(part) for part in filling} == {len(whole)}


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole, _ = fitted(tmp_path, 1, 22, "whole")
    for first, then in ((2, 1), (1, 2)):
        folder = f"{first}-{then}"
        fitted(tmp_path, first, 22, folder, max_steps=4)  # in the middle of the first epoch
        module, size = Small(), 4 // then
        trainer = trainer_of(tmp_path, then, f"{folder}-goes-on")
        loader = DataLoader(samples(22), batch_size=size, shuffle=True)
        trainer.fit(module, loader, DataLoader(samples(22), batch_size=size), ckpt_path=tmp_path / folder / "last.ckpt")
        assert (weights_of(module) - weights_of(whole)).abs().max() <= TOLERANCE


# ---- starting


def run_script(tmp_path, what, *arguments, command=(sys.executable,), environment=()):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(SCRIPT), what, str(tmp_path), *arguments],
        env={**settings, **dict(environment)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - start


def run_forked(tmp_path, what, strategy):
    """The same of a process that has torch already, for a strategy that does not start the script again."""
    code = (
        "import os, runpy, sys\nsys.argv = sys.argv[1:]\nos.chdir(sys.argv[2])\n"  # which tells who is left
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    start = time.monotonic()
    return warm.run(code, SCRIPT, what, tmp_path, strategy), time.monotonic() - start


def assert_nobody_is_left(tmp_path):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, folder = (process / "cmdline").read_text(), os.readlink(process / "cwd")
        except OSError:
            continue
        assert str(tmp_path) not in command
        assert str(tmp_path) != folder


@pytest.mark.long
def test_s102_ddp_starts_the_script_again_and_only_the_first_process_writes(tmp_path):
    done, _ = run_script(tmp_path, "trains")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0: epoch 4, step 20", "1: epoch 4, step 20"]
    assert done.stderr.count("seed 0, cpu") == 1
    assert torch.equal(torch.load(tmp_path / "weights-0.pt"), torch.load(tmp_path / "weights-1.pt"))
    assert sorted(path.name for path in (tmp_path / "run").glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert_nobody_is_left(tmp_path)


@pytest.mark.long
def test_s117_torchrun_starts_the_processes_and_they_meet(tmp_path):
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    done, _ = run_script(tmp_path, "trains", command=command)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0: epoch 4, step 20", "1: epoch 4, step 20"]


@pytest.mark.long
def test_s103_ddp_spawn_needs_no_script_and_gives_back_the_trained_module(tmp_path):
    module, trainer = fitted(tmp_path, 2, 12)
    assert trainer.strategy.world_size == 1  # the others have gone
    assert trainer.current_epoch == 2
    assert (tmp_path / "2-12" / "last.ckpt").exists()
    again, _ = fitted(tmp_path, 2, 12, "again")
    assert torch.equal(weights_of(module), weights_of(again))


def test_s103_ddp_where_there_is_no_script_points_to_ddp_spawn(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    trainer = trainer_of(tmp_path, 2, "run", strategy="ddp")
    with pytest.raises(UsageError, match="ddp_spawn"):
        trainer.fit(Small(), DataLoader(samples(4), batch_size=2))


def test_s119_the_strategies_are_listed():
    assert {"single", "ddp", "ddp_spawn", "ddp_find_unused_parameters"} <= set(STRATEGIES.names())


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (TORCHRUN, ProcessInfo(3, 4, 1, 2, "here", 29400, "torchrun")),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"},
            ProcessInfo(1, 2, 0, 1, "pod-0", 29500, "environment"),
        ),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1", "SLURM_JOB_ID": "123"},
            ProcessInfo(5, 8, 1, 4, "gpu07", 12123, "slurm"),
        ),
        (
            {
                **SLURM,
                "SLURM_STEP_TASKS_PER_NODE": "2(x2),3,1",
                "SLURM_NODEID": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            ProcessInfo(5, 8, 1, 3, "a", 1, "slurm"),
        ),
        ({**MPI, "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ProcessInfo(1, 2, 1, 2, "a", 1, "mpi")),
    ],
)
def test_s105_s117_who_started_this_process_says_which_it_is(environment, process):
    assert process_info(environment) == process


def test_s105_a_task_of_slurm_has_its_own_cores_and_others_share_them(monkeypatch):
    process = ProcessInfo(0, 4, 0, 4, "a", 1, "slurm")
    assert cores_of(process, 8) == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert [cores_of(process, cores) for cores in (8, 64)] == [8, 8]
    assert cores_of(replace(process, launcher="torchrun"), 8) == 2


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "there are WORLD_SIZE=2 processes"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_c6_half_an_environment_is_refused(environment, said):
    with pytest.raises(UsageError, match=said):
        process_info(environment)


# ---- faults


FAILS = "process 1 of 2 failed: ValueError: the third step is too much for me"
KILLED = "process 1 was ended by SIGKILL"


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "said", "strategy"),
    [
        ("killed", KILLED, "ddp_spawn"),
        pytest.param("killed", KILLED, "ddp", marks=pytest.mark.long),
        pytest.param("fails", FAILS, "ddp_spawn", marks=pytest.mark.long),
        pytest.param("fails", FAILS, "ddp", marks=pytest.mark.long),
    ],
)
def test_c1_c5_where_one_process_fails_all_stop_and_the_reason_is_told_once(tmp_path, strategy, what, said):
    done, seconds = (run_script if strategy == "ddp" else run_forked)(tmp_path, what, strategy)
    assert done.returncode != 0
    assert done.stderr.count(said) == 1
    assert seconds < SOON
    assert_nobody_is_left(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "ddp_spawn"])
def test_c1_c3_when_the_first_process_is_killed_the_others_end_with_it(tmp_path, strategy):
    done, seconds = (run_script if strategy == "ddp" else run_forked)(tmp_path, "first is killed", strategy)
    assert done.returncode == -signal.SIGKILL
    assert seconds < SOON
    time.sleep(0.5)
    assert_nobody_is_left(tmp_path)


class Stops(Callback):
    """Process 1 alone wants to stop, in the second epoch."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.strategy.global_rank == 1 and trainer.current_epoch == 1:
            trainer.should_stop = True


@pytest.mark.long
def test_c5_a_stop_that_one_process_wants_stops_all_after_the_same_epoch(tmp_path):
    _, trainer = fitted(tmp_path, 2, 20, max_epochs=4, callbacks=[Stops()])
    assert (trainer.current_epoch, trainer.global_step) == (2, 10)


class StopsInside(Callback):
    """Process 1 alone wants to stop, after the third batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.strategy.global_rank == 1 and batch_idx == 2:
            trainer.should_stop = True


@pytest.mark.long
def test_a_stop_that_one_process_wants_stops_all_after_the_same_batch(tmp_path):
    _, trainer = fitted(tmp_path, 2, 20, max_epochs=4, callbacks=[StopsInside()])
    assert (trainer.current_epoch, trainer.global_step) == (0, 3)
    _, trainer = fitted(tmp_path, 2, 20, "least", max_epochs=4, callbacks=[StopsInside()], min_steps=8)
    assert (trainer.current_epoch, trainer.global_step) == (1, 8)


@pytest.mark.long
def test_validation_inside_epochs_is_that_of_one_process(tmp_path):
    one, first = fitted(tmp_path, 1, 18, val_check_interval=2)
    two, second = fitted(tmp_path, 2, 18, val_check_interval=2)
    assert (weights_of(one) - weights_of(two)).abs().max() <= TOLERANCE
    assert [row["step"] for row in second.fit_run.rows] == [row["step"] for row in first.fit_run.rows]
    assert len(first.fit_run.validations) == 2 * first.fit_run.epoch
    for mine, theirs in zip(first.fit_run.validations, second.fit_run.validations, strict=True):
        assert theirs == pytest.approx(mine, abs=TOLERANCE)


@pytest.mark.long
def test_several_loaders_are_shared(tmp_path):
    class Both(Small):
        def training_step(self, batch, batch_idx):
            return super().training_step([torch.cat(parts) for parts in zip(*batch, strict=True)], batch_idx)

    found = []
    for processes in (1, 2):
        size, module = 4 // processes, Both()
        data = [DataLoader(samples(count), batch_size=size, shuffle=True) for count in (8, 16)]
        trainer = trainer_of(tmp_path, processes, f"several-{processes}")
        trainer.fit(module, data)
        found.append((trainer.global_step, weights_of(module)))
    assert found[0][0] == found[1][0]
    assert (found[0][1] - found[1][1]).abs().max() <= TOLERANCE


@pytest.mark.long
def test_c5_a_stop_is_the_same_where_the_script_is_started_again(tmp_path):
    done, _ = run_script(tmp_path, "stops")
    assert sorted(done.stdout.splitlines()) == ["0: epoch 2, step 10", "1: epoch 2, step 10"]
