"""`summary.json`: what a run came to, in one small file."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from flashtask._version import __version__
from flashtask.trainer.checkpointing import ModelCheckpoint
from flashtask.trainer.run import FitRun

__all__ = ["describe_stages", "summary_of"]


def summary_of(run: FitRun, checkpoint: ModelCheckpoint | None) -> dict[str, Any]:
    """Task, backbone, strategy, completed epochs, the best epoch's metrics, time, size and versions."""
    if checkpoint is not None and checkpoint.best_epoch is not None:
        best = dict(checkpoint.best_metrics)
    else:
        best = dict(run.history[-1]) if run.history else {}
    return {
        "task": run.module.describe().get("task"),
        "backbone": dict(run.module.hparams).get("backbone"),
        "strategy": run.freezing.finetuning.name if run.freezing is not None else None,
        "epochs": len(run.history),
        "steps": run.global_step,
        "best": best,
        "seconds": round(run.seconds, 3),
        f"{run.module.sample_noun}_per_second": round(run.samples_seen / run.seconds, 2) if run.seconds else None,
        "parameters": sum(p.numel() for p in run.module.parameters()),
        "trainable_parameters": sum(p.numel() for p in run.module.parameters() if p.requires_grad),
        "seed": run.seed,
        "device": run.device.type,
        "precision": run.precision.name,
        "stopped": run.stop_reason or None,
        "versions": {
            "flashtask": __version__,
            "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in ("torchvision", "timm", "torchmetrics")},
            "python": platform.python_version(),
        },
    }


def describe_stages(run: FitRun) -> list[str]:
    """For each stage of a finetuning strategy: from which epoch how many parameters train, and at which rates."""
    if run.freezing is None:
        return []
    total = sum(p.numel() for p in run.module.parameters())
    sizes = {name: p.numel() for name, p in run.module.named_parameters()}
    outside = total - sum(sizes[name] for group in run.freezing.groups for name in group)
    lines = []
    for stage in run.freezing.finetuning.stages:
        count = outside + sum(sizes[name] for name in run.freezing.trainable(stage))
        part = "head only" if stage.frozen else "all" if stage.layers is None else f"head and last {stage.layers} layers"
        lines.append(f"from epoch {stage.start}: {count:,} of {total:,} parameters train ({part})")
    return lines
