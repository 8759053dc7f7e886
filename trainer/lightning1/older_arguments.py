"""Arguments of the Lightning 1.x Trainer: what each means today, or what has replaced it; and argparse."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch

from flashtask.core.errors import UsageError
from flashtask.core.keywords import argument_fix
from flashtask.trainer.callbacks.progress import ProgressBar
from flashtask.trainer.devices.selection import check_devices

__all__ = ["UNDERSTOOD", "ArgparseMixin", "add_arguments", "devices_of_gpus", "given_arguments", "todays_names"]
__all__ += ["unoccupied"]

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
    "enable_autolog_hparams": "self.save_hyperparameters(logger=False) in the module",
    "inference_mode": "leave it out: evaluation always runs without gradients",
    "ipus": 'accelerator="auto"',
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "max_nb_epochs": "max_epochs=...",
    "model_registry": "download the file, and trainer.fit(model, ..., ckpt_path=...)",
    "move_metrics_to_cpu": "leave it out",
    "multiple_trainloader_mode": "trainer.fit(model, CombinedLoader(loaders, mode))",
    "num_processes": 'accelerator="cpu", devices=...',
    "prepare_data_per_node": "leave it out: prepare_data runs once per node",
    "process_position": "callbacks=[ProgressBar()]",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "resume_from_checkpoint": "trainer.fit(model, ..., ckpt_path=...)",
    "stochastic_weight_avg": "callbacks=[StochasticWeightAveraging()]",
    "terminate_on_nan": "leave it out: a NaN always ends a run before it touches the weights",
    "tpu_cores": 'accelerator="auto"',
    "truncated_bptt_steps": "split the sequence in training_step, with automatic_optimization = False",
    "weights_save_path": "default_root_dir=..., or ModelCheckpoint(dirpath=...)",
    "weights_summary": "callbacks=[ModelSummary(max_depth=1)]",
}


def todays_names(trainer_class: type, older: Mapping[str, Any], given: Arguments) -> Arguments:
    """All arguments of a trainer in today's names.

    Args:
        trainer_class: `Trainer`.
        older: arguments that the trainer does not have.
        given: those that it has, with their values.

    Raises:
        UsageError: a name that means nothing, that was replaced, or that contradicts another argument.
    """
    defaults = {name: p.default for name, p in inspect.signature(trainer_class).parameters.items()}
    arguments = dict(given)
    for name, value in older.items():
        if name not in UNDERSTOOD:
            fix = _INSTEAD.get(name) or argument_fix(name, [*given, *UNDERSTOOD]) or "see help(Trainer)"
            raise UsageError(f"Trainer has no argument {name!r}", fix=fix)
        for today, value_today in UNDERSTOOD[name](value, older).items():
            if today == "callbacks":
                held = arguments["callbacks"] or []
                value_today = [*value_today, *(held if isinstance(held, (list, tuple)) else [held])]
            elif arguments[today] != defaults[today]:
                raise UsageError(
                    f"{name}={value!r} and {today}={arguments[today]!r} set the same thing", fix=f"drop {name}"
                )
            arguments[today] = value_today
    return arguments


# ---- gpus=...


def devices_of_gpus(gpus: int | str | Sequence[int] | None, auto_select: bool = False) -> tuple[str, Any, str]:
    """What `gpus` of 1.x means: the accelerator's name, `devices`, and a message for the user, which may be empty.

    Args:
        gpus: None, 0 or an empty list for the CPU, -1 for all (without a GPU, the CPU and a message), how many, or
            their numbers, also as text.
        auto_select: for a number of them, take unused ones.

    Raises:
        UsageError: an invalid value, or CUDA devices that this machine does not have.
    """
    if gpus is None or (not isinstance(gpus, bool) and gpus in (0, "0", [], ())):
        return "cpu", 1, ""
    try:
        wanted = None if gpus == "auto" else check_devices(gpus, None)
    except UsageError:
        wanted = None
    if wanted is None:
        raise UsageError(
            f"gpus={gpus!r}: a number of GPUs, their own numbers, -1 for all or 0 for none is needed",
            fix='accelerator="gpu", devices=1',
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == -1 and not count:
        return "cpu", 1, f"gpus={gpus!r}: there is no CUDA device here, so the CPU is used"
    return "cuda", _cuda_devices(gpus, wanted, count, auto_select), ""


def _cuda_devices(gpus: Any, wanted: int | tuple[int, ...], count: int, auto_select: bool) -> Any:
    highest = max(wanted) + 1 if isinstance(wanted, tuple) else wanted
    if highest > count:
        raise UsageError(
            f"gpus={gpus!r}: the CUDA devices here are: {', '.join(map(str, range(count))) or 'none'}",
            fix='gpus=0 for the CPU, or accelerator="auto", devices=1 for what is here',
        )
    if not auto_select or wanted == -1:
        return list(wanted) if isinstance(wanted, tuple) else wanted
    if isinstance(wanted, tuple):
        raise UsageError(
            f"gpus={gpus!r} says which ones, and auto_select_gpus=True chooses them", fix=f"gpus={len(wanted)}"
        )
    return unoccupied([_memory(index) for index in range(count)], wanted)


def _memory(index: int) -> tuple[int, int]:
    """Free and total bytes of a CUDA device; one that is used exclusively has nothing free."""
    try:
        return torch.cuda.mem_get_info(index)
    except RuntimeError:
        return 0, 1


def unoccupied(memory: Sequence[tuple[int, int]], count: int) -> list[int]:
    """The numbers of the devices with the most free memory; one that has less than half of its own free is in use.

    Args:
        memory: free and total bytes of each device.
        count: how many are wanted.

    Raises:
        UsageError: fewer are free.
    """
    free = [index for index, (left, total) in enumerate(memory) if 2 * left >= total]
    if len(free) < count:
        raise UsageError(
            f"gpus={count}, auto_select_gpus=True: only {len(free)} of {len(memory)} CUDA devices are unoccupied",
            why="less than half of the memory of the others is free",
            fix=f"gpus={len(free)}, or name them: gpus={list(range(count))}",
        )
    return sorted(sorted(free, key=lambda index: -memory[index][0])[:count])


# ---- argparse


class ArgparseMixin:
    """Makes an object of a class from the command line of a script, an option for each argument."""

    @classmethod
    def add_argparse_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Give a parser an option for each argument of the class (`--max_epochs`), except those that it has already."""
        return add_arguments(parser, cls)

    @classmethod
    def from_argparse_args(cls, namespace: argparse.Namespace, **changes: Any) -> Self:
        """The object that a parsed command line asks for; other options of the script are ignored.

        Args:
            namespace: what `parser.parse_args()` gave.
            changes: arguments that win over the namespace's, such as `callbacks`.

        Raises:
            UsageError: a value that an argument cannot have.
        """
        return cls(**{**given_arguments(namespace, cls), **changes})


