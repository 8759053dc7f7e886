"""`History`: the rows of a run's log, as a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from flashtask.core.errors import UnknownNameError

__all__ = ["History", "phases_of"]


class History(list[dict[str, float]]):
    """A row an epoch, with `epoch`, `step`, `train_loss` and so on; `pandas.DataFrame(history)` takes it.

    Args:
        rows: by column; a value that was not measured in an epoch is missing or NaN.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        super().__init__(dict(row) for row in rows)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The rows of a `metrics.csv`.

        Raises:
            OSError: it cannot be read.
        """
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [*csv.DictReader(lines)]
        return cls({name: _number(text) for name, text in row.items() if name and text} for row in rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in the order in which they first occur."""
        return tuple(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[float]:
        """The values of a column, NaN where there is none.

        Raises:
            UnknownNameError: no row has it.
        """
        if name not in self.columns:
            raise UnknownNameError("column", name, self.columns)
        return [row.get(name, math.nan) for row in self]

    def __str__(self) -> str:
        """The last rows with the losses and metrics of validation, in 80 columns."""
        names = ["epoch", *(n for n in self.columns if n == "train_loss" or n.startswith("val_"))][:6]
        cells = [[f"{row[name]:.5g}" if name in row else "" for name in names] for row in self[-10:]]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        return "\n".join("  ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) for row in [names, *cells])

    def _repr_html_(self) -> str:
        from flashtask.core.html_table import table_html

        return table_html(self.columns, [[row.get(name, math.nan) for name in self.columns] for row in self])


def phases_of(history: History) -> list[tuple[int, int, int]]:
    """First row, row after the last, and trainable parameters of each phase: what trains changes between them."""
    found: list[tuple[int, int, int]] = []
    for place, row in enumerate(history):
        count = int(row.get("trainable_parameters", 0))
        if found and found[-1][2] == count:
            found[-1] = (found[-1][0], place + 1, count)
        else:
            found.append((place, place + 1, count))
    return found


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
