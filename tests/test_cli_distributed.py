"""The command line in several processes: the same numbers, one voice, one exit code, whoever starts them."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small import colour_folders

from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint

ROOT = Path(__file__).parent.parent
#: A transformer without dropout; Adam would make rounding visible where a gradient is zero.
MODEL = ["--backbone", "test_vit", "--no-pretrained", "--strategy", "no_freeze", "--optimizer", "sgd", "--lr", "0.05"]
TRAIN = [*MODEL, "--precision", "32", "--num-workers", "0", "--epochs", "2", "--seed", "3", "--accelerator", "cpu"]
DDP = ["--batch-size", "2", "--devices", "2", "--distributed", "ddp"]
SPAWN = [*DDP[:-1], "ddp_spawn"]
#: Sums are taken in another order.
TOLERANCE = 1e-6
#: What the tests of one program see of another's start.
NEITHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


#: torch's word for gradients of the class token of a transformer, said in one process or the other.
pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """7 images a class to train on, so that the last batch is uneven."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 7), ("val", 3)):
        colour_folders(root / part, each=count, size=32)
    return root


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "RUN"
    assert run(["finetune", str(images), *TRAIN, "--batch-size", "4", "--quiet", "--output-dir", str(folder)]) == 0
    return folder


def environment_of(more=()):
    plain = {name: value for name, value in os.environ.items() if name not in NEITHER}
    return {**plain, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **dict(more)}


def start(*command, environment=(), **options):
    """A process whose output is kept; it is a group of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([*map(str, command)], env=environment_of(environment), **{**pipes, **options})


def finished(process, code=0):
    """Its output and errors, once it has ended with this code and left nobody behind."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:  # else it is in the way of the tests that follow
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == code, out + err
    deadline = time.monotonic() + 20
    while is_group_alive(process.pid):
        assert time.monotonic() < deadline, "somebody is left behind"
        time.sleep(0.02)
    return out, err


def is_group_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def flashtask(*argv, code=0, **options):
    return finished(start(sys.executable, "-m", "flashtask", *argv, **options), code)


def difference(first, second):
    """The largest difference between the weights of two runs."""
    states = [read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (first, second)]
    assert states[0].keys() == states[1].keys()
    return max(float((states[0][key].double() - states[1][key].double()).abs().max()) for key in states[0])


def assert_told_once(out, err):
    assert len(re.findall("^seed 3, cpu, precision 32", err, re.MULTILINE)) == 1
    assert re.findall(r"^epoch (\d)/1", err, re.MULTILINE) == ["0", "1"]
    assert [line.partition(" ")[0] for line in out.splitlines()] == ["best", "run", "next:"]


def free_port(first=12_000, last=20_000):
    """Not the first that is free, which another run of these tests finds too."""
    for port in random.sample(range(first, last), last - first):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


# ---- who starts them


@pytest.mark.long
def test_the_console_script_is_started_again_and_reaches_the_weights_of_one_process(images, one, tmp_path):
    script = tmp_path / "flashtask"  # as pip writes it
    script.write_text("import sys\nfrom flashtask.cli import main\nsys.exit(main())\n")
    command = [sys.executable, script, "finetune", images, *TRAIN, *DDP, "--output-dir", "RUN"]
    out, err = finished(start(*command, cwd=tmp_path))
    assert_told_once(out, err)
    assert "2 processes (ddp)" in err
    assert difference(one, tmp_path / "RUN") <= TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RUN", "flashtask"]
    settings = yaml.safe_load((tmp_path / "RUN" / "recipe.yaml").read_text())["trainer"]
    assert (settings["devices"], settings["strategy"]) == (2, "ddp")


@pytest.mark.long
def test_forked_processes_train_from_a_recipe_that_asks_for_them(images, one, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((one / "recipe.yaml").read_text())
    recipe["trainer"] |= {"devices": 2, "distributed": "ddp_spawn", "enable_progress_bar": True}
    recipe["data"]["from_folders"]["batch_size"] = 2
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["finetune", "r.yaml", "--output-dir", "RUN"]) == 0
    assert_told_once(*capfd.readouterr())
    assert difference(one, tmp_path / "RUN") <= TOLERANCE
    assert yaml.safe_load(Path("RUN/recipe.yaml").read_text())["trainer"]["strategy"] == "ddp_spawn"


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "flashtask")


