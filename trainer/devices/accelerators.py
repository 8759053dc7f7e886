"""Accelerators: which kinds of devices there are, and which of them are here."""

from __future__ import annotations

from typing import Any

import torch

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry import Aliases, Registry
from flashtask.trainer.devices.selection import check_devices, device_indices

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "accelerator_of",
    "check_accelerator",
    "check_devices",
    "resolve_accelerator",
    "resolve_device",
]

ACCELERATORS: Registry[Any] = Registry("accelerator")


class Accelerator:
    """A kind of device. Of your own one write at least `device`, and pass an object to the Trainer."""

    #: how messages call it
    name = "custom"

    def is_available(self) -> bool:
        """Whether there is such a device here."""
        return True

    def device_count(self) -> int:
        """How many devices of this kind the machine has."""
        return 1

    def device(self, index: int) -> torch.device:
        """The device of a number, counted from 0."""
        raise UsageError(
            f"{type(self).__name__} has no device", fix='def device(self, index): return torch.device("cuda", index)'
        )

    def computes_bfloat16(self, device: torch.device) -> bool:
        """Whether bfloat16 is fast on a device, so that `precision="auto"` means bf16-mixed there."""
        return False


@ACCELERATORS.register("cpu", description="all cores of the machine, as one device")
class CPUAccelerator(Accelerator):
    """The processor: one device, however many cores it has."""

    name = "cpu"

    def device(self, index: int) -> torch.device:
        """The CPU, whatever the number."""
        return torch.device("cpu")

    def computes_bfloat16(self, device: torch.device) -> bool:
        """Whether the processor has instructions for it."""
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@ACCELERATORS.register("cuda", description="GPUs by NVIDIA, or by AMD with a ROCm build of torch")
class CUDAAccelerator(Accelerator):
    """GPUs that torch reaches by CUDA or ROCm."""

    name = "cuda"

    def is_available(self) -> bool:
        """Whether torch was built for CUDA and sees a GPU."""
        return torch.cuda.is_available()

    def device_count(self) -> int:
        """How many torch sees; `CUDA_VISIBLE_DEVICES` limits them."""
        return torch.cuda.device_count()

    def device(self, index: int) -> torch.device:
        """The GPU with this number, counted from 0."""
        return torch.device("cuda", index)

    def computes_bfloat16(self, device: torch.device) -> bool:
        """Whether the GPU does it itself, without emulation."""
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@ACCELERATORS.register("mps", description="the GPU of an Apple computer")
class MPSAccelerator(Accelerator):
    """The GPU of an Apple computer."""

    name = "mps"

    def is_available(self) -> bool:
        """Whether torch was built for MPS and sees the GPU."""
        return torch.backends.mps.is_available()

    def device(self, index: int) -> torch.device:
        """The only GPU, whatever the number."""
        return torch.device("mps")


ACCELERATORS.add_source(Aliases(ACCELERATORS, {"gpu": "cuda"}))

#: In the order in which `auto` looks for them.
_PREFERENCE = ("cuda", "mps", "cpu")

_NOT_SUPPORTED = {
    "tpu": "there is no TPU support",
    "xla": "there is no TPU support",
    "ipu": "there is no IPU support",
    "hpu": "there is no HPU support",
    "npu": "there is no NPU support",
    "xpu": "there is no XPU support",
}


def check_accelerator(accelerator: Any) -> Accelerator | None:
    """The accelerator that a name or an object means, None for `auto`; whether it is here is not asked.

    Raises:
        UsageError: there is no such accelerator.
    """
    if isinstance(accelerator, Accelerator):
        return accelerator
    if isinstance(accelerator, type) and issubclass(accelerator, Accelerator):
        raise UsageError(
            f"accelerator={accelerator.__name__}: not an object but a class",
            fix=f"accelerator={accelerator.__name__}()",
        )
    name = str(accelerator).lower()
    if name == "auto":
        return None
    if accelerator not in ACCELERATORS and name not in ACCELERATORS:
        raise _unknown(name, accelerator)
    made = ACCELERATORS.get(accelerator if accelerator in ACCELERATORS else name)()
    if not isinstance(made, Accelerator):
        raise UsageError(f"the accelerator {name!r} is registered as {made!r}", fix="class Mine(flashtask.Accelerator)")
    return made


def _unknown(name: str, given: Any) -> UnknownNameError:
    error = UnknownNameError("accelerator", str(given), ["auto", *ACCELERATORS.names(), "gpu"])
    if name in _NOT_SUPPORTED:
        error.why = _NOT_SUPPORTED[name]
        error.fix = 'accelerator="auto" takes what is here: CUDA, then MPS, then the CPU'
    return error


def resolve_accelerator(accelerator: Any = "auto") -> Accelerator:
    """The accelerator for the argument, if this machine has it; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        UsageError: there is no such accelerator, here or at all.
    """
    found = check_accelerator(accelerator)
    if found is None:
        known: list[Accelerator] = [ACCELERATORS.get(name)() for name in _PREFERENCE if name in ACCELERATORS]
        return next(one for one in known if one.is_available())
    if not found.is_available():
        kind = found.name.upper() if found.name in _PREFERENCE else found.name
        given = repr(accelerator) if isinstance(accelerator, str) else f"{type(found).__name__}()"
        raise UsageError(f"accelerator={given}: there is no {kind} device here", fix='accelerator="cpu"')
    return found


def accelerator_of(device: torch.device) -> Accelerator:
    """The registered accelerator of a device; the plain base for a device that none is registered for."""
    made = ACCELERATORS.get(device.type)() if device.type in ACCELERATORS else Accelerator()
    assert isinstance(made, Accelerator)
    return made


def resolve_device(accelerator: Any = "auto", devices: Any = "auto") -> torch.device:
    """The first device for the arguments.

    Raises:
        UsageError: there is no such accelerator or device, here or at all.
    """
    found = resolve_accelerator(accelerator)
    return found.device(device_indices(devices, found)[0])
