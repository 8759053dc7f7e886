"""Weights files of others: safetensors, and what torch.save wrote, read by a process that can do no harm."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flashtask.backbones import build_backbone
from flashtask.core.bounded_building import no_larger_than
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.files import open_regular
from flashtask.core.foreign_weights import read_foreign_weights
from flashtask.core.foreign_weights_child import Beside, Refused, state_dict_in
from flashtask.core.plain_json import read_json


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(3, 4, generator=generator),
        "a.bias": torch.arange(5),
        "a.turned": torch.randn(4, 6, generator=generator).t(),
        "empty": torch.empty(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
    }


def same(found, wanted):
    return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.long
def test_a_training_checkpoint_of_torch_save_gives_its_weights_in_their_order(tmp_path, weights):
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
    found = read_foreign_weights(tmp_path / "a.pth")
    assert same(found, weights)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_what_a_script_keeps_beside_the_weights_is_passed_over(tmp_path, weights):
    kept = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/out"), start=datetime.datetime(2026, 1, 2), inner={1})
    content = {"state_dict": weights, "args": kept, "best_acc1": np.float64(76.5), "counts": np.arange(3)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert same(read_foreign_weights(tmp_path / "model_best.pth.tar"), weights)


def test_what_is_passed_over_is_no_weight():
    with pytest.raises(Refused, match=r"something of type Beside under 'args'"):
        state_dict_in({"a": torch.ones(1), "args": Beside()})


@pytest.mark.long
def test_the_older_format_of_torch_save_is_read_as_well(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read_foreign_weights(tmp_path / "a.pth"), weights)


def test_safetensors_are_read_in_the_order_of_their_header(tmp_path, weights):
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, tmp_path / "a.safetensors", {"format": "pt"})
    found = read_foreign_weights(tmp_path / "a.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_header_as_long_as_a_pickle_begins_is_safetensors(tmp_path):
    # 0x0280 bytes of header: the first two bytes of the file are those of a pickle.
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x0280)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert read_foreign_weights(tmp_path / "a.safetensors")["a"].tolist() == [7]


@pytest.mark.long
def test_more_than_one_set_of_weights_is_for_the_user_to_choose(tmp_path, weights):
    torch.save({"model": weights, "model_ema": weights}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a\.pth holds more than one set of weights: model and model_ema"):
        read_foreign_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content",
    [{}, [1], {"a": 1}, {1: torch.ones(1)}, {"state_dict": {}}, {"a": torch.ones(1, dtype=torch.complex64)}],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(content):
    with pytest.raises(Refused):
        state_dict_in(content)


def test_sizes_are_limited_and_files_must_be_files(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    with pytest.raises(IntegrityError, match=r"a\.pth was not loaded[\s\S]*the limit is 100"):
        read_foreign_weights(tmp_path / "a.pth", max_bytes=100)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="is a pipe or a device"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(MissingInputError, match="is a folder"):
        read_foreign_weights(tmp_path)
    with pytest.raises(MissingInputError, match=r"did you mean 'a\.pth'"):
        read_foreign_weights(tmp_path / "b.pth")


def test_an_older_torch_does_not_read_pickles(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UsageError, match=r"pip install --upgrade 'torch>=2\.10'"):
        read_foreign_weights(tmp_path / "a.pth")


# What the file would do if `weights_only` had a hole: the walls behind it are tried without it, by a fork for each act.
BEHIND = """
import json, os, socket, sys
import flashtask.core.foreign_weights_child as child
child._leave_the_network()
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5).close()
    network = "connected"
except OSError:
    network = "no network"
import torch

def attempt(act):
    child._limit(1000, 5)
    try:
        torch.ones(10**9)
    except RuntimeError:
        print("no memory")
    sys.addaudithook(child._forbid)
    sys.stdout.flush()
    exec(act)
    print("went on", flush=True)

results = []
for act in sys.argv[2:]:
    here, there = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(there, 1), os.dup2(there, 2)
        attempt(act)
        os._exit(0)
    os.close(there)
    with open(here) as file:
        said = file.read()
    results.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said])
