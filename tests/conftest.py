"""Settings for the whole suite: one torch thread (15 times faster on two cores), a cache folder of its own, no seed."""

import gc
import os
import shutil
import subprocess
import sys
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import tempfile
from pathlib import Path

import pytest
import torch

from flashtask.core import seeding
from flashtask.tasks.task import Task

torch.set_num_threads(1)


def _do_not_wait_for_the_disk(descriptor: int) -> None:
    """No test takes the power away, and syncing the files of a run can take longer than training a small model."""
    os.fstat(descriptor)


os.fsync = _do_not_wait_for_the_disk

# Hundreds of runs are shorter than writing a page about them; tests that look at one ask for `reports`.
_write_report = Task.write_report
Task.write_report = lambda self, trainer, folder, data: None

# Fixtures of a whole module run before the one below; they must not use the user's own cache either.
_cache_of_modules = tempfile.TemporaryDirectory(prefix="flashtask-tests-")
os.environ["FLASHTASK_CACHE"] = _cache_of_modules.name


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items) -> None:
    """Marks the cases that `quick_cases` leaves to `make test-long`."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick_cases") and not item.get_closest_marker("long"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        (wanted,) = of_test[0].get_closest_marker("quick_cases").args
        quick = {place * len(of_test) // wanted for place in range(wanted)}
        for place, item in enumerate(of_test):
            if place not in quick:
                item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Thousands of tests that are only waiting are not looked through when the searches for a batch size collect."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def no_seed_is_left(private_cache):
    """`seed_everything` is for the whole process: the next test, and what its module prepares, starts without."""
    yield
    seeding._last_seed = None


@pytest.fixture(scope="module")
def reports():
    """Runs write their pages, as they do outside of tests."""
    nothing, Task.write_report = Task.write_report, _write_report
    yield
    Task.write_report = nothing


@pytest.fixture(scope="session")
def third_party(tmp_path_factory):
    """A folder into which pip installed the package of tests/third_party."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(Path(__file__).parent / "third_party", source, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target
