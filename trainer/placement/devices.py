"""Which devices a run takes: what `devices` and the `gpus` of 1.x mean, and whether they are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError

if TYPE_CHECKING:
    from flashtask.trainer.placement.accelerators import Accelerator

__all__ = ["check_devices", "device_indices", "devices_of_gpus", "unoccupied"]


def check_devices(devices: Any, most: int | None = 1) -> int | tuple[int, ...] | None:
    """What `devices` means: None for `auto`, -1 for all, how many, or their numbers. No device is asked for.

    Args:
        devices: `auto`, 2, `"2"`, -1, `"-1"`, `"all"`, [0, 2], `"0,2"`.
        most: devices that can be used at the most; None for no limit.

    Raises:
        UsageError: more than that, none at all, or nothing that can be meant.
    """
    read = _read_text(devices) if isinstance(devices, str) else devices
    if isinstance(read, (list, tuple)) and read and all(map(_is_index, read)) and len(set(read)) == len(read):
        _limit(devices, len(read), most)
        return tuple(read)
    if read is None and isinstance(devices, str):
        return None
    if is_whole(read, -1) and read != 0:
        _limit(devices, read, most)
        return read
    needed = "at least one" if read == 0 else 'a number of devices, their own numbers, "auto", or -1 for all,'
    raise UsageError(
        f"devices={devices!r}: {needed} is needed",
        fix='devices=1, or devices=[0] for a certain one; accelerator="cpu" to train without a GPU',
    )


def _read_text(text: str) -> Any:
    """What a string means: None for `auto`, a whole number, a list of them, or the string itself."""
    words = text.strip().lower()
    if words in ("auto", "all"):
        return None if words == "auto" else -1
    try:
        numbers = [int(part) for part in words.split(",") if part.strip()]
    except ValueError:
        return text
    return numbers if "," in words else numbers[0] if numbers else text


def _is_index(value: Any) -> bool:
    return is_whole(value, 0)


def _limit(devices: Any, count: int, most: int | None) -> None:
    if most is not None and count > most:
        raise UsageError(
            f"devices={devices!r}: this strategy uses {'one device' if most == 1 else f'{most} devices'} at the most",
            fix='strategy="ddp" for a process on each, devices=1, or devices=[0] for a certain one',
        )


def device_indices(devices: Any, accelerator: Accelerator, most: int | None = 1) -> list[int]:
    """The numbers of the devices that a run takes.

    Args:
        devices: as `check_devices` reads it; `auto` is the first one.
        accelerator: which is here.
        most: devices that can be used at the most; None for no limit.

    Raises:
        UsageError: one that is not here, or more than can be used.
    """
    wanted, count = check_devices(devices, most), accelerator.device_count()
    if wanted is None:
        return [0]
    if wanted == -1:
        _limit(devices, count, most)
        return list(range(count))
    indices = list(wanted) if isinstance(wanted, tuple) else list(range(wanted))
    if accelerator.name == "cpu" and most is None:
        return indices  # processes that share the cores
    if max(indices) >= count:
        cores = "; all cores are one device: torch.set_num_threads(n)" if accelerator.name == "cpu" else ""
        raise UsageError(
            f"devices={devices!r}: {accelerator.name} devices here are numbered 0 to {count - 1}",
            fix=f"devices=1{cores}",
        )
    return indices


def devices_of_gpus(gpus: Any, auto_select: bool = False) -> tuple[str, Any, str]:
    """What `gpus` of 1.x means: the accelerator's name, `devices`, and what the user has to be told, or an empty text.

    Args:
        gpus: None, 0 or an empty list for the CPU, -1 for all (the CPU where there is none, which is told), how many,
            or their numbers, also as text.
        auto_select: for a number of them, take those that nobody uses.

    Raises:
        UsageError: CUDA devices that are not here, or nothing that can be meant.
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
    import torch

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
    """Free and total bytes of a CUDA device; one that lets nobody else in has nothing free."""
    import torch

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
