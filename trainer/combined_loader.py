"""`CombinedLoader`: several loaders as one, whose batches have the structure in which the loaders were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.data_loaders import begin_at, length_of, order_of

__all__ = ["CombinedLoader", "combined", "holds_loaders", "is_batch_list"]

_MODES = ("min_size", "max_size", "max_size_cycle", "sequential")


class CombinedLoader:
    """Several loaders as one: each batch is a dictionary, list or tuple (nested as given) with a batch of each loader.

    Args:
        iterables: a dictionary, list or tuple of loaders, or of such structures.
        mode: `min_size` ends with the shortest loader, `max_size` with the longest (a loader that has ended gives
            None), `max_size_cycle` with the longest too (a loader that has ended starts again); `sequential` gives the
            batches of one loader after those of another, each as its loader gives it.

    Raises:
        UnknownNameError: another mode.
        UsageError: there is no loader.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _MODES:
            raise UnknownNameError("mode of a CombinedLoader", str(mode), _MODES)
        self.iterables, self.mode = iterables, mode
        #: the loaders in their order, whatever the structure
        self.flattened: list[Any] = list(_leaves(iterables))
        if not self.flattened:
            raise UsageError("a CombinedLoader needs a loader", fix='CombinedLoader({"a": loader_a, "b": loader_b})')
        self._epoch, self._batch, self._frozen = 0, 0, False

    def with_loaders(self, replace: Callable[[int, Any], Any]) -> CombinedLoader:
        """The same with other loaders.

        Args:
            replace: from the number of a loader and the loader to the one in its place.
        """
        made = iter([replace(number, loader) for number, loader in enumerate(self.flattened)])
        return CombinedLoader(_filled(self.iterables, made), self.mode)

    def begin_at(self, epoch: int, batch: int, frozen: bool) -> bool:
        """Where the next iterator begins: epoch, number of the batch, whether the backbone is frozen in it.

        Returns:
            Whether it can begin there; else it begins with the first batch of the epoch.
        """
        exact = all(begin_at(loader, epoch, frozen=frozen, batch=min(batch, 1)) for loader in self.flattened)
        self._epoch, self._batch, self._frozen = epoch, batch if exact else 0, frozen
        return exact

    def share(self, batch: int) -> tuple[int, int] | None:
        """Samples of all loaders in a batch of several processes: those of this process, and of all of them.

        Args:
            batch: its number in the epoch.

        Returns:
            None where a loader's samples are not shared by the engine.
        """
        found = []
        for loader in self.flattened:
            order = order_of(loader)
            if order is None or order.world_size == 1:
                return None
            length = len(order)
            if batch < length or (self.mode == "max_size_cycle" and length):
                found.append(order.share(batch % length * order.batch_size))
            if self.mode == "sequential":
                if found:
                    break
                batch -= length
        return sum(own for own, _ in found), sum(whole for _, whole in found)

    def __len__(self) -> int:
        lengths = [length_of(loader) for loader in self.flattened]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            raise TypeError("the length of one of the loaders is not known")
        if self.mode == "sequential":
            return sum(known)
        return min(known) if self.mode == "min_size" else max(known)

    def __iter__(self) -> Iterator[Any]:
        if self.mode == "sequential":
            return self._one_by_one()
        return self._together()

    def _one_by_one(self) -> Iterator[Any]:
        skipped = self._batch
        for loader in self.flattened:
            length = length_of(loader) or 0  # only where all lengths are known is anything skipped
            if skipped < length or not skipped:
                yield from self._pass(loader, 0, skipped)
            skipped = max(0, skipped - length)

    def _together(self) -> Iterator[Any]:
        rounds = length_of(self)
        sources = [self._batches(loader) for loader in self.flattened]
        number = self._batch
        while rounds is None or number < rounds:
            found = [next(source) for source in sources]
            ended = [has_ended for _, has_ended in found]
            if any(ended) if self.mode == "min_size" else all(ended):
                return
            yield _filled(self.iterables, (batch for batch, _ in found))
            number += 1

    def _batches(self, loader: Any) -> Iterator[tuple[Any, bool]]:
        """The batches of a loader without an end, and whether the loader has been gone through before each."""
        length = length_of(loader) if self._batch else None
        again, start = divmod(self._batch, length) if length else (0, self._batch)
        cycles = self.mode == "max_size_cycle"
        while cycles or not again:
            batch = None
            for batch in self._pass(loader, again, start):
                yield batch, again > 0
            if batch is None and not start:
                break  # it gives nothing at all
            again, start = again + 1, 0
        while True:
            yield None, True

    def _pass(self, loader: Any, again: int, start: int) -> Iterator[Any]:
        """One pass over a loader from a batch on; when it is repeated in an epoch, its order is another one."""
        epoch = self._epoch if order_of(loader) is None else self._epoch + again * _APART
        begin_at(loader, epoch, batch=start, frozen=self._frozen)
        return iter(loader)


#: What the number of an epoch grows by for the order of a loader that is gone through again in the same epoch.
_APART = 1 << 20


def combined(given: Any) -> Any:
    """A structure of loaders as one loader, which ends with the longest of them; a single loader as it is."""
    return CombinedLoader(given, "max_size_cycle") if holds_loaders(given) else given


def holds_loaders(given: Any) -> bool:
    """Whether it is a dictionary, list or tuple of loaders; a list of batches is not, but one loader."""
    if isinstance(given, Mapping):
        values = given.values()
        return bool(given) and all(_is_loader(one) or is_batch_list(one) or holds_loaders(one) for one in values)
    return isinstance(given, (list, tuple)) and bool(given) and not is_batch_list(given)


def is_batch_list(given: Any) -> bool:
    """A list of tensors, or of tuples, dictionaries or lists of them, is a list of batches, so one loader."""
    first = given[0] if isinstance(given, (list, tuple)) and given else None
    if isinstance(first, (tuple, Mapping)):
        parts = first.values() if isinstance(first, Mapping) else first
        return not any(isinstance(part, (DataLoader, CombinedLoader)) for part in parts)
    inner = first[0] if isinstance(first, list) and first else None
    return isinstance(first, torch.Tensor) or isinstance(inner, torch.Tensor)


def _is_loader(value: Any) -> bool:
    """Whether it gives batches, and is neither a part of a batch nor a structure of loaders."""
    if hasattr(value, "__array__") or isinstance(value, (str, bytes, Mapping, list, tuple)):
        return False
    return hasattr(value, "__iter__")


def _leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        for one in given.values():
            yield from _leaves(one)
    elif isinstance(given, (list, tuple)) and not is_batch_list(given):
        for one in given:
            yield from _leaves(one)
    else:
        yield given


def _filled(structure: Any, values: Iterator[Any]) -> Any:
    """The structure with the next of the values in the place of each loader."""
    if isinstance(structure, Mapping):
        return {key: _filled(one, values) for key, one in structure.items()}
    if isinstance(structure, (list, tuple)) and not is_batch_list(structure):
        parts = [_filled(one, values) for one in structure]
        return parts if isinstance(structure, list) else tuple(parts)
    return next(values)
