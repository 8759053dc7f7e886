"""Files that hold a table: which columns there are, and those that are asked for."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from flashtask.core.errors import BadDataError, UsageError, did_you_mean
from flashtask.core.files import missing_file
from flashtask.data.layout import is_image_name
from flashtask.data.samples import Column, as_text

__all__ = ["Table"]

_DELIMITERS = ",;\t|"
#: Rows that are looked at to find the column of the images.
_LOOKED_AT = 20


class Table:
    """A CSV or TSV file with a header; commas, semicolons, tabs and bars are recognised by the header.

    Args:
        path: of the file, UTF-8.
        argument: that gave it, such as `train_file`, for messages.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: it has no header, or a name occurs twice in it.
    """

    def __init__(self, path: str | os.PathLike[str], argument: str) -> None:
        self.path, self.argument = Path(path).expanduser().absolute(), argument
        if not self.path.is_file():
            raise missing_file(self.path)
        with self._opened() as file:
            first = file.readline()
        self._delimiter = max(_DELIMITERS, key=first.count)
        self.fields = tuple(name.strip() for name in next(csv.reader([first], delimiter=self._delimiter), []))
        if not any(self.fields):
            raise BadDataError(f"{argument}: {str(self.path)!r} is empty", why="the first line names the columns")
        if twice := [name for name in self.fields if self.fields.count(name) > 1]:
            raise BadDataError(f"{argument}: {str(self.path)!r} has two columns {twice[0]!r}", fix="rename one of them")

    def columns(self, names: Sequence[str]) -> list[Column]:
        """The columns of these names, each (N,) text without spaces around it.

        Raises:
            UsageError: there is no such column.
            BadDataError: there are no rows, or one has another number of cells than the header.
        """
        for name in names:
            self._require(name)
        places = [self.fields.index(name) for name in names]
        found: list[list[str]] = [[] for _ in names]
        for row in self._rows():
            for cells, place in zip(found, places, strict=True):
                cells.append(row[place].strip())
        if found and not found[0]:
            raise BadDataError(f"{self.argument}: {str(self.path)!r} has a header and no rows")
        return [as_text(cells) for cells in found]

    def input_field(self, given: str | None) -> str:
        """The column of the images: the one that is given, else the only one that holds names of image files.

        Raises:
            UsageError: there is no such column, or it is not clear which one is meant.
        """
        if given is not None:
            self._require(given)
            return given
        rows = [row for _, row in zip(range(_LOOKED_AT), self._rows(), strict=False)]
        likely = [
            name for place, name in enumerate(self.fields) if rows and all(is_image_name(row[place]) for row in rows)
        ]
        if len(likely) == 1:
            return likely[0]
        found = f"these do: {', '.join(map(repr, likely))}" if likely else f"there are: {self._shown()}"
        raise UsageError(
            f"{self.argument} {str(self.path)!r}: which column holds the images? {found}",
            fix=f'input_field="{(likely or self.fields)[0]}"',
        )

    def target_fields(self, given: str | Sequence[str] | None, used: Collection[str | None]) -> tuple[str, ...]:
        """The columns of the targets: those that are given, else the only one that is not used for something else.

        Args:
            given: by the user.
            used: columns of the images, parts, groups and weights.

        Raises:
            UsageError: there is no such column, or it is not clear which one is meant.
        """
        if given is not None:
            fields = (given,) if isinstance(given, str) else tuple(given)
            for name in fields:
                self._require(name)
            return fields
        others = [name for name in self.fields if name not in used]
        if len(others) == 1:
            return (others[0],)
        raise UsageError(
            f"{self.argument} {str(self.path)!r}: which column holds the targets? There are: {self._shown()}",
            fix=f'target_fields="{others[0]}"' if others else "a table with a column of targets",
        )

    def _require(self, name: str) -> None:
        if name not in self.fields:
            raise UsageError(
                f"{self.argument} {str(self.path)!r} has no column {name!r}; there are: {self._shown()}",
                fix=did_you_mean(name, self.fields) or "",
            )

    def _shown(self) -> str:
        more = f" and {len(self.fields) - 20} more" if len(self.fields) > 20 else ""
        return ", ".join(map(repr, self.fields[:20])) + more

    def _rows(self) -> Iterator[list[str]]:
        with self._opened() as file:
            reader = csv.reader(file, delimiter=self._delimiter)
            next(reader)
            for row in reader:
                if not any(row):
                    continue  # an empty line
                if len(row) != len(self.fields):
                    raise BadDataError(
                        f"{self.argument}: {str(self.path)!r}, line {reader.line_num} has {len(row)} cells, "
                        f"and the header has {len(self.fields)}"
                    )
                yield row

    @contextmanager
    def _opened(self) -> Iterator[TextIO]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield file
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadDataError(
                f"{self.argument}: {str(self.path)!r} is not a table in UTF-8",
                why=str(error),
                fix="save it as UTF-8 CSV",
            ) from None
