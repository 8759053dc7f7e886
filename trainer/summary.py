"""`summary.json`: what a run came to, in one small file."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from flashtask._version import __version__
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.hyperparameters import plain_hyperparameters
from flashtask.trainer.rates import target_rates

__all__ = ["announce", "summary_of"]

#: Of more phases than these, the first ones and the last are told.
_MOST_PHASES = 6


def summary_of(run: FitRun, checkpoint: ModelCheckpoint | None) -> dict[str, Any]:
    """Task, backbone, strategy, completed epochs, the best epoch's metrics, time, size and versions."""
    if checkpoint is not None and checkpoint.best_epoch is not None:
        best = dict(checkpoint.best_metrics)
    else:
        best = dict(run.history[-1]) if run.history else {}
    return {
        "task": run.module.describe().get("task"),
        "backbone": plain_hyperparameters(run.module).get("backbone"),
        "strategy": run.freezing.finetuning.name if run.freezing is not None else None,
        "epochs": len(run.history),
        "steps": run.global_step,
        "best": best,
        "seconds": round(run.seconds, 3),
        f"{run.module.sample_noun}_per_second": round(run.samples_seen / run.training_seconds, 2)
        if run.training_seconds
        else None,
        "parameters": sum(p.numel() for p in run.module.parameters()),
        "trainable_parameters": sum(p.numel() for p in run.module.parameters() if p.requires_grad),
        "seed": run.seed,
        "device": run.device.type,
        "precision": run.precision.name,
        "stopped": run.stop_reason or None,
        "versions": {
            "flashtask": __version__,
            "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in ("torchmetrics", *run.module.libraries)},
            "python": platform.python_version(),
        },
    }


def announce(run: FitRun) -> list[str]:
    """What is said before training: seed, device, formats, processes; what trains from when on, at which rates."""
    layout = "channels_last" if run.memory_format is torch.channels_last else "contiguous"
    several = f", {run.strategy.world_size} processes ({run.strategy.name})" if run.strategy.world_size > 1 else ""
    lines = [f"seed {run.seed}, {run.device.type}, {_formats(run)}, {layout}{several}"]
    if run.freezing is None:
        return lines
    if run.solving is not None:
        return [*lines, f"finetuning {run.freezing.finetuning.name}: one pass, then the head is solved on the features"]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in target_rates(run.optimizers).items())
    return [*lines, f"finetuning {run.freezing.finetuning.name}, {rates}", *_describe_phases(run, run.freezing)]


def _formats(run: FitRun) -> str:
    training, inference = run.precision.name, run.inference_precision.name
    return training if training == inference else f"{training} for training steps, {inference} for evaluation"


def _describe_phases(run: FitRun, freezing: Freezing) -> list[str]:
    total = sum(p.numel() for p in run.module.parameters())
    strategy, last = freezing.finetuning, run.max_epochs
    lines = []
    for number, (start, phase) in enumerate(zip(strategy.starts, strategy.phases, strict=True)):
        when = f"from epoch {start}" if start is not None else f"after {strategy.phases[number - 1].end}"
        never = "; the run ends before" if start is not None and last is not None and start >= last else ""
        lines.append(f"  {when}: {freezing.count(number):,} of {total:,} parameters train ({phase.train}){never}")
    if len(lines) <= _MOST_PHASES:
        return lines
    return [*lines[: _MOST_PHASES - 1], f"  ... {len(lines) - _MOST_PHASES} more phases", lines[-1]]
