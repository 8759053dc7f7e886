"""Two machines, made of network namespaces that a virtual cable joins: torchrun on each reaches the weights of one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from small import colour_folders

from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint
from flashtask.trainer.distribution.group import interface_towards, interfaces

MODEL = ["--backbone", "test_vit", "--no-pretrained", "--strategy", "no_freeze", "--optimizer", "sgd", "--lr", "0.05"]
TRAIN = [*MODEL, "--precision", "32", "--num-workers", "0", "--epochs", "2", "--seed", "3", "--accelerator", "cpu"]
SPACES = [f"flashtask-{os.getpid()}-{number}" for number in (1, 2)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def inside(number, hosts, *command):
    """A command on one of the machines, whose name is host1 or host2, with a file of its own for /etc/hosts."""
    naming = f'hostname host{number + 1} && mount --bind "$0" /etc/hosts && exec "$@"'
    around = ["ip", "netns", "exec", SPACES[number], "unshare", "--uts", "--mount", "sh", "-c", naming, str(hosts)]
    return [*around, *map(str, command)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two namespaces with an address each."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    hosts = tmp_path_factory.mktemp("machines") / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    ends = [f"ft{os.getpid()}a", f"ft{os.getpid()}b"]
    try:
        try:
            for space in SPACES:
                ip("netns", "add", space)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            subprocess.run(inside(0, hosts, "true"), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        for space, end, address in zip(SPACES, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", space)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", end)
            for name in ("lo", end):
                ip("-n", space, "link", "set", name, "up")
        yield ends
    finally:
        for space in SPACES:
            ip("netns", "del", space, check=False)
        ip("link", "del", ends[0], check=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 11), ("val", 5)):
        colour_folders(root / part, each=count, size=32)
    return root


def on_both(commands, tmp_path, hosts, environment=()):
    """Output and errors of a command on each machine, once both have ended well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    settings = {"cwd": tmp_path, "env": {**env, **dict(environment)}, "text": True}
    both = []
    try:
        for number, command in enumerate(commands):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
            both.append(subprocess.Popen(inside(number, hosts[number], *command), **pipes, **settings))
        told = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
    assert [process.returncode for process in both] == [0, 0], told
    return told


def weights(folder):
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    return torch.cat([one.double().flatten() for one in state.values() if one.is_floating_point()])


def torchrun(number):
    """The start of a command on one of the machines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "test"]
    # Where its name does not lead to its address, torchrun has to be told which machine the rendezvous is on.
    return [*command, "--rdzv-conf", f"is_host={1 - number}"]


def by_hand(number):
    """The same for who sets the variables of the environment, as pods have them."""
    numbers = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500}
    return ["env", *(f"{name}={value}" for name, value in numbers.items()), sys.executable]


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        pytest.param(by_hand, "each its own as 127.0.1.1", marks=pytest.mark.long),
        pytest.param(torchrun, "each its own as 127.0.1.1", marks=pytest.mark.long),
        pytest.param(torchrun, "right", marks=pytest.mark.long),
    ],
)
def test_two_machines_reach_the_weights_of_one_process(machines, images, tmp_path, launcher, names):
    hosts = []
    for number in range(2):
        lines = [f"{address} host{n + 1}" for n, address in enumerate(ADDRESSES)]
        if names != "right":  # as Debian writes it: gloo would listen there, where nobody reaches it
            lines[number] = f"127.0.1.1 host{number + 1}"
        hosts.append(tmp_path / f"hosts{number}")
        hosts[number].write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    one = ["finetune", str(images), *TRAIN, "--quiet", "--batch-size", "4", "--output-dir", str(tmp_path / "one")]
    assert run(one) == 0
    flashtask = ["-m", "flashtask", "finetune", images, *TRAIN, "--batch-size", "2", "--distributed", "ddp"]
    told = on_both([[*launcher(number), *flashtask, "--output-dir", "RUN"] for number in range(2)], tmp_path, hosts)
    assert (weights(tmp_path / "one") - weights(tmp_path / "RUN")).abs().max() <= 1e-6
    (first, first_errors), (second, second_errors) = told
    assert "run folder: RUN" in first
    assert first_errors.count("epoch 1/1") == 1
    assert second == ""
    # What torchrun itself has to say is its own affair.
    assert not re.search("^(seed 3|finetuning|epoch|process|error)|Warning:", second_errors, re.MULTILINE)


@pytest.mark.long
def test_the_interface_is_the_one_that_leads_to_the_other_machine(machines, tmp_path):
    code = (
        "import sys; from flashtask.trainer.distribution.group import interface_towards, interfaces\n"
        "print(interfaces(), interface_towards(sys.argv[1]), interface_towards('localhost'))"
    )
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 host1 host2\n")
    for address in (*ADDRESSES, "host1", "no.such.host"):
        told = on_both([[sys.executable, "-c", code, address]] * 2, tmp_path, [hosts, hosts])
        for number, (out, _) in enumerate(told):
            end = machines[number]
            assert out.split("\n")[0] == f"{{'{end}': '{ADDRESSES[number]}'}} {end} None"


@pytest.mark.long
def test_an_interface_that_joins_nobody_is_named_with_those_that_there_are(machines, tmp_path):
    code = (
        "import sys, torch\nfrom flashtask.core.errors import UsageError\n"
        "from flashtask.trainer.distribution.environment import process_info\n"
        "from flashtask.trainer.distribution.group import open_group\n"
        "try:\n    open_group(process_info(), torch.device('cpu'), 6.0)\n"
        "except UsageError as error:\n    print(error)\n"
    )
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    both = [[*by_hand(rank), "-c", code] for rank in range(2)]
    start = time.monotonic()
    told = [out for out, _ in on_both(both, tmp_path, [hosts] * 2, {"GLOO_SOCKET_IFNAME": "lo"})]
    assert time.monotonic() - start < 60
    assert any("cannot reach the others" in out and "GLOO_SOCKET_IFNAME=NAME" in out for out in told)
    named = next(out for out in told if "GLOO_SOCKET_IFNAME" in out)
    assert "the interface here is lo" in named
    assert any(f"{end} ({address})" in named for end, address in zip(machines, ADDRESSES, strict=True))


def test_here_loopback_is_no_way_to_another_machine():
    assert "lo" not in interfaces()
    assert all(not address.startswith("127.") for address in interfaces().values())
    assert interface_towards("127.0.0.1") is interface_towards("localhost") is None
