"""Which device a run uses: `auto`, `cpu`, `gpu` (CUDA), `mps`."""

from __future__ import annotations

from typing import Any

import torch

from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["resolve_device"]

_KINDS = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}
_ELSEWHERE = {
    "tpu": "there is no TPU support",
    "ipu": "there is no IPU support",
    "hpu": "there is no HPU support",
}


def resolve_device(accelerator: Any = "auto", devices: Any = "auto") -> torch.device:
    """The device of this process.

    Args:
        accelerator: `auto` (CUDA, then MPS, then CPU), `cpu`, `gpu`, `cuda` or `mps`.
        devices: how many (only 1 so far), a list with one device number, or `auto`.

    Raises:
        UsageError: there is no such accelerator, here or at all.
    """
    name = str(accelerator).lower()
    if name not in _KINDS:
        raise UsageError(
            f"no accelerator named {accelerator!r}",
            why=_ELSEWHERE.get(name, ""),
            fix=did_you_mean(name, _KINDS) or f"choose one of {', '.join(_KINDS)}",
        )
    index = _single(devices)
    kind = _KINDS[name]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"accelerator={accelerator!r}: there is no CUDA device here", fix='accelerator="cpu"')
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"accelerator={accelerator!r}: there is no MPS device here", fix='accelerator="cpu"')
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def _single(devices: Any) -> int:
    if devices in ("auto", 1, "1", -1, "-1", None):
        return 0
    if isinstance(devices, (list, tuple)) and len(devices) == 1 and isinstance(devices[0], int):
        return devices[0]
    raise UsageError(f"devices={devices!r}: only one device is supported so far", fix="devices=1")