_WORDS = {"true": True, "false": False, "none": None}


def add_arguments(parser: argparse.ArgumentParser, made: type) -> argparse.ArgumentParser:
    """Give a parser an option for each argument of a trainer or data module, except those that it has already.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group(f"flashtask.{made.__name__}")
    for name, argument in _arguments(made).items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        is_switch = "bool" in str(argument.annotation)
        alone: dict[str, Any] = {"nargs": "?", "const": True} if is_switch else {}
        default = argparse.SUPPRESS if argument.default is argument.empty else argument.default
        with suppress(argparse.ArgumentError):  # the script's own
            group.add_argument(*spellings, dest=name, type=_value, default=default, **alone)
    for name in _older(made):
        with suppress(argparse.ArgumentError):
            group.add_argument(f"--{name}", type=_value, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def given_arguments(namespace: argparse.Namespace, made: type) -> dict[str, Any]:
    """The values in a namespace that are arguments of a class; the others belong to the script."""
    known = {*_arguments(made), *_older(made)}
    return {name: value for name, value in vars(namespace).items() if name in known}


def _arguments(made: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(made).parameters
    return {name: one for name, one in found.items() if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}


def _older(made: type) -> list[str]:
    """Older names of arguments, which a trainer alone has."""
    return list(UNDERSTOOD) if hasattr(made, "older_hooks") else []


def _value(text: str) -> Any:
    """What a word of a command line means: a number, True, None, a list or a dictionary, else the word itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        return text if isinstance(value, tuple) else value  # "0,1" is left to `devices`
    return text
