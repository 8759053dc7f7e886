"""Number formats: in which context the forward pass runs, and how gradients are scaled and applied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["HalfPrecision", "MixedPrecision", "Precision", "resolve_precision"]

_NAMES = {
    "32": "32",
    "32-true": "32",
    "full": "32",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "auto": "auto",
}


class Precision:
    """Float32 everywhere. Subclasses change the context of the forward pass, the backward pass or the step."""

    name = "32"
    #: whether a step whose gradients overflow is left out, and is no divergence
    skips_overflow = False

    def forward(self) -> AbstractContextManager[Any]:
        """The context that the forward pass and the loss run in."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring gradients to their true size, before they are clipped or looked at."""

    def step(self, optimizer: Optimizer) -> None:
        """Let the optimizer step."""
        optimizer.step()

    def update(self) -> None:
        """All optimizers have stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class MixedPrecision(Precision):
    """bfloat16 where autocast allows it, float32 weights and gradients."""

    name = "bf16-mixed"
    dtype = torch.bfloat16

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def forward(self) -> AbstractContextManager[Any]:
        """Autocast for the device."""
        return torch.autocast(self.device.type, dtype=self.dtype)


class HalfPrecision(MixedPrecision):
    """float16 where autocast allows it, with a gradient scaler: a step whose gradients overflow is skipped."""

    name = "16-mixed"
    dtype = torch.float16
    skips_overflow = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.scaler = torch.amp.GradScaler(device.type)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute scaled gradients."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Step unless a gradient overflowed."""
        self.scaler.step(optimizer)

    def update(self) -> None:
        """Adapt the scale."""
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale and its history."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the scale and its history."""
        self.scaler.load_state_dict(state)


def resolve_precision(precision: Any, device: torch.device) -> Precision:
    """The object behind a name (`32`, `bf16-mixed`, `16-mixed`, `auto`; 16 and `bf16` are read as mixed).

    `auto` is bf16-mixed where the device computes bfloat16 natively, else 32.

    Raises:
        UsageError: no precision has this name.
    """
    if isinstance(precision, Precision):
        return precision
    name = _NAMES.get(str(precision))
    if name is None:
        choices = sorted(set(_NAMES.values()))
        raise UsageError(
            f"no precision named {precision!r}",
            fix=f"{did_you_mean(str(precision), _NAMES)} choose one of {', '.join(choices)}".strip(),
        )
    if name == "auto":
        name = "bf16-mixed" if _computes_bfloat16(device) else "32"
    if name == "bf16-mixed":
        return MixedPrecision(device)
    return HalfPrecision(device) if name == "16-mixed" else Precision()


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
