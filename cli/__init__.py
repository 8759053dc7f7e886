"""The command line: recipes, finetune, tune, predict, validate, test, zoo. Knows every room; no room knows it.

`main` is the one place where errors become text and exit codes. Torch is imported when a command needs it.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

import click

from flashtask.cli.flags import as_flags
from flashtask.cli.processes import SHARED, heard, here, silence
from flashtask.cli.usage import explain
from flashtask.core.errors import FlashtaskError
from flashtask.core.failures import as_users_see_it

__all__ = ["main", "run"]

_BUG, _STORAGE, _INTERRUPTED = 70, 74, 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The `flashtask` command: runs `argv` (by default the arguments of the process), exits with its code."""
    # Imports make a million objects and no garbage: by default a fifth of the time to import timm goes into looking.
    gc.set_threshold(20_000, 50, 100)
    # The error about an image that is too large says the same, and what to do.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")
    code = run(sys.argv[1:] if argv is None else argv)
    gc.freeze()  # so that Python does not spend a second at its end on finding garbage
    if (group := sys.modules.get("flashtask.trainer.distribution.group")) is not None:
        group.hard_exit(code, if_abandoned=True)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """One command line, from its arguments to its exit code; what went wrong is told on standard error.

    Args:
        argv: the arguments after `flashtask`.

    Returns:
        The exit code, as docs/command-line.md lists them.
    """
    _never_fail_to_print()
    place = here()
    if place is None or not place.rank:
        return _run(argv, sys.stderr)
    if not any(word in SHARED for word in argv):
        return 0  # the first of several processes does it
    told = sys.stderr
    with silence():
        return _run(argv, told)


def _run(argv: Sequence[str], told: TextIO) -> int:
    """One command line; what ended it is written to `told`, and everything else where Python writes."""
    from flashtask.cli.commands import flashtask

    try:
        with flashtask.make_context("flashtask", list(argv)) as context:
            flashtask.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError as error:
        return 0 if _reader_is_gone() else _report(error, argv, told)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, argv, told)
    return 0


def _report(error: BaseException, argv: Sequence[str], told: TextIO) -> int:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        _drop_stdout()  # what could not be written would fail once more at exit
    if "--debug" in argv:
        traceback.print_exception(error)
    error = explain(error, argv) if isinstance(error, click.ClickException) else as_users_see_it(error)
    if isinstance(error, FlashtaskError):
        error.fix = as_flags(error.fix, argv)
    text, code = _told(error)
    if getattr(error, "is_reported_elsewhere", False):
        return code  # by another process of the same run
    if text := heard(text, error, here()):
        print(text, file=told)
    return code


def _told(error: BaseException) -> tuple[str, int]:
    """What the user reads, and the exit code."""
    if isinstance(error, FlashtaskError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "stopped (Ctrl-C)", _INTERRUPTED
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return (
            f"error: a write failed: {error.strerror}\n  fix: free some space (`df -h`), or write elsewhere",
            _STORAGE,
        )
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return (
        f"error: {what}\n  why: this is a bug in flashtask, not in what you typed\n"
        "  fix: run the same command with --debug, and report what it prints"
    ), _BUG


def _never_fail_to_print() -> None:
    """A terminal that lacks a character gets an escape instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more (`| head`); the rest then goes nowhere, in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _drop_stdout()
    return True


def _drop_stdout() -> None:
    with suppress(OSError):  # a stream in memory has no file to replace
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
