"""Where a run runs: what accelerator, devices, strategy, precision and plugins come to together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashtask.core.errors import UsageError
from flashtask.trainer.devices.accelerators import Accelerator, check_accelerator, resolve_accelerator
from flashtask.trainer.devices.precision import Precision, check_precision, inference_precision, resolve_precision
from flashtask.trainer.devices.selection import check_devices, device_indices
from flashtask.trainer.distribution.process_strategies import Strategy, automatic_strategy, resolve_strategy

__all__ = ["DevicePlan", "check_device_plan", "resolve_device_plan"]


@dataclass(frozen=True)
class DevicePlan:
    """Where one process of a run computes, and how.

    Args:
        strategy: over which processes the run is spread.
        accelerator: the kind of its devices.
        devices: their numbers, one for each process on this machine.
        device: that of this process.
        precision: the number format of training steps.
        inference_precision: that of evaluation, prediction and feature extraction: the same, except for `auto`.
    """

    strategy: Strategy
    accelerator: Accelerator
    devices: tuple[int, ...]
    device: torch.device
    precision: Precision
    inference_precision: Precision


def check_device_plan(
    *, accelerator: Any, devices: Any, strategy: Any, precision: Any, plugins: Any, num_nodes: int = 1
) -> Strategy:
    """Look at a Trainer's arguments together; no device is asked for.

    Returns:
        The strategy: the given object, or a new one.

    Raises:
        UsageError: one of them means nothing, or two contradict each other.
    """
    chosen, accelerator, precision = _combined(accelerator, (devices, num_nodes), strategy, precision, plugins)
    if num_nodes > 1 and chosen.most_devices is not None:
        raise UsageError(
            f"num_nodes={num_nodes}: the strategy {chosen.name!r} is for one machine",
            fix='strategy="ddp", or leave num_nodes out',
        )
    check_accelerator(accelerator)
    check_devices(devices, chosen.most_devices)
    if precision is not None:
        check_precision(precision)
    return chosen


def resolve_device_plan(
    *,
    accelerator: Any,
    devices: Any,
    strategy: Any,
    precision: Any,
    plugins: Any,
    default_precision: str,
    num_nodes: int = 1,
) -> DevicePlan:
    """Settle where a run runs.

    Args:
        accelerator: `auto`, a name or an object.
        devices: as `check_devices` reads it.
        strategy: None, `auto`, a name or an object.
        precision: None, a name or an object.
        plugins: None, an object or a list of them: strategies and precisions.
        default_precision: what no precision at all means for the module.
        num_nodes: machines.

    Raises:
        UsageError: one of them means nothing, two contradict each other, or a device is not here.
    """
    chosen, accelerator, precision = _combined(accelerator, (devices, num_nodes), strategy, precision, plugins)
    found = resolve_accelerator(accelerator)
    if chosen.most_devices is None and check_devices(devices, None) is None:
        # As many as a launcher has started, else every GPU; one process uses all cores.
        devices = chosen.local_world_size or (1 if found.name == "cpu" else -1)
    indices = device_indices(devices, found, chosen.most_devices)
    device = found.device(indices[chosen.local_rank % len(indices)])
    chosen.plan(device, len(indices), num_nodes)
    wanted = default_precision if precision is None else precision
    of_steps = resolve_precision(wanted, device, found)
    of_results = inference_precision(wanted, device, found) if wanted == "auto" else of_steps
    return DevicePlan(chosen, found, tuple(indices), device, of_steps, of_results)


def _combined(
    accelerator: Any, places: tuple[Any, int], strategy: Any, precision: Any, plugins: Any
) -> tuple[Strategy, Any, Any]:
    """The strategy, and accelerator and precision, wherever they were given."""
    given = _plugins(plugins)
    is_auto = strategy is None or (isinstance(strategy, str) and strategy == "auto")
    strategies = [one for one in given if isinstance(one, Strategy)]
    given_strategy = _only("strategy", [*([] if is_auto else [strategy]), *strategies])
    chosen = resolve_strategy(automatic_strategy(*places) if given_strategy is None else given_strategy)
    precisions = [one for one in given if isinstance(one, Precision)]
    values = [one for one in (precision, chosen.precision_plugin) if one is not None]
    precision = _only("precision", [*values, *precisions])
    kinds = [] if isinstance(accelerator, str) and accelerator.lower() == "auto" else [accelerator]
    kinds += [] if chosen.accelerator is None else [chosen.accelerator]
    return chosen, _only("accelerator", kinds) if kinds else "auto", precision


def _only(what: str, given: list[Any]) -> Any:
    """The one object that was given, in one place or in several; None if none was."""
    different = list({id(one): one for one in given}.values())
    if len(different) > 1:
        names = " and ".join(str(getattr(one, "name", one)) for one in different)
        raise UsageError(
            f"{what} is given twice: {names}",
            why=f"{what}=..., plugins=[...] and the arguments of a strategy all set it, and only one of them may",
            fix=f"leave one of them out: {what}=...",
        )
    return different[0] if different else None


def _plugins(plugins: Any) -> list[Any]:
    """The plugins as a list of strategies and precisions."""
    given = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    for one in given:
        if isinstance(one, type) and issubclass(one, (Strategy, Precision)):
            raise UsageError(f"plugins=[{one.__name__}]: not an object but a class", fix=f"plugins=[{one.__name__}()]")
        if isinstance(one, Accelerator):
            raise UsageError("plugins=[...] takes no accelerator", fix=f"accelerator={type(one).__name__}()")
        if not isinstance(one, (Strategy, Precision)):
            writes_files = callable(getattr(one, "save_checkpoint", None))
            raise UsageError(
                f"plugins=[{one!r}]: a Strategy or a Precision is needed",
                why="checkpoints are always files that are written by one rename" if writes_files else "",
                fix="ModelCheckpoint(dirpath=...), and a callback that copies its files in on_epoch_end"
                if writes_files
                else 'strategy="auto", precision="bf16-mixed" for those that have names',
            )
    return given
