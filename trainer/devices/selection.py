"""Which devices a run takes: what `devices` means, and whether they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole

if TYPE_CHECKING:
    from flashtask.trainer.devices.accelerators import Accelerator

__all__ = ["check_devices", "device_indices"]

#: On a CPU each device is a process, however few cores there are.
_MOST = 512


def check_devices(devices: Any, most: int | None = 1) -> int | tuple[int, ...] | None:
    """What `devices` means: None for `auto`, -1 for all, how many, or their numbers. No device is asked for.

    Args:
        devices: `auto`, 2, `"2"`, -1, `"-1"`, `"all"`, [0, 2], `"0,2"`.
        most: devices that can be used at the most; None for no limit.

    Raises:
        UsageError: more than that, none at all, or an invalid value.
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
    if count > _MOST:
        raise UsageError(
            f"devices={devices!r}: a machine runs {_MOST} processes of one run at the most",
            fix="devices=2 for two processes, or devices=[0] for a certain device",
        )
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
