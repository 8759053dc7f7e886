"""Which of the images each of several processes predicts, and their results in the order of the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Self

import numpy as np

__all__ = ["Share", "part_of"]


def part_of(count: int, shard: str | None) -> slice:
    """The images of one of several jobs: a slice of all, as long as the others or one longer.

    Args:
        count: of all images.
        shard: `K/N`, from 1; None for one job.
    """
    number, jobs = map(int, (shard or "1/1").split("/"))
    return slice(count * (number - 1) // jobs, count * number // jobs)


@dataclass(frozen=True)
class Share:
    """The images of all processes in chunks, which these take in turn.

    Args:
        strategy: that joins the processes; None for one alone, whose share is everything.
        count: of all images.
        size: of a chunk.
    """

    strategy: Any
    count: int
    size: int

    @classmethod
    def of(cls, strategy: Any, count: int, size: int) -> Self:
        """Cut into chunks of a size, or smaller ones where some processes would have none.

        Args:
            strategy: see above.
            count: of all images.
            size: of a chunk at the most.
        """
        processes = 1 if strategy is None else strategy.world_size
        return cls(strategy, count, max(1, min(size, -(-count // processes))))

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.strategy is None or bool(self.strategy.is_global_zero)

    @property
    def own(self) -> Any:
        """The positions of the images of this process, by which a sequence is indexed."""
        if self.strategy is None:
            return slice(None)
        positions = np.arange(self.count)
        return positions[positions // self.size % self.strategy.world_size == self.strategy.global_rank]

    def collected(self, images: list[Any], names: Iterable[str]) -> list[Any]:
        """What every process has found of its images, in the order of these; each thing has a `path`.

        Args:
            images: what this process has found.
            names: of all images.
        """
        if self.strategy is None:
            return images
        every = [*chain.from_iterable(self.strategy.gather(images))]
        place = {str(name): number for number, name in enumerate(names)} if every else {}
        return sorted(every, key=lambda image: place[image.path])

    def in_order(self, results: Iterator[Any]) -> Iterator[Any]:
        """The results of all processes, in the order of the images, as they are known.

        Args:
            results: of this process, one for each of its own images.
        """
        if self.strategy is None:
            yield from results
            return
        for _ in range(-(-self.count // (self.size * self.strategy.world_size))):
            yield from chain.from_iterable(self.strategy.gather([*islice(results, self.size)]))