print(json.dumps([network, results]))
"""
ACTS = [
    "os.system('touch canary')",
    "__import__('subprocess').run(['touch', 'canary'])",
    "open('canary', 'w')",
    "os.fork()",
    "socket.socket()",
    "os.rename('other', 'canary')",
]


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    """What was said of the network, and act -> (exit code, what was said)."""
    folder = tmp_path_factory.mktemp("behind")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", BEHIND, str(server.getsockname()[1]), *ACTS]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    network, results = json.loads(done.stdout)
    return network, dict(zip(ACTS, results, strict=True))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("act", ACTS)
def test_behind_weights_only_there_is_no_network_memory_program_or_file(behind, act):
    network, results = behind
    code, said = results[act]
    assert "no memory" in said.split("\n")
    assert "went on" not in said.split("\n")
    assert code == 76, said
    assert "what weights never need" in said
    if network != "no network":
        pytest.skip("this system gives no process a network of its own")


STRACED = """
import os, sys
from flashtask.core.errors import IntegrityError
from flashtask.core.foreign_weights import read_foreign_weights
for path in sys.argv[1:]:
    try:
        read_foreign_weights(path)
    except IntegrityError:
        print("refused")
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_h_the_system_sees_no_program_but_the_child_and_no_socket(tmp_path):
    torch.save({"a": Runs(tmp_path / "canary")}, tmp_path / "new.pth")
    torch.save({"a": Runs(tmp_path / "canary")}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    paths = [str(tmp_path / name) for name in ("new.pth", "old.pth")]
    trace = ["strace", "-f", "--seccomp-bpf", "-e", "trace=execve,execveat,socket,connect", "-o", str(tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [*trace, sys.executable, "-c", STRACED, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "ptrace" in done.stderr.lower():
        pytest.skip("processes may not be traced here")
    assert done.stdout == "refused\nrefused\n", done.stderr
    log = (tmp_path / "log").read_text()
    started = re.findall(r"execve(?:at)?\(\"([^\"]+)\".*\) = 0", log)
    programs = [name for name in started if not name.endswith("/ldconfig")]  # which importing torch asks
    assert programs == [sys.executable] * 3, log
    assert not re.findall(r"socket\(AF_INET|connect\(", log)
    assert not (tmp_path / "canary").exists()


class Runs:
    """A pickle of it creates a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("is_compared", [True, False])
def test_a_file_in_the_cache_of_torch_runs_nothing(tmp_path, monkeypatch, is_compared):
    """torchvision itself unpickles it, whatever it is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"a": Runs(tmp_path / "canary")}, folder / "resnet18-f37072fd.pth")
    if not is_compared:
        monkeypatch.setattr("flashtask.backbones.torchvision_provider._check_cached_file", lambda file: None)
    with pytest.raises(IntegrityError if is_compared else UsageError, match=r"resnet18"):
        build_backbone("torchvision/resnet18")
    assert not (tmp_path / "canary").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.long
def test_a_module_is_built_no_larger_than_its_weights_explain():
    small = {"weight": torch.zeros(10)}
    with no_larger_than(small):
        torch.nn.Linear(1000, 1000)
    for bomb in (
        lambda: torch.nn.Linear(100_000, 100_000),
        lambda: torch.ones(10**12),
        lambda: torch.arange(100_000)[:, None] - torch.arange(100_000)[None],
        lambda: [torch.nn.Linear(1, 1) for _ in range(100_000)],
    ):
        with no_larger_than(small), pytest.raises(IntegrityError, match="far larger than its weights"):
            bomb()


def test_building_in_bounds_gives_the_same_weights():
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 8)
    torch.manual_seed(0)
    with no_larger_than({}):
        bounded = torch.nn.Linear(8, 8)
    assert torch.equal(plain.weight, bounded.weight)


def test_small_json_files_are_read_in_bounds(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"a": [1, 2.5]}))
    assert read_json(file) == {"a": [1, 2.5]}
    for text in ("[" * 100_000, '{"a":1,"a":2}', "NaN", "", " " * 2_000_000, "[" + "[]," * 2_000_000 + "[]]"):
        file.write_text(text)
        with pytest.raises(IntegrityError, match=re.escape(str(file))):
            read_json(file, most=2**20 if " " in text else 2**24)
    with pytest.raises(MissingInputError):
        read_json(tmp_path / "b.json")
