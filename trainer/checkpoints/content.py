"""What a checkpoint holds: what describes the module, its weights, and what a resume needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtask.core.seeding import generator_states
from flashtask.trainer.callbacks.callback import keeps_state, state_name
from flashtask.trainer.distribution.sharded_tensors import whole
from flashtask.trainer.finetuning.lora import describe_adapters
from flashtask.trainer.hyperparameters import hyperparameters_content
from flashtask.trainer.run_record import data_counts, environment, settings_of

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["ROWS", "checkpoint_content", "weights_only"]

#: The rows of the log among what `FitRun.state_dict` gives.
ROWS = ("history", "validations")
#: Keys that only a resume needs.
_ONLY_FOR_RESUMING = (
    "progress",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "precision",
    "datamodule",
    "random",
    "random_of_processes",
    "results_of_processes",
    "batch_of_all",
    "seed",
    "settings",
)


def checkpoint_content(run: FitRun) -> dict[str, Any]:
    """Everything a checkpoint holds: what describes the module, its weights, and what a resume needs."""
    module = run.module
    progress = run.state_dict()
    run.flush_logs()  # so that the logs on disk reach to where this checkpoint continues
    states, results = zip(*run.strategy.gather((generator_states(), progress["results"])), strict=True)
    content: dict[str, Any] = {
        **module.describe(),
        **describe_adapters(module),
        **hyperparameters_content(module),
        "epoch": run.epoch,
        "global_step": run.global_step,
        "state_dict": module.state_dict(),
        "metrics": run.metrics_of_weights,
        "environment": environment(run),
        "recipe": run.recipe,
        "data_counts": data_counts(run.data),
        "progress": {**progress, **{name: _as_bytes(progress[name]) for name in ROWS}},
        "optimizer_states": [optimizer.state_dict() for optimizer in run.optimizers],
        "lr_schedulers": [rate.scheduler.state_dict() for rate in run.schedulers],
        "callbacks": {state_name(one): one.state_dict() for one in run.callbacks if keeps_state(one)},
        "precision": {"name": run.precision.name, "state": run.precision.state_dict()},
        "datamodule": run.data.state_dict(),
        **{f"datamodule_{name}": value for name, value in hyperparameters_content(run.data).items()},
        "random": states[run.strategy.global_rank],
        **({"random_of_processes": [*states], "results_of_processes": [*results]} if len(states) > 1 else {}),
        "batch_of_all": run.batch_of_all,
        "seed": run.seed,
        "settings": settings_of(run),
    }
    # Callbacks and the module find whole tensors, and may add sharded ones.
    content = whole(content, run.strategy.is_global_zero)
    for callback in run.callbacks:
        callback.on_save_checkpoint(run.trainer, module, content)
    run.data.on_save_checkpoint(content)
    module.on_save_checkpoint(content)
    found: dict[str, Any] = whole(content, run.strategy.is_global_zero)
    return found


def weights_only(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint without what only a resume needs."""
    return {key: value for key, value in content.items() if key not in _ONLY_FOR_RESUMING}


def _as_bytes(rows: list[dict[str, float]]) -> torch.Tensor:
    """Rows as a tensor: they grow with the run, and the header of the file must not."""
    text = json.dumps(rows, separators=(",", ":"))
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
