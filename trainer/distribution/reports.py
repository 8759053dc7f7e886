"""The report of a process that failed, and the error that the others raise for it."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Any

from flashtask.core import errors
from flashtask.core.errors import FlashtaskError, ProcessLostError, UnknownNameError, UsageError
from flashtask.core.failures import as_users_see_it
from flashtask.trainer.distribution.environment import ProcessInfo

__all__ = [
    "CONTINUE",
    "error_in",
    "exit_code_of",
    "how_it_ended",
    "is_bystander",
    "mute",
    "of_a_bystander",
    "report_of",
]

CONTINUE = "the run can be continued from its last.ckpt (--resume)"


def report_of(error: BaseException, process: ProcessInfo, is_of_the_group: bool) -> dict[str, Any]:
    """An error as plain data.

    Args:
        error: what ended the run in this process.
        process: this one.
        is_of_the_group: it only reports that another process is gone.
    """
    seen = as_users_see_it(error)
    report: dict[str, Any] = {"rank": process.rank, "of": process.world_size, "is_of_the_group": is_of_the_group}
    report |= {"kind": type(seen).__name__, "trace": "".join(traceback.format_exception(error))}
    if isinstance(seen, SystemExit):
        return {**report, "code": exit_code_of(seen)}
    if isinstance(seen, FlashtaskError):
        return {**report, "what": seen.what, "why": seen.why, "fix": seen.fix}
    return {**report, "what": f"{type(seen).__name__}: {seen}"}


def error_in(report: dict[str, Any]) -> BaseException:
    """The error that a report describes: of the same kind where it is one of flashtask's, and naming the process."""
    if report["kind"] == "KeyboardInterrupt":
        return KeyboardInterrupt()
    if report["kind"] == "SystemExit":
        return SystemExit(report["code"])
    who, kind = f"process {report['rank']} of {report['of']}", getattr(errors, report["kind"], None)
    if isinstance(kind, type) and issubclass(kind, FlashtaskError):
        kind = UsageError if issubclass(kind, UnknownNameError) else kind
        return kind(f"{who}: {report['what']}", why=report["why"], fix=report["fix"])
    error = ProcessLostError(f"{who} failed: {report['what']}")
    error.add_note(f"In process {report['rank']}:\n{report['trace']}".rstrip())
    return error


def how_it_ended(rank: int, code: int, where: str = "") -> str:
    """A process that was lost, in words.

    Args:
        rank: of the process.
        code: its exit code as subprocess has it, negative for a signal.
        where: the place in the run, if it is known.
    """
    place = f" {where}" if where else ""
    if code >= 0:
        return f"process {rank} ended with code {code}{place}"
    memory = "; the system does this when memory runs out" if -code == signal.SIGKILL else ""
    return f"process {rank} was ended by {signal.Signals(-code).name}{place}{memory}"


def exit_code_of(error: BaseException) -> int:
    """The code that a process ends with for an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, FlashtaskError) else 1


def of_a_bystander(error: BaseException) -> BaseException:
    """An error of a process that only missed another: the report of that one takes precedence."""
    error.is_bystanders = True  # type: ignore[attr-defined]
    return error


def is_bystander(error: BaseException) -> bool:
    """Whether an error is of a process that only missed another."""
    return getattr(error, "is_bystanders", False)


def mute(error: BaseException) -> BaseException:
    """Another process reports this error: here it ends the script, or the command, without a message."""
    of_a_bystander(error).is_reported_elsewhere = True  # type: ignore[attr-defined]
    before = sys.excepthook

    def unless_it_is_reported(kind: Any, raised: BaseException, trace: Any) -> None:
        if not getattr(raised, "is_reported_elsewhere", False):
            before(kind, raised, trace)

    sys.excepthook = unless_it_is_reported
    return error
