"""Which of the images each of several processes predicts, and their results in the order of the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Self

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """The images of all processes in chunks, which these take in turn.

    Args:
        strategy: that joins the processes; None for one alone, whose share is everything.
        chunks: all of them, in order.
    """

    strategy: Any
    chunks: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, strategy: Any, paths: Sequence[str], size: int) -> Self:
        """Cut into chunks of a size, or smaller ones where some would have none.

        Args:
            strategy: see above.
            paths: of all images, in order.
            size: of a chunk at the most.
        """
        if strategy is None:
            return cls(None, (tuple(paths),))
        size = max(1, min(size, -(-len(paths) // strategy.world_size)))
        return cls(strategy, tuple(tuple(paths[start : start + size]) for start in range(0, len(paths), size)))

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.strategy is None or bool(self.strategy.is_global_zero)

    @property
    def paths(self) -> list[str]:
        """The images of all processes."""
        return [*chain.from_iterable(self.chunks)]

    @property
    def own(self) -> list[str]:
        """The images of this one."""
        return [*chain.from_iterable(self._own)]

    @property
    def _own(self) -> Sequence[tuple[str, ...]]:
        if self.strategy is None:
            return self.chunks
        return self.chunks[self.strategy.global_rank :: self.strategy.world_size]

    def without(self, paths: set[str]) -> Self:
        """The same shares with some of the images left out."""
        kept = tuple(tuple(path for path in chunk if path not in paths) for chunk in self.chunks)
        return replace(self, chunks=kept)

    def collected(self, images: list[Any]) -> list[Any]:
        """What every process has found of its images, in the order of these; each thing has a `path`."""
        if self.strategy is None:
            return images
        place = {path: number for number, path in enumerate(self.paths)}
        return sorted(chain.from_iterable(self.strategy.gather(images)), key=lambda image: place[image.path])

    def in_order(self, results: Iterator[Any]) -> Iterator[Any]:
        """The results of all processes, in the order of the images, as they are known.

        Args:
            results: of this process, one for each of its own images.
        """
        if self.strategy is None:
            yield from results
            return
        own = self._own
        for turn in range(-(-len(self.chunks) // self.strategy.world_size)):
            length = len(own[turn]) if turn < len(own) else 0
            yield from chain.from_iterable(self.strategy.gather([*islice(results, length)]))
