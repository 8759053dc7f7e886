"""`flashtask chaos`: faults that are survived are counted, and every program that is made to fail them is found out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import warm

from flashtask.cli import run
from flashtask.cli.chaos.command import Chaos, at_least
from flashtask.cli.chaos.faults import FAULTS, Injection
from flashtask.cli.chaos.subjects import Flashtask, Material, is_whole

KILLED, IN_SAVE, FULL, FOUND, CUT_FOUND, RESUMED, CUT_RESUMED, STOPPED, WORKER, NAN, LOST, FROZEN = FAULTS

#: The command line in a process that has imported everything; `saboteur` is executed before.
PROGRAM = """
import os, sys
log, saboteur, *argv = sys.argv[1:]
file = os.open(log, os.O_WRONLY | os.O_CREAT)
os.dup2(file, 1), os.dup2(file, 2)
sys.argv = ["flashtask", *argv]
exec(saboteur)
from flashtask.cli import run
code = run(argv)
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


class Warm:
    """A handle on a process of multiprocessing."""

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self):
        return self.process.exitcode


@dataclass
class Saboteur(Flashtask):
    """flashtask with a fault of its own."""

    code: str = ""

    def launch(self, command, environment, log):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("OMP_NUM_THREADS", "TMPDIR", "FLASHTASK_FROZEN_AFTER"):
                patch.setenv(name, environment[name])
            return Warm(warm.start(PROGRAM, log, self.code, *command[len(self.command) :]))

    def damage_found(self, files, run):
        done = warm.run(f"{self.code}\nfrom flashtask.cli import run\nrun({['doctor', str(run), '--json']!r})")
        return {one for one in files if json.loads(done.stdout)["problems"].get(one.name)}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    made = Material(tmp_path_factory.mktemp("material"), 7)
    made.write()
    return made


@pytest.fixture(scope="module")
def sound(material, tmp_path_factory):
    """Chaos of the command line as it is, whose runs without faults are made once for all tests."""
    return Chaos(tmp_path_factory.mktemp("chaos"), 7, [Saboteur(material, ("flashtask",))])


def problems(chaos, fault, number=0):
    record = chaos.inject(number, fault, chaos.subjects[0])
    assert record is not None, "it could not be injected"
    lines = (chaos.folder / "injections.jsonl").read_text().splitlines()
    assert Injection(**json.loads(lines[-1])) == record
    assert bool(record.problems) == (record.survived < record.count)
    return record.problems


SHORT, LONG = (KILLED, FOUND), (IN_SAVE, FULL, CUT_FOUND, RESUMED, CUT_RESUMED, STOPPED, NAN)


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [*SHORT, *(pytest.param(one, marks=pytest.mark.long) for one in LONG)], ids=lambda fault: fault.name
)
def test_faults_are_survived(sound, fault):
    assert problems(sound, fault) == []
    assert not [path for path in sound.folder.iterdir() if path.name.startswith("flashtask-")]


# ---- programs that must not pass

DIRECT_WRITE = """
import sys
from contextlib import contextmanager
import flashtask.trainer.trainer
@contextmanager
def direct(path, *, size=None):
    with open(path, "wb") as file:
        yield file
for module in [one for name, one in sys.modules.items() if name.startswith("flashtask.")]:
    if hasattr(module, "atomic_write"):
        module.atomic_write = direct
"""
RANDOM_STATE_LOST = """
import flashtask.trainer.checkpoints.restoring as restoring
restoring.set_generator_states = lambda states: None
"""
NO_DIGEST = """
import flashtask.core.tensor_file as tensor_file
class Agrees(str):
    def __ne__(self, other):
        return False
class Blind:
    def sha256(self, data=b""):
        return self
    def update(self, data):
        pass
    def hexdigest(self):
        return Agrees("0" * 64)
tensor_file.hashlib = Blind()
"""
EXIT_CODE_LOST = """
import flashtask.cli
honest = flashtask.cli.run
def run(argv):
    try:
        return honest(argv)
    except SystemExit:
        return 0
flashtask.cli.run = run
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "fault", "problem"),
    [
        (RANDOM_STATE_LOST, STOPPED, "other bits"),
        pytest.param(NO_DIGEST, FOUND, "not found", marks=pytest.mark.long),
        pytest.param(NO_DIGEST, RESUMED, "last.ckpt", marks=pytest.mark.long),
        pytest.param(DIRECT_WRITE, FULL, "last.ckpt is not whole", marks=pytest.mark.long),
        pytest.param(EXIT_CODE_LOST, STOPPED, "exit code 0 and not 143", marks=pytest.mark.long),
    ],
)
def test_saboteurs_are_found_out(material, tmp_path, code, fault, problem):
    found = problems(Chaos(tmp_path, 7, [Saboteur(material, ("flashtask",), code=code)]), fault)
    assert problem in "; ".join(found)


def test_a_program_that_fails_without_any_fault_proves_nothing(material, tmp_path):
    found = problems(Chaos(tmp_path, 7, [Saboteur(material, ("flashtask",), code="import nowhere")]), KILLED)
    assert "without any fault" in found[0]


# ---- figures and files


@pytest.mark.parametrize(
    ("survived", "injected", "bound"),
    [(200, 200, 0.9817), (1, 1, 0.025), (0, 5, 0.0), (9, 10, 0.5550), (30, 60, 0.3681)],
)
def test_the_bound_is_that_of_clopper_and_pearson(survived, injected, bound):
    assert at_least(survived, injected) == pytest.approx(bound, abs=1e-4)
    assert at_least(5000, 5000) == pytest.approx(0.025 ** (1 / 5000))


def test_a_checkpoint_is_whole_until_a_byte_is_another(tmp_path):
    import torch

    from flashtask.core.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "a.ckpt", {"state_dict": {"x": torch.arange(100.0)}})
    assert is_whole(tmp_path / "a.ckpt")
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    for place in range(0, len(content), 37):
        content[place] ^= 4
        (tmp_path / "b.ckpt").write_bytes(content)
        assert not is_whole(tmp_path / "b.ckpt")
        content[place] ^= 4


def test_a_folder_that_holds_injections_is_refused(tmp_path, capsys):
    (tmp_path / "injections.jsonl").touch()
    assert run(["chaos", "--output-dir", str(tmp_path)]) == 73
    assert "already holds injections" in capsys.readouterr().err


@pytest.mark.long
def test_the_command_counts_and_tells(tmp_path):
    argv = [sys.executable, "-m", "flashtask", "chaos", "--minutes", "0.01", "--seed", "5", "--output-dir", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for fault in FAULTS:
        row = next(line for line in done.stdout.splitlines() if line.startswith(fault.name))
        injected, survived = row.removeprefix(fault.name).split()[:2]
        assert injected == survived != "0"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("flashtask-")]
