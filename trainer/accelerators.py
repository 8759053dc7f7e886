"""Which device a run uses: `auto`, `cpu`, `gpu` (CUDA), `mps`."""

from __future__ import annotations

from typing import Any

import torch

from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["check_accelerator", "check_devices", "resolve_device"]

_KINDS = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}
_ELSEWHERE = {
    "tpu": "there is no TPU support",
    "ipu": "there is no IPU support",
    "hpu": "there is no HPU support",
}


def check_accelerator(accelerator: Any) -> str:
    """The kind of device that a name means: `auto`, `cpu`, `cuda` or `mps`; whether it is here is not asked.

    Raises:
        UsageError: there is no such accelerator.
    """
    name = str(accelerator).lower()
    if name not in _KINDS:
        raise UsageError(
            f"no accelerator named {accelerator!r}",
            why=_ELSEWHERE.get(name, ""),
            fix=did_you_mean(name, _KINDS) or f"choose one of {', '.join(_KINDS)}",
        )
    return _KINDS[name]


def check_devices(devices: Any) -> int | None:
    """The number of the device that is meant, None for the first; whether it is here is not asked.

    Raises:
        UsageError: more than one device, or nothing that can be meant.
    """
    if not isinstance(devices, (bool, list, tuple)) and devices in ("auto", 1, "1", -1, "-1"):
        return None
    if isinstance(devices, (list, tuple)) and len(devices) == 1 and _is_index(devices[0]):
        return int(devices[0])
    raise UsageError(
        f"devices={devices!r}: only one device is supported so far", fix="devices=1, or devices=[0] for a certain one"
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def resolve_device(accelerator: Any = "auto", devices: Any = "auto") -> torch.device:
    """The device of this process.

    Args:
        accelerator: `auto` (CUDA, then MPS, then CPU), `cpu`, `gpu`, `cuda` or `mps`.
        devices: how many (only 1 so far), a list with one device number, or `auto`.

    Raises:
        UsageError: there is no such accelerator or device, here or at all.
    """
    kind, index = check_accelerator(accelerator), check_devices(devices)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"accelerator={accelerator!r}: there is no CUDA device here", fix='accelerator="cpu"')
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"accelerator={accelerator!r}: there is no MPS device here", fix='accelerator="cpu"')
    there_are = torch.cuda.device_count() if kind == "cuda" else 1
    if index is not None and index >= there_are:
        raise UsageError(f"devices={devices!r}: {kind} devices here are numbered 0 to {there_are - 1}", fix="devices=1")
    return torch.device(kind, index or 0) if kind == "cuda" else torch.device(kind)
