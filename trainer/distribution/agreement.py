"""What all processes must have the same of, compared before the first tensor is exchanged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashtask._version import __version__
from flashtask.core.errors import UsageError
from flashtask.trainer.hyperparameters import plain_hyperparameters

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run
    from flashtask.trainer.trainer import Trainer

__all__ = ["facts_at_start", "facts_of_data", "facts_of_module", "require_the_same"]

#: Arguments of a trainer that each process may have its own of: how visibly it runs, and where.
_OWN = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "plugins", "strategy"),
        *("default_root_dir", "output_dir", "logger", "flush_logs_every_n_steps", "log_every_n_steps"),
        *("callbacks", "enable_model_summary", "enable_progress_bar", "profiler"),
    }
)


def facts_at_start(run: Run) -> dict[str, str]:
    """The stage, what continues it, the trainer's arguments, the module and the versions, each as a short text."""
    facts = {"the stage": run.stage, "flashtask": __version__, "torch": str(torch.__version__)}
    for name in ("resume_from", "weights_from"):
        facts["ckpt_path"] = facts.get("ckpt_path") or _file(getattr(run, name, None))
    facts |= {f"Trainer({name}=...)": _plain(value) for name, value in _arguments(run.trainer) if name not in _OWN}
    facts["the module's class"] = type(run.module).__qualname__
    hparams = plain_hyperparameters(run.module)
    facts |= {f"hyper-parameter {name}": _plain(value) for name, value in hparams.items()}
    return facts


def facts_of_module(module: Module) -> dict[str, str]:
    """Names and shapes of what it holds."""
    held = [(name, tuple(one.shape)) for name, one in (*module.named_parameters(), *module.named_buffers())]
    return {f"shape of {name}": "x".join(map(str, shape)) or "a number" for name, shape in held}


def facts_of_data(run: FitRun) -> dict[str, str]:
    """How many samples there are to train on, and how they are put into batches."""
    ordered = getattr(run, "ordered", None)
    if ordered is None:
        return {}
    return {
        "number of training samples": str(ordered.length),
        "batch_size": str(ordered.own_size),
        "shuffle": str(ordered.shuffle),
        "drop_last": str(ordered.drop_last),
    }


def _arguments(trainer: Trainer) -> Sequence[tuple[str, Any]]:
    return list(trainer.arguments.items())


def _file(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return f"{path} ({os.stat(path).st_size} bytes)"
    except OSError:
        return f"{path} (which is not there)"


def _plain(value: Any) -> str:
    """A value as text, the same in every process: of an object only its class."""
    if value is None or isinstance(value, (bool, int, float, str, Path)):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key!r}: {_plain(part)}" for key, part in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(_plain(part) for part in value)}]"
    else:
        text = type(value).__name__
    return text if len(text) <= 200 else f"{text[:80]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def require_the_same(by_rank: Sequence[Mapping[str, str]]) -> None:
    """Check that every process has the same facts as the first.

    Args:
        by_rank: the facts of each process, in the order of their ranks.

    Raises:
        UsageError: one of them differs; with its rank and both values.
    """
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        names = [name for name in (*first, *(n for n in other if n not in first)) if first.get(name) != other.get(name)]
        if not names:
            continue
        different = [
            f"{name}: {first.get(name) or 'none'} in process 0, {other.get(name) or 'none'} in process {rank}"
            for name in names[:4]
        ]
        more = [f"and {len(names) - 4} more"] if len(names) > 4 else []
        is_file = names[0] == "ckpt_path"
        raise UsageError(
            f"process {rank} does not do the same as process 0",
            why="\n    ".join([*different, *more]),
            fix="a folder that every machine sees"
            if is_file
            else "the same script, arguments and data for all processes",
        )
