"""Which checkpoint of a run folder a run is continued from."""

from __future__ import annotations

import sys
from pathlib import Path

from flashtask.core.errors import IntegrityError, UsageError

__all__ = ["checkpoints_in", "newest_whole_checkpoint"]


def newest_whole_checkpoint(folder: Path) -> Path:
    """`last.ckpt` if it is undamaged, else the next best checkpoint to continue from, with a warning on stderr.

    Raises:
        IntegrityError: there is no undamaged one.
        UsageError: all that are undamaged hold weights only.
    """
    from flashtask.core.checkpoint import read_header

    problem: IntegrityError | UsageError | None = None
    for path in checkpoints_in(folder):
        try:
            if "progress" not in read_header(path):
                weights = f"{path} holds weights only and cannot be continued"
                problem = problem or UsageError(weights, fix="flashtask finetune in another --output-dir")
                continue
        except IntegrityError as error:
            print(f"warning: {error.what}", file=sys.stderr)
            problem = error
            continue
        if problem is not None:
            print(f"continuing from {path.name} instead", file=sys.stderr)
        return path
    assert problem is not None
    raise problem


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run folder in the order to try them: the last, the best, others newest first."""
    names = ("last.ckpt", "best.ckpt")
    others = [path for path in folder.glob("*.ckpt") if path.name not in names]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [*(folder / name for name in names if (folder / name).exists()), *others]
