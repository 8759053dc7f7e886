"""`OtherColumns`: what the tables of the data say of samples beside images and targets, read when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashtask.data.table_rows import rows_of_table
from flashtask.data.tables import Table, as_cell

__all__ = ["OtherColumns"]

#: Cells that are looked at to see whether a column holds texts and numbers.
_LOOKED_AT = 20


@dataclass(frozen=True)
class OtherColumns:
    """The columns of tables that are neither the image nor a target.

    Args:
        tables: that the data was made of.
        inputs: the column of the images.
        used: columns that are left out: targets, parts, weights.
        own: how paths in the tables are resolved, as for `rows_of_table`.
    """

    tables: Sequence[Table]
    inputs: str
    used: frozenset[str]
    own: Mapping[str, Any] = field(default_factory=dict)

    def of(self, samples: Sequence[str]) -> list[dict[str, Any]]:
        """By column, what the tables say of each sample: a number where a whole column is numbers, else text.

        A sample with several rows, as an image with several boxes, has a value where all its rows agree.

        Args:
            samples: as in the table of samples.

        Raises:
            MissingInputError, BadDataError: a table is not there any more, or has changed.
        """
        found: dict[str, dict[str, str | None]] = {name: {} for name in samples}
        for table in self.tables:
            self._read(table, found)
        columns = dict.fromkeys(name for own in found.values() for name in own)
        made: list[dict[str, Any]] = [{} for _ in samples]
        for column in columns:
            texts = [found[name].get(column) for name in samples]
            known = [text for text in texts if text]
            are_numbers = bool(known) and all(_number(text) is not None for text in known)
            for row, text in zip(made, texts, strict=True):
                if text is not None and (text or not are_numbers):
                    row[column] = _number(text) if are_numbers else text or "(empty)"
        return made

    def _read(self, table: Table, found: dict[str, dict[str, str | None]]) -> None:
        """Add what one table says of the samples in `found`; None where rows of a sample differ."""
        others = [name for name in table.fields if name != self.inputs and name not in self.used]
        names = [name for name in others if all(map(_is_plain, table.values([name], _LOOKED_AT)[0]))]
        if not names:
            return
        rows, _ = rows_of_table("predict", table, self.inputs, (), {}, self.own)
        cells = table.values(names)
        for place, sample in enumerate(rows.inputs.tolist()):
            if (own := found.get(sample)) is None:
                continue
            for name, column in zip(names, cells, strict=True):
                text = as_cell(column[place])
                own[name] = text if own.get(name, text) == text else None


def _is_plain(cell: Any) -> bool:
    return not isinstance(cell, (bytes, Mapping, list, tuple, set, frozenset)) and not getattr(cell, "ndim", 0)


def _number(text: str) -> float | int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else value
