"""Which run folder an earlier attempt of the same torchrun wrote, so that a restarted script goes on in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from flashtask.trainer.distribution.heartbeat import start_of

__all__ = ["leave_mark", "was_begun_by_us", "wipe_mark"]

_MARK = ".attempt"


def leave_mark(folder: Path) -> None:
    """Under torchrun: note in a run folder that this job writes it."""
    if (job := _job(os.environ)) is not None:
        with suppress(OSError):
            (folder / _MARK).write_text(job, "utf-8")


def wipe_mark(folder: Path) -> None:
    """Take the note away, if the folder holds nothing else."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [_MARK]:
            (folder / _MARK).unlink()


def was_begun_by_us(folder: Path) -> bool:
    """Whether torchrun has started this process again, and an earlier attempt wrote this run folder."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (folder / _MARK).read_text("utf-8") == _job(os.environ)
    except OSError:
        return False


def _job(environment: Mapping[str, str]) -> str | None:
    """A name for this torchrun: the id that the user or torchrun gave it, else its agent's process."""
    job = environment.get("TORCHELASTIC_RUN_ID")
    if job != "none":
        return job
    agent = os.getppid()
    return f"agent {agent} of {start_of(agent)} on {platform.node()}"
