"""What was decoded, kept in memory while there is room: an epoch after the first reads no file again."""

from __future__ import annotations

import threading
from typing import Any

import torch.utils.data

from flashtask.core.machine import processes_here
from flashtask.core.memory import memory_limits
from flashtask.data.decoding import FirstSteps, Pixels, Seen
from flashtask.data.image_source import FILES, ImageSource

__all__ = ["DecodedCache", "fitting_cache_bytes"]

#: The most that decoded pictures may take, as a share of the memory that is free when the cache is made.
_SHARE = 0.2
#: Where the system does not say how much memory is free.
_UNKNOWN = 256 * 2**20


def fitting_cache_bytes() -> int:
    """A share of the memory that this process may still use, by the machine, its control groups and its limits."""
    try:
        return int(_SHARE * min(limit.free for limit in memory_limits()))
    except OSError:
        return _UNKNOWN


class DecodedCache:
    """Decoded pictures by what was done to them, their path or name, and the state of the file.

    Nothing is ever thrown out: what does not fit is decoded each time. Worker processes see what was there when they
    were forked and add nothing; a copy that is sent to another process is empty.

    Args:
        limit: bytes of pixels; by default `fitting_cache_bytes()`. 0 keeps nothing.
            Several processes of a run share it.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = fitting_cache_bytes() if limit is None else limit
        self.num_bytes = 0
        self._kept: dict[tuple[Any, ...], Pixels] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, first: FirstSteps, path: str, images: ImageSource = FILES, seen: Seen | None = None) -> Pixels:
        """What the first steps make of an image; the pixels are the same whether they were kept or not.

        Args:
            first: the steps.
            path: of a file, or the name that the source has for the image.
            images: where the image is read.
            seen: as in `Fitting.read`; not called for a picture that was kept.

        Raises:
            BadDataError, MissingInputError: as `load_image`.
        """
        state = images.state(path)
        if state is None:
            return images.input(path).read(first, seen=seen)
        key = (first, path, state)
        pixels = self._kept.get(key)
        if pixels is None:
            pixels = images.input(path).read(first, seen=seen)
            self._keep(key, pixels)
        return pixels

    def _keep(self, key: tuple[Any, ...], pixels: Pixels) -> None:
        if torch.utils.data.get_worker_info() is not None:
            return
        with self._lock:
            if key not in self._kept and self.num_bytes + pixels.nbytes <= self.limit // processes_here():
                self._kept[key] = pixels
                self.num_bytes += pixels.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedCache, (self.limit,)
