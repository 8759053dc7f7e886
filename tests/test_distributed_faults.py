"""Killed, frozen and failing processes: all stop, one of them says why, nobody is left, and the run can go on."""

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Callback, Module, Trainer
from flashtask.core.errors import BadDataError, DivergedError, ProcessLostError, UsageError
from flashtask.trainer.callbacks.weight_averaging import WeightAveraging
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.distribution.agreement import require_the_same
from flashtask.trainer.distribution.data_parallel import DataParallel
from flashtask.trainer.distribution.environment import ProcessInfo
from flashtask.trainer.distribution.group import listen
from flashtask.trainer.distribution.heartbeat import Heartbeat, is_gone, this_machine
from flashtask.trainer.distribution.launching import Others
from flashtask.trainer.distribution.reports import how_it_ended, of_a_bystander, report_of
from flashtask.trainer.distribution.watchdog import Watchdog
from flashtask.trainer.run_folder import RunFolder

SCRIPTS = Path(__file__).parents[1] / "scripts"
#: Seconds without a sign of life. Fewer, and a busy machine lets a process that waits for its turn look frozen.
FROZEN_AFTER = "5"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = _load("fault_matrix")


@pytest.fixture(autouse=True)
def path_of_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(launcher, *arguments, folder=tmp_path, restarts=0):
        folder.mkdir(exist_ok=True)
        runs.append(matrix.Run(folder, launcher, *arguments, restarts=restarts))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def ended(run, seconds=110):
    """Wait until nobody is left; the exit code, and what was said."""
    assert run.wait_until_gone(seconds) < seconds
    return run.process.returncode, run.errors.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        assert matrix.finished(folder, "ddp") is not None
    return folder


@pytest.mark.long
def test_no_thread_of_the_group_is_left_at_the_end_of_python(undisturbed):
    # Such threads can abort a process whose work is done: "terminate called without an active exception".
    left = [file.read_text().split() for file in undisturbed.glob("threads-*.txt")]
    assert len(left) == 2
    assert not [name for names in left for name in names if "gloo" in name or "tcpstore" in name]


@pytest.mark.long
def test_a8_a_killed_process_under_torchrun_with_restarts_ends_with_the_same_bits(start, tmp_path, undisturbed):
    code, said = ended(start("torchrun", "--fault", "kill:1:17", restarts=1))
    assert code == 0, said
    assert "process 1 was ended by SIGKILL at step 17; the system does this when memory runs out" in said
    assert "going on from" in said
    assert matrix.weights(tmp_path) == matrix.weights(undisturbed)


@pytest.mark.long
def test_a8_an_elastic_run_that_loses_a_machine_goes_on_in_mid_epoch_with_the_samples_of_a_step(
    start, tmp_path, monkeypatch
):
    with listen(0) as free:
        port = free.getsockname()[1]
    joins = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", "elastic", "--rdzv-backend", "c10d")
    joins += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1")
    monkeypatch.setitem(matrix.LAUNCHERS, "elastic", ("-m", "torch.distributed.run", *joins))
    machines = [start("elastic", "--processes", "1", "--pause", "0.2", restarts=3) for _ in range(2)]
    machines[0].wait_for_step(7, 0)
    machines[1].process.kill()  # the other one holds the rendezvous
    code, said = ended(machines[0])
    assert code == 0, said
    said += machines[1].errors.read_text()
    assert "going on with 1 process in place of 2: 2 batches of 2 for each step, which still takes 4 samples" in said
    steps = [line.split()[1] for line in (tmp_path / "steps-0.log").read_text().splitlines()]
    assert int(steps[-1]) == 43  # 11 in each of 4 epochs, with one process as with two
    assert [*map(int, steps)].count(0) == 1  # it did not begin again


