"""Failures of memory and of data workers become errors that say what to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from flashtask.core.errors import BadDataError, OutOfMemoryError, ProcessLostError, UnknownNameError, UsageError
from flashtask.core.failures import as_users_see_it
from flashtask.core.library_internals import let_workers_go


class Failing(Dataset):
    """Raises an error, or does something else that ends the worker."""

    def __init__(self, end):
        self.end = end

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


def from_a_worker(end) -> BaseException:
    """What the loader raises here when that happens in its worker."""
    loader = DataLoader(Failing(end), num_workers=1, persistent_workers=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(loader)
    let_workers_go(loader)
    return caught.value


def test_an_error_from_a_worker_loses_the_traceback_and_keeps_its_parts():
    own = BadDataError("a.png cannot be read", why="it ends early\n    at byte 7", fix="remove it")
    seen = as_users_see_it(from_a_worker(own))
    assert type(seen) is BadDataError
    assert (seen.what, seen.why, seen.fix) == (own.what, own.why, own.fix)


@pytest.mark.long
def test_an_error_from_a_worker_that_torch_cannot_make_again_keeps_its_parts():
    seen = as_users_see_it(from_a_worker(UnknownNameError("label", "catt", ["cat", "dog"])))
    assert isinstance(seen, UsageError)
    assert (seen.what, seen.why, seen.fix) == ("no label named 'catt'", "", "did you mean 'cat'?")


@pytest.mark.quick_cases(1)
# torch names the signal, unless the system tells another thread of this process that its child has ended.
@pytest.mark.parametrize(("end", "words"), [(killed, "was killed: Killed|died"), (left, "died")])
def test_a_worker_that_dies_is_a_lost_process_with_its_number(end, words):
    raised = from_a_worker(end)
    seen = as_users_see_it(raised)
    assert isinstance(seen, ProcessLostError)
    assert seen.exit_code == 71
    assert re.search(words, seen.what)
    assert str(raised).partition("pid(s) ")[2].partition(")")[0] in seen.what
    assert "num_workers=0" in seen.fix


class Leaves(Dataset):
    """The worker is killed while the tensors of its batch wait to be fetched."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(100_000)


@pytest.mark.long
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_a_lost_process():
    loader = DataLoader(Leaves(), num_workers=1, prefetch_factor=2)
    iterator = iter(loader)
    assert iterator._worker_result_queue._reader.poll(60)  # a batch waits there, and its tensors with the worker
    (worker,) = iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(iterator)
    assert isinstance(caught.value.__cause__, OSError)  # of the socket on which it would hand over the tensors
    assert isinstance(as_users_see_it(caught.value), ProcessLostError), repr(caught.value)


def real_lack_of_memory() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_is_one_error_with_a_batch_that_is_smaller(error):
    for batch_size, words in ((16, "batch_size=8"), (3, "batch_size=1"), (None, "batch_size=8")):
        seen = as_users_see_it(error, batch_size)
        assert isinstance(seen, OutOfMemoryError)
        assert seen.exit_code == 81
        assert words in seen.fix
        assert "\n" not in seen.why


def test_a_batch_of_one_is_not_answered_with_a_batch_of_one():
    seen = as_users_see_it(real_lack_of_memory(), 1)
    assert isinstance(seen, OutOfMemoryError)
    assert "can't allocate memory" in seen.why
    assert "batch_size" not in seen.fix
    assert "smaller images" in seen.fix


@pytest.mark.parametrize("error", [ValueError("memory"), KeyboardInterrupt(), UsageError("out of memory of names")])
def test_other_errors_stay_what_they_are(error):
    assert as_users_see_it(error, 8) is error


def test_an_error_of_the_users_own_in_a_worker_stays_what_it_is():
    raised = from_a_worker(ZeroDivisionError("by zero"))
    assert as_users_see_it(raised) is raised


@pytest.mark.long
def test_no_torch_is_needed_to_tell_a_failure():
    code = (
        "import sys, flashtask.core.failures as f; f.as_users_see_it(MemoryError()); sys.exit('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
