"""`SampleTable`: the samples of a data set, one row each, in columns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

__all__ = ["PARTS", "SampleTable", "WeightedTargets", "as_text"]

#: The parts of a data set; column `parts` holds positions in it.
PARTS = ("train", "val", "test", "predict")

#: A column, or several beside each other: (N,) or (N, K).
Column = np.ndarray[Any, Any]


def as_text(values: Iterable[Any]) -> Column:
    """A column of text; each value takes the memory of its own length, 16 bytes at least."""
    texts = list(values)
    try:
        return np.array(texts, dtype=np.dtypes.StringDType())
    except (
        TypeError,
        UnicodeEncodeError,
    ):  # names of files that are not UTF-8; then each takes the memory of the longest
        return np.array(texts, dtype=np.str_)


class WeightedTargets(NamedTuple):
    """The targets of a training batch whose samples have weights.

    Args:
        values: the targets, as a batch has them without weights.
        weights: (B,) float32, 0 or more, 1 on average over the training samples.
    """

    values: Any
    weights: Any


@dataclass(frozen=True)
class SampleTable:
    """Samples in a stable order, in NumPy columns, so that processes share them and millions of rows fit in memory.

    Every data constructor makes one. Splitting, checking and batching need no more than this table, whatever the task.

    Args:
        inputs: (N,) text: absolute paths, addresses, or names of pictures in memory (see `ImageSource`).
        parts: (N,) uint8, the position of each sample's part in `PARTS`.
        targets: (N,) or (N, K), as the source has them: text, or numbers. A target reader makes model targets of them.
            None where no sample has any.
        groups: (N,) text, None if there are none. The samples of a group are never split between training and
            validation.
        roots: for each part the folder that its inputs are named relative to.
        weights: (N,) float32, how much each sample counts in training; None if all count alike.
    """

    inputs: Column
    parts: Column
    targets: Column | None = None
    groups: Column | None = None
    roots: Mapping[str, str] = field(default_factory=dict)
    weights: Column | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    def of_part(
        cls,
        part: str,
        inputs: Iterable[Any],
        targets: Column | None = None,
        *,
        groups: Column | None = None,
        root: str | os.PathLike[str] = "",
        weights: Column | None = None,
    ) -> SampleTable:
        """Samples that all belong to one part."""
        paths = as_text(inputs)
        parts = np.full(len(paths), PARTS.index(part), dtype=np.uint8)
        return cls(paths, parts, targets, groups, {part: os.fspath(root)}, weights)

    @classmethod
    def joined(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """The rows of several tables, one after the other; missing targets are empty, missing weights 1."""
        if len(tables) == 1:
            return tables[0]
        roots = {part: root for table in tables for part, root in table.roots.items()}
        inputs, parts = (
            as_text(chain.from_iterable(t.inputs for t in tables)),
            np.concatenate([t.parts for t in tables]),
        )
        targets, groups = (_stacked([getattr(t, name) for t in tables], tables) for name in ("targets", "groups"))
        weights = _stacked([table.weights for table in tables], tables, 1)
        return cls(inputs, parts, targets, groups, roots, weights)

    def has(self, part: str) -> bool:
        """Whether any sample belongs to a part."""
        return bool((self.parts == PARTS.index(part)).any())

    def of(self, part: str) -> SampleTable:
        """The samples of a part."""
        return self.at(np.flatnonzero(self.parts == PARTS.index(part)))

    def at(self, rows: Any) -> SampleTable:
        """The samples at these positions, or where a mask of all rows is true."""
        rows = np.asarray(rows, dtype=None if len(rows) else np.intp)
        columns = (self.targets, self.groups, self.weights)
        targets, groups, weights = (None if column is None else column[rows] for column in columns)
        inputs, parts = self.inputs[rows], self.parts[rows]
        return replace(self, inputs=inputs, parts=parts, targets=targets, groups=groups, weights=weights)

    def with_part(self, rows: Any, part: str) -> SampleTable:
        """The same samples, with those at `rows` moved to a part; their names stay relative to the root they had."""
        parts = self.parts.copy()
        before = PARTS[int(parts[rows[0]])] if len(rows) else part
        parts[rows] = PARTS.index(part)
        return replace(self, parts=parts, roots={**self.roots, part: self.roots.get(before, "")})

    def names(self) -> list[str]:
        """The paths relative to the root of their part, with forward slashes; other inputs as they are."""
        roots = [self.roots.get(part, "") for part in PARTS]
        prefixes = [os.path.join(os.path.abspath(root), "") for root in roots]
        return [
            _below(path, prefixes[part]) if os.path.isabs(path) else path
            for path, part in zip(self.inputs.tolist(), self.parts.tolist(), strict=True)
        ]


#: Parts of a path that `relpath` would take out.
_NOT_NORMAL = re.compile(r"/\.{0,2}(/|$)" if os.sep == "/" else "")


def _below(path: str, prefix: str) -> str:
    """A path relative to a folder that ends in a separator; quickly where it is below it, as nearly all are."""
    if path.startswith(prefix) and not _NOT_NORMAL.search(path):
        return path[len(prefix) :]
    return os.path.relpath(path, prefix).replace(os.sep, "/")


def _stacked(columns: Sequence[Column | None], tables: Sequence[SampleTable], missing: Any = "") -> Column | None:
    """One column after the other; where one is missing its rows are `missing`."""
    known = next((column for column in columns if column is not None), None)
    if known is None:
        return None
    return np.concatenate(
        [
            np.full((len(table), *known.shape[1:]), missing, dtype=known.dtype) if column is None else column
            for column, table in zip(columns, tables, strict=True)
        ]
    )