def test_a8_another_torchrun_does_not_go_on_in_the_folder_of_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    RunFolder(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()  # a mark alone does not keep a folder
    (folder := RunFolder(tmp_path / "run")).write_summary({"best": {}})
    folder.release()
    trainer = Trainer(output_dir=tmp_path / "run", logger=False, max_epochs=1, enable_progress_bar=False)
    for job, attempt in (("first", "0"), ("second", "1")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(Exception, match="already holds a run"):
            trainer.fit(Small(), loader())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    trainer.fit(Small(), loader())
    assert trainer.global_step


@pytest.mark.long
def test_c2_a_frozen_process_is_named_and_ended_and_the_others_leave_their_stacks(start, tmp_path):
    code, said = ended(start("ddp", "--fault", "freeze:1:5", "--frozen-after", FROZEN_AFTER))
    assert code == 71
    assert said.count("process 1 of 2 (pid ") == 1
    assert f"is frozen: no heartbeat for {FROZEN_AFTER} s, at step 5" in said
    assert "backward" in (tmp_path / "run" / "stacks-0.txt").read_text()


@pytest.mark.long
def test_c3_nobody_is_left_when_torchrun_is_killed(start):
    run = start("torchrun", "--workers", "2", "--pause", "0.2")
    run.wait_for_step(2, 1)
    assert len(run.alive()) >= 7  # the agent, two processes, and two that load data for each of them
    run.process.kill()
    assert run.wait_until_gone(10) < 5


@pytest.mark.long
def test_c5_an_error_of_one_process_is_told_once_under_torchrun(start):
    code, said = ended(start("torchrun", "--fault", "data:1:5"))
    assert code == 1
    own = [line for line in said.splitlines() if "BadDataError: cat.jpg cannot be read" in line]
    assert [line[:8] for line in own] == ["[rank1]:"]
    assert "gloo" not in said
    assert "terminate called" not in said


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["ddp", "ddp_spawn"])
def test_c5_a_signal_to_all_saves_once_and_ends_without_a_traceback(start, tmp_path, launcher):
    run = start(launcher, "--pause", "0.1")
    pids = [run.wait_for_step(2, rank)[0] for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    code, said = ended(run)
    assert code == 143
    assert said.count("continue from") == 1
    assert "Traceback" not in said
    assert (tmp_path / "run" / "last.ckpt").exists()


def waiting(run, frozen, step=3):
    """Let one process stop answering at a step, so that the other waits for it in an exchange; their pids."""
    pids = [run.wait_for_step(step, rank)[0] for rank in (0, 1)]
    os.kill(pids[frozen], signal.SIGSTOP)
    time.sleep(1.0)
    return pids


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "frozen", "number", "code"),
    [
        ("ddp", 1, signal.SIGTERM, 143),
        pytest.param("ddp", 1, signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param("ddp_spawn", 1, signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param("ddp", 0, signal.SIGTERM, -signal.SIGKILL, marks=pytest.mark.long),  # it was what the user started
    ],
)
def test_c2_a_signal_reaches_a_process_that_waits_for_a_frozen_one(start, launcher, frozen, number, code):
    run = start(launcher, "--pause", "0.1")
    pids = waiting(run, frozen)
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, number)
    found, said = ended(run)
    assert found == code, said
    assert time.monotonic() - began < 30  # and not the 120 s after which a process counts as frozen
    assert f"stopped by {number.name}, without saving: process {frozen} of 2 (pid {pids[frozen]}" in said


@pytest.mark.long
def test_c2_a_second_signal_ends_a_process_whose_exchange_does_not_come_to_an_end(start, tmp_path):
    run = start("ddp", "--fault", "hang:1:5")
    pid, _ = run.wait_for_step(5, 0)
    for _ in range(2):
        time.sleep(1.0)
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    code, said = ended(run)
    assert code == 143, said
    assert time.monotonic() - began < 30
    assert "stopped by SIGTERM at step 5, without saving" in said


# ---- in processes that are forked from this one


class Small(Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(count=20, batch_size=2):
    return DataLoader(TensorDataset(torch.randn(count, 4), torch.randint(0, 3, (count,))), batch_size=batch_size)


def forked(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    return Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", output_dir=tmp_path / "run", **quiet, **options)


class InTheSecond(Callback):
    """Calls a function at the third step of process 1."""

    def __init__(self, call):
        self.call = call

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.strategy.global_rank == 1 and batch_idx == 2:
            self.call(batch)


def cannot_be_read(batch):
    raise BadDataError("cat.jpg cannot be read", why="it is empty", fix="rm cat.jpg")


@pytest.mark.long
def test_c5_the_kind_of_an_error_and_its_fix_survive_the_way_to_the_first_process(tmp_path):
    with pytest.raises(BadDataError) as caught:
        forked(tmp_path, callbacks=[InTheSecond(cannot_be_read)]).fit(Small(), loader())
    assert str(caught.value) == "process 1 of 2: cat.jpg cannot be read\n  why: it is empty\n  fix: rm cat.jpg"


@pytest.mark.long
def test_c5_a_loss_that_diverges_in_one_process_stops_all(tmp_path):
    trainer = forked(tmp_path, callbacks=[InTheSecond(lambda batch: batch[0].fill_(float("nan")))])
    with pytest.raises(DivergedError, match=r"process 1 of 2: the loss became nan in epoch 0, batch 2, step 2"):
        trainer.fit(Small(), loader())


@pytest.mark.long
def test_c5_an_error_of_one_process_saves_nothing_that_the_others_would_have_to_take_part_in(tmp_path):
    callbacks = [InTheSecond(cannot_be_read), ModelCheckpoint(save_on_exception=True)]
    with pytest.raises(BadDataError):
        forked(tmp_path, callbacks=callbacks).fit(Small(), loader())


class StopsInValidation(Callback):
    """As a signal that reaches process 1 alone, in its second batch of validation."""

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if trainer.strategy.global_rank == 1 and batch_idx == 1 and not trainer.sanity_checking:
            trainer.fit_run.interrupted_by, trainer.fit_run.is_leaving = signal.SIGTERM, True


class Validates(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)


@pytest.mark.long
def test_c5_a_signal_in_validation_is_obeyed_by_all_at_the_next_step(tmp_path):
    trainer = forked(tmp_path, callbacks=[StopsInValidation()])
    trainer.max_epochs = 3
    with pytest.raises(SystemExit) as caught:
        trainer.fit(Validates(), loader(), loader(18))
    assert caught.value.code == 143
    assert (trainer.current_epoch, trainer.global_step) == (1, 5)
    assert (tmp_path / "run" / "last.ckpt").exists()


class Differs(Small):
    """Process 1 has another layer, or other data."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def setup(self, stage):
        if self.trainer.strategy.global_rank and self.what == "layers":
            self.layers = torch.nn.Linear(4, 4)

    def train_dataloader(self):
        differs = self.what if self.trainer.strategy.global_rank else ""
        return loader(19 if differs == "data" else 20, batch_size=4 if differs == "batches" else 2)

    def training_step(self, batch, batch_idx):
        raise AssertionError("a step was begun")


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layers", "shape of layers.weight: 3x4 in process 0, 4x4 in process 1"),
        ("data", "number of training samples: 20 in process 0, 19 in process 1"),
        ("batches", "batch_size: 2 in process 0, 4 in process 1"),
    ],
)
def test_c6_processes_that_differ_do_not_begin(tmp_path, what, said):
    with pytest.raises(UsageError, match="process 1 does not do the same as process 0") as caught:
        forked(tmp_path).fit(Differs(what))
    assert said in caught.value.why


def test_c6_a_checkpoint_that_one_process_does_not_see_is_named():
    there, gone = {"ckpt_path": "last.ckpt (812 bytes)"}, {"ckpt_path": "last.ckpt (which is not there)"}
    require_the_same([there, there])
    with pytest.raises(UsageError, match="process 2 does not do the same") as caught:
        require_the_same([there, there, gone])
    assert "last.ckpt (812 bytes) in process 0, last.ckpt (which is not there) in process 2" in caught.value.why
    assert caught.value.fix == "a folder that every machine sees"


@pytest.mark.long
def test_c6_a_process_that_ends_before_it_meets_the_others_is_not_waited_for(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    raise SystemExit(3)\n"
        "from flashtask.trainer.distribution.data_parallel import DataParallel\nimport torch\n"
        "strategy = DataParallel()\nstrategy.plan(torch.device('cpu'), 2, 1)\nwith strategy.launch():\n    pass\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ProcessLostError: process 1 ended with code 3 before it met the others" in done.stderr


def test_c6_a_port_that_is_taken_is_named():
    with listen(0) as taken, pytest.raises(UsageError, match=f"MASTER_PORT={taken.getsockname()[1]}") as caught:
        listen(taken.getsockname()[1])
    assert "the port is taken" in caught.value.why


@pytest.mark.parametrize(
    ("code", "said"),
    [(-9, "SIGKILL at step 3; the system does this when memory runs out"), (-11, "SIGSEGV at"), (3, "code 3 at")],
)
def test_c1_how_a_process_ended_is_told(code, said):
    assert said in how_it_ended(1, code, "at step 3")


def test_c1_who_only_missed_another_is_not_the_one_that_failed(tmp_path):
    """Process 1 found process 2 gone, and ended first where its code was asked for."""
    process = ProcessInfo(1, 4, 1, 4, "127.0.0.1", 1, "flashtask")
    missed = report_of(of_a_bystander(ProcessLostError("process 2 ended")), process, is_of_the_group=True)
    (tmp_path / "1.json").write_text(json.dumps(missed))
    codes = {1: 71, 2: -9, 3: 0}
    others = Others({rank: partial(codes.get, rank) for rank in codes}, dict.fromkeys(codes, 0), tmp_path)
    assert str(others.failure(1.0, "at step 3")).startswith("process 2 was ended by SIGKILL at step 3")
    assert others.ended() == (1, 71)
    codes.update({1: 0, 2: 0})
    assert others.ended() == (1, 0)
    codes.update({1: 71, 3: 0})
    assert others.failure(1.0) is None  # it missed one of another machine
    codes[3] = 5
    assert others.ended() == (1, 71)


class Averaged(Validates):
    """With BatchNorm and dropout, so that processes have statistics and random numbers of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3)
        )

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training:
            self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class SavesAt(Callback):
    """Writes a checkpoint after a step, in the middle of an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def rows_of(trainer):
    times = ("seconds", "samples_per_second")
    return [{key: row[key] for key in row if key not in times} for row in trainer.fit_run.history]


@pytest.mark.long
def test_a_resume_in_the_middle_of_an_epoch_has_what_every_process_had_summed_up(tmp_path):
    torch.manual_seed(3)
    data, middle = loader(40, 4), tmp_path / "middle.ckpt"
    whole = forked(tmp_path / "whole", callbacks=[WeightAveraging(), SavesAt(8, middle)])
    resumed = forked(tmp_path / "resumed", callbacks=[WeightAveraging()])
    whole.max_epochs = resumed.max_epochs = 3
    whole.fit(Averaged(), data, data)
    resumed.fit(Averaged(), data, data, ckpt_path=middle)
    assert len(rows_of(whole)) == 3
    assert rows_of(resumed) == rows_of(whole)


class Plain(Validates):
    """Without random numbers of its own, so that only the order of summation depends on the number of processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("samples", [36, 43])
def test_a_run_that_goes_on_with_one_of_two_processes_keeps_the_samples_of_a_step(tmp_path, capsys, samples):
    torch.manual_seed(3)
    data, middle, again = loader(samples, 4), tmp_path / "middle.ckpt", tmp_path / "again.ckpt"
    steps = -(-samples // 8)
    whole = forked(tmp_path / "whole", callbacks=[SavesAt(steps + 2, middle)])
    back = forked(tmp_path / "back")
    whole.max_epochs = back.max_epochs = 3
    modules = Plain(), Plain(), Plain(), Plain()
    whole.fit(modules[0], data, data)
    single = {"max_epochs": 3, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    alone = Trainer(output_dir=tmp_path / "one", callbacks=[SavesAt(steps + 3, again)], **single)
    alone.fit(modules[1], data, data, ckpt_path=middle)
    said = "going on with 1 process in place of 2: 2 batches of 4 for each step, which still takes 8 samples"
    assert said in capsys.readouterr().err
    once_more = Trainer(output_dir=tmp_path / "once more", **single)
    once_more.fit(modules[2], data, data, ckpt_path=again)
    assert said in capsys.readouterr().err
    back.fit(modules[3], data, data, ckpt_path=again)
    for trainer, module in zip((alone, once_more, back), modules[1:], strict=True):
        assert trainer.global_step == whole.global_step == 3 * steps
        assert trainer.fit_run.samples_seen == 3 * samples
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, modules[0].state_dict()[name], atol=1e-6, rtol=0)
        for own, theirs in zip(rows_of(trainer), rows_of(whole), strict=True):
            assert own == pytest.approx(theirs, abs=1e-6)


@pytest.fixture
def watchdog():
    store = PrefixStore("test", TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    made = Watchdog(ProcessInfo(0, 2, 0, 2, "127.0.0.1", 0, "environment"), store, 5.0, lambda: (0, None))
    yield made
    made.close()


def test_c5_what_ended_one_stage_does_not_end_the_next(watchdog):
    with watchdog.watching():
        with watchdog.watching():
            watchdog.report_failure({"rank": 1})
        assert watchdog.reported_failure() == {"rank": 1}
    assert watchdog.reported_failure() == {"rank": 1}
    with watchdog.watching():
        assert watchdog.reported_failure() is None


def test_c1_pids_of_another_machine_are_not_looked_for_on_this_one():
    mine = Heartbeat(1, 0, 2**22 + 1, 1, platform.node(), this_machine())
    assert is_gone(mine)
    assert not is_gone(replace(mine, machine="another, of the same name"))


class ValidatesInside(Callback):
    """A stage in a hook of another."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            run, steps = trainer.strategy._run, len(trainer.strategy._steps)
            trainer.validate(module, loader())
            assert trainer.strategy._run is run
            assert len(trainer.strategy._steps) == steps > 0


@pytest.mark.long
def test_a_stage_inside_of_another_leaves_it_as_it_was(tmp_path):
    trainer = forked(tmp_path, callbacks=[ValidatesInside()])
    trainer.fit(Validates(), loader())
    assert trainer.global_step == 5
    assert not trainer.strategy._steps


@pytest.mark.parametrize("options", [{"timeout": 0}, {"frozen_after": 0.5}, {"frozen_after": float("nan")}])
def test_c2_limits_are_seconds(options):
    with pytest.raises(UsageError, match="in seconds"):
        DataParallel(**options)


def test_c2_the_limit_of_silence_can_be_set_in_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHTASK_FROZEN_AFTER", "7.5")
    assert DataParallel().frozen_after == 7.5
    assert DataParallel(frozen_after=9).frozen_after == 9
    monkeypatch.setenv("FLASHTASK_FROZEN_AFTER", "soon")
    with pytest.raises(UsageError, match="FLASHTASK_FROZEN_AFTER='soon' is not a number of seconds"):
        DataParallel()


# ---- the long tier


@pytest.mark.long
@pytest.mark.parametrize(("kind", "count"), [("C1", 6), ("C2", 3), ("C3", 3), ("A8", 2)])
def test_c1_c2_c3_a8_the_matrix_holds(tmp_path, kind, count):
    command = [sys.executable, SCRIPTS / "fault_matrix.py", "--out", tmp_path, "--only", kind, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["ddp", "ddp_spawn", "torchrun"])
def test_ten_runs_in_a_row_end_well(start, tmp_path, launcher):
    for number in range(10):
        run = start(launcher, "--epochs", "1", folder=tmp_path / str(number))
        code, said = ended(run)
        assert code == 0, said
        assert "terminate" not in said


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["ddp_spawn", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_c2_whichever_process_is_frozen_the_other_says_so(start, tmp_path, launcher, rank):
    began = time.monotonic()
    _, said = ended(start(launcher, "--fault", f"freeze:{rank}:5", "--frozen-after", FROZEN_AFTER))
    assert f"process {rank} of 2 (pid " in said
    assert (tmp_path / "run" / f"stacks-{1 - rank}.txt").exists()
    assert time.monotonic() - began < 100  # and not as long as an exchange waits
