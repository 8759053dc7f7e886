"""Which batch size follows from what was measured or tried: plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashtask.core.errors import UsageError
from flashtask.core.memory import MemoryLimit
from flashtask.core.number_checks import is_whole

__all__ = ["BatchSizeOptions", "BatchSizeSearch", "MemoryPoint", "expected_memory", "largest_fitting", "largest_within"]

#: What a prediction may be short of: at large batches other algorithms may need more.
_MARGIN = 1.1


@dataclass(frozen=True)
class BatchSizeOptions:
    """How batch sizes are searched.

    Args:
        mode: `power`: a power of two; `binsearch`: any number.
        max_batch_size: no larger one is looked for.
        attribute: where the module or the data module keeps its batch size.

    Raises:
        UsageError: an invalid value.
    """

    mode: str = "power"
    max_batch_size: int = 256
    attribute: str = "batch_size"

    def __post_init__(self) -> None:
        most = self.max_batch_size
        checks = {
            "mode": (self.mode in ("power", "binsearch"), '"power" or "binsearch"'),
            "max_batch_size": (
                is_whole(most),
                "a whole number of at least 1",
            ),
            "attribute": (isinstance(self.attribute, str), "the name of an attribute"),
        }
        for name, (fits, needed) in checks.items():
            if not fits:
                raise UsageError(f"batch_size: {name}={getattr(self, name)!r}: {needed} is needed")


@dataclass(frozen=True)
class MemoryPoint:
    """What steps of training at one batch size needed at their peak, in bytes beside what was in use before."""

    batch_size: int
    memory: int


@dataclass(frozen=True)
class BatchSizeSearch:
    """A batch size, and why it is that.

    Args:
        batch_size: what was found.
        bound: what kept it from being larger: `memory`, `data` (there are no more samples) or `max_batch_size`.
        points: what was measured; on accelerators other than CUDA the memory is not, and is 0.
        memory: the tightest limit of memory, and what it left free at the start; 0 where that is not known.
        samples: in the training data, None if it does not know.
    """

    batch_size: int
    bound: str
    points: tuple[MemoryPoint, ...]
    memory: MemoryLimit
    samples: int | None = None

    def __str__(self) -> str:
        why = {
            "memory": "more would not fit into memory",
            "data": f"there are {self.samples} training samples",
            "max_batch_size": "the largest that is looked for",
        }
        return f"batch size {self.batch_size}: {why[self.bound]}"

    def expected_memory(self, batch_size: int) -> int:
        """Bytes that a batch size is expected to need, beside what was in use before."""
        return expected_memory(self.points, batch_size)


def expected_memory(points: Sequence[MemoryPoint], batch_size: int) -> int:
    """What a batch size needs by the line through the largest size that was measured, and a margin of a tenth.

    Of the lines from there to the other points it is the steepest. Through one point alone it goes to zero, as if
    everything grew with the batch.

    Args:
        points: by growing batch size.
        batch_size: larger than those measured, or one of them.
    """
    last = points[-1]
    slopes = [(last.memory - p.memory) / (last.batch_size - p.batch_size) for p in points[:-1]]
    slope = max(slopes, default=last.memory / last.batch_size)
    return math.ceil(_MARGIN * (last.memory + max(0.0, slope) * (batch_size - last.batch_size)))


def largest_within(budget: float, points: Sequence[MemoryPoint], limit: int) -> int:
    """The largest batch size up to a limit that is expected to need no more than a budget of bytes; 0 if none is."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if expected_memory(points, middle) <= budget else (low, middle)
    return low


def largest_fitting(fits: Callable[[int], bool], limit: int, mode: str) -> int:
    """The largest batch size up to a limit that fits, found by trying; 0 if none does.

    Sizes are doubled from 2 on until one does not fit; `binsearch` then halves the gap to the largest that did.
    """
    best, size = 0, min(2, limit)
    while size <= limit and fits(size):
        best, size = size, 2 * size
    failing = min(size, limit + 1)
    while mode == "binsearch" and failing - best > 1:
        middle = (best + failing) // 2
        best, failing = (middle, failing) if fits(middle) else (best, middle)
    return best
