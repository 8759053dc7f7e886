"""`flashtask bench`: what this machine does with a backbone, and what `auto` makes of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtask.backbones.default import default_backbone
from flashtask.core.errors import OutOfMemoryError
from flashtask.core.failures import as_users_see_it
from flashtask.trainer.text_table import text_table, wrapped

if TYPE_CHECKING:
    from flashtask.tasks.speed import Speed

__all__ = ["bench"]

_SECONDS = 2.0
_BATCH_SIZE = 32
_IMAGES = 1000


def bench(backbone: str | None, params: Mapping[str, Any]) -> None:
    """Run the command; on Ctrl-C what has been measured is shown before it ends.

    Args:
        backbone: its name, if the user gave one.
        params: the options of the command.

    Raises:
        UnknownNameError: no backbone has this name.
        OutOfMemoryError: a batch does not fit.
    """
    from flashtask.backbones import BACKBONES

    name = backbone or default_backbone()
    BACKBONES.entry(name)  # before torch is loaded
    batch_size, seconds = params["batch_size"] or _BATCH_SIZE, params["seconds"] or _SECONDS
    accelerator = params["accelerator"] or "auto"
    try:
        _measure(name, batch_size, accelerator, seconds, params)
    except Exception as error:
        told = as_users_see_it(error, batch_size)
        if isinstance(told, OutOfMemoryError) and batch_size > 1:
            told.fix = f"--batch-size {batch_size // 2}"
        raise told from (None if told is error else error)


def _measure(name: str, batch_size: int, accelerator: str, seconds: float, params: Mapping[str, Any]) -> None:
    from flashtask.tasks.speed import prepared_speed

    options = {"batch_size": batch_size, "accelerator": accelerator, "compiled": params["compile"]}
    with prepared_speed(name, **options) as speed:
        stopped = None
        count = len(speed.rates)
        click.echo(f"measuring {count} options, {seconds:g} s each: {count * seconds:.0f} s or more", err=True)
        try:
            speed.measure(seconds)
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
        if speed.measured:
            facts = {"backbone": name, "batch_size": batch_size, "is_complete": stopped is None}
            shown = json.dumps(_as_json(speed, facts)) if params["json"] else "\n".join(_lines(speed, facts))
            click.echo(shown)
        if stopped is not None:
            raise stopped


def _lines(speed: Speed, facts: Mapping[str, Any]) -> Iterator[str]:
    size = "x".join(map(str, speed.task.preprocessing.input_size))
    yield f"{facts['backbone']}, images of {size}, batches of {facts['batch_size']}, {speed.auto.device.type}"
    yield ""
    rows = [
        (
            f"{'*' if rate.is_auto else ' '} {rate.work:<8} {rate.option}",
            f"{rate.median:.1f}",
            f"{min(rate.rounds):.1f} - {max(rate.rounds):.1f}",
        )
        for rate in speed.measured
    ]
    yield from text_table(("", "images/s", "min - max"), rows).splitlines()
    yield ""
    yield from wrapped(f"* auto: {_why(speed)}")
    if (faster := _faster(speed)) is not None:
        yield from wrapped(faster)
    yield from (line for text in _estimates(speed) for line in wrapped(text))
    yield from wrapped(", ".join(_machine(speed).values()))


def _why(speed: Speed) -> str:
    auto = speed.auto
    has = "has native bfloat16" if auto.has_bfloat16 else "has no native bfloat16"
    layout = {
        "channels_last": "channels_last, as the network has 2-D convolutions",
        "contiguous": "contiguous, as the network has no 2-D convolutions or does not support another layout",
    }[auto.memory_format]
    memory = "; freed memory is kept for the next step" if speed.keeps_memory else ""
    formats = f"{auto.precision} for training steps and {auto.inference_precision} for evaluation and prediction"
    return f"{formats}, as the {auto.device.type} {has}; {layout}{memory}"


def _faster(speed: Speed) -> str | None:
    """What was faster than auto's choice in training in every round, if anything was: auto does not measure."""
    trained = [rate for rate in speed.measured if rate.work == "train"]
    auto = next((rate for rate in trained if rate.is_auto), None)
    best = max(trained, key=lambda rate: rate.median, default=None)
    if auto is None or best is None or min(best.rounds) <= max(auto.rounds):
        return None
    precision, layout = best.option.split(", ")
    return f"faster in training here: Trainer(precision={precision!r}, memory_format={layout!r})"


def _seconds(speed: Speed) -> dict[str, float]:
    """For a thousand photographs: one pass for their features, and one epoch in which everything trains."""
    each = {"features_once": speed.seconds_per_image("forward"), "full_epoch": speed.seconds_per_image("train")}
    return {name: _IMAGES * seconds for name, seconds in each.items() if seconds is not None}


def _estimates(speed: Speed) -> Iterator[str]:
    from flashtask.tasks.speed import PHOTOGRAPH

    found = _seconds(speed)
    if len(found) == 2:
        yield (
            f"{_IMAGES:,} photographs of {PHOTOGRAPH[0]}x{PHOTOGRAPH[1]}, decoding included: about "
            f"{found['features_once']:.0f} s for a frozen backbone (once, whatever the number of epochs), "
            f"about {found['full_epoch']:.0f} s per epoch if everything trains"
        )


def _machine(speed: Speed) -> dict[str, str]:
    import torch

    from flashtask.data.threads import num_cores

    return {
        "device_name": _device_name(speed.auto.device),
        "cores": f"{num_cores()} cores",
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
    }


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _as_json(speed: Speed, facts: Mapping[str, Any]) -> dict[str, Any]:
    auto = speed.auto
    return {
        **facts,
        "input_size": list(speed.task.preprocessing.input_size),
        "device": auto.device.type,
        "auto": {
            "precision": auto.precision,
            "inference_precision": auto.inference_precision,
            "memory_format": auto.memory_format,
            "lanes": speed.num_threads,
            "why": _why(speed),
        },
        "keeps_freed_memory": speed.keeps_memory,
        "rates": [
            {
                "work": rate.work,
                "option": rate.option,
                "is_auto": rate.is_auto,
                "images_per_second": round(rate.median, 2),
                "min": round(min(rate.rounds), 2),
                "max": round(max(rate.rounds), 2),
            }
            for rate in speed.measured
        ],
        "seconds_per_1000_images": {name: round(value, 2) for name, value in _seconds(speed).items()},
        "machine": _machine(speed),
    }
