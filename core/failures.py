"""Failures of the machine and of worker processes, as errors of flashtask's. Imports no torch.

What comes from torch is known by the names of its classes and by its wording.
"""

from __future__ import annotations

import errno
import re

from flashtask.core import errors
from flashtask.core.errors import (
    DivergedError,
    FlashtaskError,
    OutOfMemoryError,
    ProcessLostError,
    UnknownNameError,
    UsageError,
)

__all__ = ["as_users_see_it", "lost_worker"]

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_WORKER_LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)")
_WORKER_TIMED_OUT = re.compile(r"DataLoader timed out after (\d+) seconds")
_NO_DESCRIPTORS = re.compile(r"Too many open files|received 0 items of ancdata")
_SINGLE_IN_BATCHNORM = "Expected more than 1 value per channel when training"
_NAN_GRADIENT = re.compile(r"Function '(\w+)' returned nan values")
#: What timm's and torchvision's vision transformers raise for an image of another size than theirs.
_OTHER_SIZE = re.compile(
    r"Input (height|width) \((\d+)\) doesn't match model \((\d+)\)"
    r"|Wrong image (height|width)! Expected (\d+) but got (\d+)"
)
_NOT_SENT = re.compile(r"[Cc]an't (?:pickle|get) local object|[Cc]annot pickle|[Cc]an't pickle <")
_SIGNAL = re.compile(r"killed by signal: ([\w ]+)")
_CAUGHT = re.compile(r"Caught (\w+) in .*\nOriginal Traceback", re.MULTILINE)


def as_users_see_it(error: BaseException, batch_size: int | None = None) -> BaseException:
    """What to raise or print in place of an error: the error itself, unless it can be named better.

    Args:
        error: whatever ended a run or a command.
        batch_size: samples in a batch of the run, if it is known; a lack of memory is answered with a smaller one.

    Returns:
        `OutOfMemoryError` for what torch, Python or the system raise when memory runs out; `ProcessLostError` for a
        worker of a data loader that died, hangs or cannot be reached; `DivergedError` for a NaN that torch's anomaly
        detection found; an error of flashtask's that a worker raised, without the traceback around it.
    """
    if (from_worker := _from_a_worker(error)) is not None:
        return from_worker
    if isinstance(error, FlashtaskError):
        return error
    if (lost := lost_worker(error)) is not None:
        return lost
    if isinstance(error, RuntimeError) and (waited := _WORKER_TIMED_OUT.search(str(error))):
        what = f"a process that loads data gave no batch for {waited[1]} s"
        return ProcessLostError(what, why="it hangs, or is slow", fix="a longer timeout, or num_workers=0 to see where")
    if isinstance(error, (RuntimeError, OSError)) and _NO_DESCRIPTORS.search(str(error)):
        return ProcessLostError(
            "data cannot be exchanged with the processes that load it: too many open files",
            why=str(error).strip().splitlines()[-1],
            fix="`ulimit -n 4096` before the run, fewer num_workers, or num_workers=0",
        )
    if isinstance(error, ValueError) and _SINGLE_IN_BATCHNORM in str(error):
        return UsageError(
            "BatchNorm cannot train on a batch of one image or sample",
            why=str(error),
            fix='batches of at least 2 (batch_size, drop_last=True in a loader of your own), or strategy="freeze"',
        )
    if isinstance(error, AssertionError) and (found := _OTHER_SIZE.search(str(error))):
        given, taken = (found[2], found[3]) if found[2] else (found[6], found[5])
        return UsageError(
            f"the model takes images of one size, with {found[1] or found[4]} {taken}, and a batch has {given}",
            why=str(error),
            fix=f"images of that size from your transform or loader: Resize(({taken}, {taken})) in torchvision",
        )
    if (isinstance(error, (AttributeError, TypeError)) or type(error).__name__ == "PicklingError") and _NOT_SENT.search(
        str(error)
    ):
        return UsageError(
            "what loads the data cannot be sent to a worker process",
            why=str(error),
            fix="a function at the top level of a module in place of a lambda or an inner function, or num_workers=0",
        )
    if isinstance(error, RuntimeError) and (found := _NAN_GRADIENT.search(str(error))):
        return DivergedError(
            f"a gradient became NaN in {found[1]}",
            why="the warning above shows the call that made it",
            fix="keep its argument away from where the derivative is infinite, such as the root of 0",
        )
    return _out_of_memory(error, batch_size) if _lacks_memory(error) else error


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _out_of_memory(error: BaseException, batch_size: int | None) -> OutOfMemoryError:
    if batch_size is None:
        what, fix = "out of memory", "smaller batches (batch_size=8), or num_workers=0"
    elif batch_size > 1:
        what = f"out of memory with batches of {batch_size}"
        fix = f"batch_size={batch_size // 2}; with accumulate_grad_batches=2 it trains the same"
    else:
        what, fix = "out of memory with batches of 1", "smaller images, or a smaller backbone"
    # A worker's text begins with where it was caught; what it ran out of ends it.
    lines = str(error).strip().splitlines() or [""]
    return OutOfMemoryError(what, why=lines[-1] if _CAUGHT.search(str(error)) else lines[0], fix=fix)


def lost_worker(error: BaseException) -> ProcessLostError | None:
    """The death of a process of a data loader, if that is what an error of torch's or of a connection tells."""
    # The signal may be named in the error that this one came from, or that came on the way out.
    texts = [str(part) for part in (error, error.__cause__, error.__context__) if part is not None]
    texts += getattr(error, "__notes__", ())
    # A worker that is killed while it hands over a batch is missed as the other end of a connection.
    is_of_workers = isinstance(error, RuntimeError) or (
        isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and _is_from_handing_over(error)
    )
    found = next((named for text in texts if (named := _WORKER_LOST.search(text))), None)
    if not is_of_workers or (found is None and isinstance(error, RuntimeError)):
        return None
    if found is None:
        return ProcessLostError("a process that loads data died", fix="num_workers=0 loads in this process")
    signal = next((named[1].strip() for text in texts if (named := _SIGNAL.search(text))), "")
    what = f"a process that loads data (pid {found[1].strip()}) " + (f"was killed: {signal}" if signal else "died")
    why = {
        "Killed": "the system does that to a process when memory runs out",
        "Bus error": "shared memory (/dev/shm) ran out",
    }.get(signal, "")
    return ProcessLostError(what, why=why, fix="num_workers=0 loads in this process")


def _is_from_handing_over(error: BaseException) -> bool:
    """Whether an error comes from where a batch is received from another process."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") == "torch.multiprocessing.reductions":
            return True
        frame = frame.tb_next
    return False


def _from_a_worker(error: BaseException) -> FlashtaskError | None:
    """The error whose traceback a data loader put into the message of another of its kind (or of a RuntimeError)."""
    text = error.what if isinstance(error, FlashtaskError) else str(error) if isinstance(error, RuntimeError) else ""
    caught = _CAUGHT.search(text)
    if caught is None:
        return None
    kind = type(error) if isinstance(error, FlashtaskError) else getattr(errors, caught[1], None)
    if not (isinstance(kind, type) and issubclass(kind, FlashtaskError)):
        return None
    *_, own = re.split(rf"^(?:\w+\.)*{caught[1]}: ", text, flags=re.MULTILINE)
    what, _, fix = own.strip().partition("\n  fix: ")
    what, _, why = what.partition("\n  why: ")
    # Its arguments are those of a mistyped name, which are lost.
    made = UsageError if issubclass(kind, UnknownNameError) else kind
    return made(what, why=why, fix=fix)