@pytest.mark.long
def test_s117_torchrun_starts_the_processes_and_one_speaks(images, one, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    bad = tmp_path / "images" / "train" / "red" / "bad.png"
    bad.write_text("no image")
    arguments = ["--on-bad-image", "skip", *TRAIN, *DDP, "--output-dir", "RUN"]
    out, err = finished(start(*TORCHRUN, "finetune", "images", *arguments, cwd=tmp_path))
    assert_told_once(out, err)
    assert err.count("left out 1 image(s)") == 1
    assert difference(one, tmp_path / "RUN") <= TOLERANCE


def slurm(job, rank):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(job),
        "SLURM_CPUS_PER_TASK": "1",
    }


def write_slurm(folder, job):
    """`srun` that starts two tasks as SLURM does and passes signals on, and `scontrol` that notes its arguments."""
    exports = [f'( {" ".join(f"{k}={v}" for k, v in slurm(job, rank).items())} exec "$@" ) &' for rank in range(2)]
    srun = '#!/bin/bash\necho "$@" > srun.arguments\nshift\npids=""\n'
    srun += "".join(f'{line}\npids="$pids $!"\n' for line in exports)
    srun += "echo $pids > tasks\ncode=0\nfor pid in $pids; do wait $pid; c=$?; [ $c -gt $code ] && code=$c; done\n"
    for name, text in (("srun", srun + "exit $code\n"), ("scontrol", '#!/bin/bash\necho "$@" > scontrol.arguments\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)


@pytest.mark.long
def test_s105_the_slurm_script_trains_saves_when_time_is_over_and_goes_on_when_requeued(images, one, tmp_path):
    job = free_port() - 12_000
    write_slurm(tmp_path, job)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm(job, 0), "VIRTUAL_ENV": ""}
    command = ["bash", ROOT / "docs" / "slurm.sh", "finetune", images, *TRAIN, "--batch-size", "2", "--output-dir"]
    first = start(*command, "RUN", "--epochs", "2000", cwd=tmp_path, environment=settings)
    deadline = time.monotonic() + 110
    while not (tmp_path / "RUN" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    for pid in (tmp_path / "tasks").read_text().split():  # --signal=TERM@120 sends it to every task
        os.kill(int(pid), signal.SIGTERM)
    _, err = finished(first, 143)
    assert err.count("continue from") == 1
    assert (tmp_path / "scontrol.arguments").read_text().split() == ["requeue", str(job)]
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.arguments").read_text()
    (tmp_path / "scontrol.arguments").unlink()
    epochs = len((tmp_path / "RUN" / "metrics.csv").read_text().splitlines())
    second = start(*command, "RUN", "--epochs", epochs + 1, cwd=tmp_path, environment=settings)
    _, err = finished(second)
    assert err.count("resuming ") == 1
    assert len((tmp_path / "RUN" / "metrics.csv").read_text().splitlines()) == epochs + 2
    assert not (tmp_path / "scontrol.arguments").exists()


def pods():
    """The environments of the pods that docs/kubernetes.yaml asks for, each on the machine of the first."""
    service, job = yaml.safe_load_all((ROOT / "docs" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    size = job["spec"]["completions"]
    # Only these make the pod `NAME-INDEX` known as `NAME-INDEX.SERVICE`.
    assert (job["spec"]["completionMode"], job["spec"]["parallelism"]) == ("Indexed", size)
    assert (service["spec"]["clusterIP"], service["metadata"]["name"]) == ("None", pod["subdomain"])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    for rank in range(size):
        found = {}
        for one in container["env"]:
            if "value" in one:
                found[one["name"]] = one["value"]
            else:
                assert one["valueFrom"]["fieldRef"]["fieldPath"] == index
                found[one["name"]] = str(rank)
        assert found["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
        assert found["WORLD_SIZE"] == str(size)
        yield {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}, container


PORT = free_port()


def mpi(rank):
    own = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    found = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in own.items()}
    return {**found, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["kubernetes", "mpi"])
def test_s117_pods_and_mpirun_say_which_process_this_is(images, one, tmp_path, launcher):
    environments = [mpi(0), mpi(1)] if launcher == "mpi" else [environment for environment, _ in pods()]
    arguments = [
        "predict",
        one / "best.ckpt",
        images,
        "--format",
        "csv",
        "--accelerator",
        "cpu",
        "--distributed",
        "ddp",
    ]
    if launcher == "kubernetes":
        _, container = next(pods())
        assert container["command"][:3] == ["python", "-m", "flashtask"]
        assert run([*container["command"][3:], *container["args"]]) == 66  # understood; there is no /data here
    both = [start(sys.executable, "-m", "flashtask", *arguments, environment=one) for one in environments]
    (out, err), (silent_out, silent_err) = (finished(process) for process in both)
    assert [line.partition(",")[0] for line in out.splitlines()] == ["path", *sorted(map(str, images.rglob("*.png")))]
    assert err == silent_out == silent_err == ""


# ---- what they do


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("count", [1, 20])
def test_predictions_of_two_processes_are_those_of_one_in_one_file(images, one, tmp_path, count, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    paths = sorted(map(str, images.rglob("*.png")))[:count]
    if count > 1:
        Path("bad.png").write_text("no image")
        paths[5:5] = ["bad.png"]
    options = ["--format", "csv", "--on-bad-image", "skip", "--accelerator", "cpu", "--batch-size", "4", "--output"]
    assert run(["predict", str(one / "best.ckpt"), *paths, *options, "one.csv"]) == 0
    assert run(["predict", str(one / "best.ckpt"), *paths, *options, "two.csv", *SPAWN[2:]]) == 0
    expected = Path("one.csv").read_text().splitlines()
    found = Path("two.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in found] == [line.rpartition(",")[0] for line in expected]
    scores = [[float(line.rpartition(",")[2]) for line in lines[1:]] for lines in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert len(found) == count + 1
    assert capfd.readouterr().err.count("left out 'bad.png'") == (2 if count > 1 else 0)  # once by each command


@pytest.mark.long
def test_validation_by_two_processes_prints_one_object(images, one, capfd):
    lines = []
    for more in ([], SPAWN):
        assert run(["validate", str(one / "best.ckpt"), str(images), "--json", "--accelerator", "cpu", *more]) == 0
        lines.append(capfd.readouterr().out)
    assert lines[0].count("val_loss") == lines[1].count("val_loss") == 1
    one_process, two = (yaml.safe_load(line) for line in lines)
    assert two == pytest.approx(one_process, abs=1e-5)


@pytest.mark.long
def test_a_plan_for_two_processes_counts_their_steps(images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["plan", str(images), *TRAIN, *SPAWN, "--no-measure"]) == 0
    told = capfd.readouterr().out
    assert "2 epochs, 8 steps; cpu, 32, 2 processes" in told  # 14 images by 4
    assert told.count("strategy no_freeze") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_in_one_process_with_the_same_samples(images, tmp_path):
    whole, run_folder = tmp_path / "whole", tmp_path / "RUN"
    longer = [*TRAIN, "--epochs", "20"]
    both = start(sys.executable, "-m", "flashtask", "finetune", images, *longer, *DDP, "--output-dir", run_folder)
    deadline = time.monotonic() + 110
    while not (run_folder / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(both.pid, signal.SIGTERM)
    _, err = finished(both, 143)
    assert err.count("continue from") == 1
    more = ["--resume", "--output-dir", str(run_folder), "--devices", "1", "--batch-size", "4", "--quiet"]
    assert run(["finetune", *more]) == 0
    assert run(["finetune", str(images), *longer, "--batch-size", "4", "--quiet", "--output-dir", str(whole)]) == 0
    assert difference(whole, run_folder) <= 1e-5  # of 20 epochs


# ---- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["finetune", "DATA", "--distributed", "dpp"], "did you mean 'ddp'?"),
        (["finetune", "DATA", "--distributed", "deepspeed"], "there is no DeepSpeed support"),
        (["finetune", "DATA", "--set", "trainer.distributed=ddp_spwn"], "did you mean 'ddp_spawn'"),
        (["finetune", "DATA", "--distributed", "freeze_unfreeze:5"], "--strategy freeze_unfreeze:5"),
        (["finetune", "DATA", "--strategy", "ddp"], "--distributed ddp"),
        (["plan", "DATA", "--num-nodes", "0"], "must be at least 1"),
        (["plan", "DATA", "--num-nodes", "2"], "a process has to be started on each machine"),
        (["predict", "CKPT", "DATA", "--distributed", "ddpp"], "did you mean 'ddp' or 'ddp_spawn'?"),
        (["validate", "CKPT", "DATA", "--distributed", "nothing"], "choose one of: auto, single, ddp"),
        (["tune", "DATA", "--devices", "2"], "a search runs in one process"),
        (["finetune", "r.yaml"], "`distributed` and `strategy`"),
    ],
)
def test_a_strategy_that_cannot_be_meant_is_refused(images, one, tmp_path, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("trainer: {strategy: ddp, distributed: ddp_spawn}\n")
    typed = [{"DATA": str(images), "CKPT": str(one / "best.ckpt")}.get(word, word) for word in arguments]
    assert run(typed) == 2
    assert said in capsys.readouterr().err


def test_a_mistyped_strategy_answers_without_torch(images):
    arguments = ["finetune", images, "--devices", "2", "--distributed", "dpp"]
    _, err = finished(start(sys.executable, "-X", "importtime", "-m", "flashtask", *arguments), 2)
    assert "did you mean 'ddp'" in err
    assert "| torch\n" not in err


@pytest.mark.long
def test_a_search_by_several_processes_is_refused(images, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["finetune", str(images), *TRAIN, *SPAWN, "--lr", "auto"]) == 2
    assert capfd.readouterr().err.count("`auto` can only be resolved in one process") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_c1_what_every_process_finds_wrong_is_told_once_and_its_code_is_the_commands(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "red" / "bad.png").write_text("no image")
    out, err = flashtask("finetune", "images", *TRAIN, *DDP, "--output-dir", "RUN", code=65, cwd=tmp_path)
    assert out == ""
    assert err.count("error:") == 1
    assert "1 of 33 images cannot be read" in err
    assert not (tmp_path / "RUN").exists()


@pytest.mark.long
def test_c6_processes_that_are_asked_for_different_runs_end_and_name_what_differs(images, tmp_path):
    arguments = ["finetune", images, *TRAIN, "--batch-size", "2", "--distributed", "ddp", "--output-dir", "RUN"]
    both = [
        start(sys.executable, "-m", "flashtask", *arguments, *more, cwd=tmp_path, environment=mpi(rank))
        for rank, more in enumerate(([], ["--lr", "0.01"]))
    ]
    (_, err), (_, silent) = (finished(process, 2) for process in both)
    assert "process 1 of 2 was given other settings than process 0" in err
    assert "model.learning_rate: 0.05 in process 0, 0.01 there" in err
    assert silent == ""
    assert not (tmp_path / "RUN").exists()


def test_commands_that_one_process_carries_out_are_silent_in_the_others(capsys, monkeypatch):
    for name, value in mpi(1).items():
        monkeypatch.setenv(name, value)
    assert run(["zoo", "test_vit"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert run(["zoo", "test_vit"]) == 0
    assert "timm/test_vit" in capsys.readouterr().out


@pytest.mark.long
def test_two_processes_compute_with_half_of_the_threads_each(images, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom flashtask.cli.processes import launched\n"
        'with launched({"devices": 2, "strategy": "ddp", "accelerator": "cpu"}) as strategy:\n'
        "    print(strategy.gather(torch.get_num_threads()) if strategy.is_global_zero\n"
        "          else strategy.gather(torch.get_num_threads()), file=sys.stdout)\n"
    )
    alone = max(1, torch.get_num_threads())
    out, _ = finished(start("env", "-u", "OMP_NUM_THREADS", sys.executable, script))
    cores = len(os.sched_getaffinity(0))
    assert alone == 1
    assert out.splitlines() == [str([max(1, cores // 2)] * 2)]
