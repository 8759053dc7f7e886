"""How much a client may ask for, and how much all of them together."""

from __future__ import annotations

from dataclasses import dataclass

from flashtask.core.errors import UsageError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of a server; a request beyond one is refused with the HTTP status in brackets.

    Args:
        max_bytes: of a request's body (413).
        max_images: in a request (413).
        max_pixels: width times height of an image, before it is decoded (413).
        max_waiting: images that are being received, decoded or computed, of all requests together (429).
        max_bytes_held: bytes of all bodies that are being received or worked on (429).
        timeout: seconds from the first byte of a request to its answer (408 while the body is slow, then 503).

    Raises:
        UsageError: a limit that is not positive.
    """

    max_bytes: int = 32 * 2**20
    max_images: int = 64
    max_pixels: int = 64_000_000
    max_waiting: int = 256
    max_bytes_held: int = 256 * 2**20
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"the limit {name} is {value!r}", why="it has to be above 0")
