"""Arguments of the Lightning 1.x Trainer, in one table: what each means today, or what has replaced it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.keywords import argument_fix
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.placement.devices import devices_of_gpus

__all__ = ["UNDERSTOOD", "todays_names"]

Arguments = dict[str, Any]


def _gpus(value: Any, older: Mapping[str, Any]) -> Arguments:
    accelerator, devices, message = devices_of_gpus(value, bool(older.get("auto_select_gpus", False)))
    if message:
        print(message, file=sys.stderr)
    return {"accelerator": accelerator, "devices": devices}


def _auto_select_gpus(value: Any, older: Mapping[str, Any]) -> Arguments:
    if value and "gpus" not in older:
        raise UsageError("auto_select_gpus=True needs to know how many", fix="gpus=2, auto_select_gpus=True")
    return {}


def _refresh_rate(value: Any, older: Mapping[str, Any]) -> Arguments:
    return {"callbacks": [ProgressBar(refresh_rate=value)]} if value else {"enable_progress_bar": False}


def _renamed(name: str) -> Callable[[Any, Mapping[str, Any]], Arguments]:
    return lambda value, older: {name: value}


#: What is understood: older name -> what it means in today's arguments.
UNDERSTOOD: dict[str, Callable[[Any, Mapping[str, Any]], Arguments]] = {
    "auto_batch_size_finder": _renamed("auto_scale_batch_size"),
    "auto_select_gpus": _auto_select_gpus,
    "checkpoint_callback": _renamed("enable_checkpointing"),
    "gpus": _gpus,
    "progress_bar_refresh_rate": _refresh_rate,
    "replace_sampler_ddp": _renamed("use_distributed_sampler"),
}

#: What is not: older name, or a name that belongs elsewhere -> what to write instead.
_INSTEAD = {
    "amp_backend": 'precision="16-mixed"',
    "amp_level": 'precision="16-mixed"',
    "barebones": "enable_checkpointing=False, logger=False, enable_progress_bar=False, enable_model_summary=False",
    "ckpt_path": "trainer.fit(model, ..., ckpt_path=...)",
    "distributed_backend": "strategy=...",
    "inference_mode": "leave it out: evaluation always runs without gradients",
    "ipus": 'accelerator="auto"',
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "max_nb_epochs": "max_epochs=...",
    "move_metrics_to_cpu": "leave it out",
    "multiple_trainloader_mode": "one loader that gives what a step needs",
    "num_processes": 'accelerator="cpu", devices=...',
    "prepare_data_per_node": "leave it out: prepare_data runs once per node",
    "process_position": "callbacks=[ProgressBar()]",
    "reload_dataloaders_every_epoch": "leave it out: the order of samples is drawn anew every epoch",
    "resume_from_checkpoint": "trainer.fit(model, ..., ckpt_path=...)",
    "stochastic_weight_avg": "callbacks=[StochasticWeightAveraging()]",
    "terminate_on_nan": "leave it out: a NaN always ends a run before it touches the weights",
    "tpu_cores": 'accelerator="auto"',
    "truncated_bptt_steps": "split the sequence in training_step, with automatic_optimization = False",
    "val_check_interval": "check_val_every_n_epoch=1",
    "weights_save_path": "default_root_dir=..., or ModelCheckpoint(dirpath=...)",
    "weights_summary": "callbacks=[ModelSummary(max_depth=1)]",
}


def todays_names(older: Mapping[str, Any], given: Arguments) -> Arguments:
    """All arguments of a Trainer in today's names.

    Args:
        older: arguments that the Trainer does not have.
        given: those that it has, with their values.

    Raises:
        UsageError: a name that means nothing, that was replaced, or that says what another argument says too.
    """
    from flashtask.trainer.trainer import Trainer

    defaults = {name: p.default for name, p in inspect.signature(Trainer).parameters.items()}
    arguments = dict(given)
    for name, value in older.items():
        if name not in UNDERSTOOD:
            fix = _INSTEAD.get(name) or argument_fix(name, [*given, *UNDERSTOOD]) or "see help(Trainer)"
            raise UsageError(f"Trainer has no argument {name!r}", fix=fix)
        for today, meant in UNDERSTOOD[name](value, older).items():
            if today == "callbacks":
                held = arguments["callbacks"] or []
                meant = [*meant, *(held if isinstance(held, (list, tuple)) else [held])]
            elif arguments[today] != defaults[today]:
                raise UsageError(
                    f"{name}={value!r} and {today}={arguments[today]!r} say one thing twice", fix=f"drop {name}"
                )
            arguments[today] = meant
    return arguments
