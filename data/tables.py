"""Tables of samples: which columns there are, and the cells of those that are asked for, as text.

Each kind of table is a subclass that gives the cells of a column. CSV needs the standard library alone; Parquet needs
polars or pyarrow; a data frame is whatever has `columns` and gives a column by its name, as those of pandas and polars.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

from flashtask.core.errors import BadDataError, UsageError, did_you_mean
from flashtask.core.files import missing_file
from flashtask.core.known_files import content_hashes
from flashtask.data.cached_inputs import cached_file, is_address
from flashtask.data.layout import is_image_name
from flashtask.data.packed_pictures import PackedPictures, pack_pictures
from flashtask.data.problems import Problems
from flashtask.data.samples import Column, as_text

__all__ = ["BETWEEN", "Frame", "Table", "as_cell", "open_table"]

_DELIMITERS = ",;\t|"
#: Pictures of a Parquet file that are in memory while they are copied.
_AT_ONCE = 64
#: Rows that are looked at to find the column of the images.
_LOOKED_AT = 20
#: What separates the values of a list in one cell.
BETWEEN = "\x1f"


class Frame(Protocol):
    """A data frame, as those of pandas and polars: names of columns, and a column by its name."""

    @property
    def columns(self) -> Any:
        """The names of the columns, in their order."""

    def __getitem__(self, name: Any, /) -> Any: ...


def open_table(source: Any, argument: str) -> Table:
    """The table in a file (.csv, .tsv, .jsonl, .parquet) or a data frame.

    Args:
        source: a path, an object with columns, or a tuple of the paths of Parquet files that are one table.
        argument: that gave it, such as `train_file`, for messages.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: it is not a table.
        UsageError: it is neither a path nor a data frame, or a library is missing.
    """
    if isinstance(source, tuple) and len(source) == 1:
        (source,) = source
    if isinstance(source, tuple):
        return ParquetTable(source[0], argument, source[1:])
    if not isinstance(source, (str, os.PathLike)):
        return FrameTable(source, argument)
    ending = os.fspath(source).lower()
    if ending.endswith((".parquet", ".pq")):
        return ParquetTable(source, argument)
    return JsonLinesTable(source, argument) if ending.endswith((".jsonl", ".ndjson")) else CsvTable(source, argument)


def as_cell(value: Any) -> str:
    """A value as the text of a cell: nothing for None and NaN, the values of a list with U+001F between them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return BETWEEN.join(as_cell(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value))
    text = str(value).strip()
    return "" if text in ("nan", "NaT", "<NA>") else text


class Table:
    """Base of tables.

    Args:
        place: the file, or what the table is.
        argument: that gave it, such as `train_file`, for messages.
        fields: the names of the columns.

    Raises:
        BadDataError: there are no columns, or a name occurs twice.
    """

    def __init__(self, place: str, argument: str, fields: Sequence[str]) -> None:
        self.place, self.argument, self.fields = place, argument, tuple(fields)
        #: Rows that cannot be read.
        self.problems = Problems()
        if not any(self.fields):
            raise BadDataError(f"{argument}: {place!r} is empty", why="the first line names the columns")
        if twice := [name for name in self.fields if self.fields.count(name) > 1]:
            if not twice[0]:
                raise BadDataError(f"{argument}: {place!r} has {len(twice)} columns without a name", fix="name them")
            raise BadDataError(f"{argument}: {place!r} has two columns {twice[0]!r}", fix="rename one of them")

    @property
    def folder(self) -> str:
        """What relative paths in it count from: a folder, or the address of one."""
        return os.getcwd()

    def values(self, names: Sequence[str], most: int | None = None) -> list[list[Any]]:
        """The cells of columns as the table holds them, of all rows or of the first `most`."""
        raise NotImplementedError

    def pictures(self, name: str) -> Sequence[Any] | None:
        """The pictures of a column that are read from a file when they are asked for; None if all cells are at hand."""
        return None

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """The names of the classes whose numbers a column holds, as Parquet files of the hub say them; else None."""
        return None

    def row(self, index: int) -> str:
        """What messages call a row: `line 4`."""
        return f"row {index + 1}"

    def where(self, index: int, field: str = "") -> str:
        """What messages call a cell: `cells.csv, line 4, column 'kind'`."""
        column = f", column {field!r}" if field else ""
        return f"{os.path.basename(self.place)}, {self.row(index)}{column}"

    def columns(self, names: Sequence[str]) -> list[Column]:
        """The columns of these names, each (N,) text without spaces around it.

        Raises:
            BadDataError: there are no such columns, or no rows.
        """
        self.require(names)
        found = self.values(names)
        if found and not found[0] and not len(self.problems):
            raise BadDataError(f"{self.argument}: {self.place!r} has a header and no rows")
        return [as_text(map(as_cell, cells)) for cells in found]

    def input_field(self, given: str | None) -> str:
        """The column of the images: the one that is given, else the only one that holds names of image files.

        Raises:
            BadDataError: there is no such column.
            UsageError: it is not clear which one is meant.
        """
        if given is not None:
            self.require([given])
            return given
        cells = dict(zip(self.fields, self.values(self.fields, _LOOKED_AT), strict=True))
        likely = [name for name, column in cells.items() if column and all(map(_is_image, column))]
        if len(likely) == 1:
            return likely[0]
        found = f"these do: {', '.join(map(repr, likely))}" if likely else f"there are: {self._shown()}"
        raise UsageError(
            f"{self.argument} {self.place!r}: which column holds the images? {found}",
            fix=f'input_field="{(likely or self.fields)[0]}"',
        )

    def target_fields(self, given: str | Sequence[str] | None, used: Collection[str | None]) -> tuple[str, ...]:
        """The columns of the targets: those that are given, else the only one that is not used for something else.

        Args:
            given: by the user.
            used: columns of the images, parts, groups and weights.

        Raises:
            BadDataError: there is no such column.
            UsageError: it is not clear which one is meant.
        """
        if given is not None:
            fields = (given,) if isinstance(given, str) else tuple(given)
            self.require(fields)
            return fields
        others = [name for name in self.fields if name not in used]
        if len(others) == 1:
            return (others[0],)
        raise UsageError(
            f"{self.argument} {self.place!r}: which column holds the targets? There are: {self._shown()}",
            fix=f'target_fields="{others[0]}"' if others else "a table with a column of targets",
        )

    def require(self, names: Iterable[str | None]) -> None:
        """Require columns, of which None stands for one that is not used.

        Raises:
            BadDataError: some are not there; all are named.
        """
        missing = [name for name in dict.fromkeys(names) if name is not None and name not in self.fields]
        if missing:
            noun = f"column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
            raise BadDataError(
                f"{self.argument} {self.place!r} has no {noun}; there are: {self._shown()}",
                fix="; ".join(filter(None, (did_you_mean(name, self.fields) for name in missing)))
                or self._first_row_is_no_header(),
            )

    def _first_row_is_no_header(self) -> str:
        """The line to write above the first, if that holds the path of an image; else empty."""
        if not any(map(_is_image, self.fields)):
            return f"one of: {self._shown()}"
        names = ",".join("file" if _is_image(field) else f"column{at}" for at, field in enumerate(self.fields, 1))
        return f"the first line must name the columns; write a line above it, such as {names}"

    def _shown(self) -> str:
        more = f" and {len(self.fields) - 20} more" if len(self.fields) > 20 else ""
        return ", ".join(map(repr, self.fields[:20])) + more


def _is_image(cell: Any) -> bool:
    """Whether a cell names an image, or is one: a picture, or its bytes as Parquet files of the hub hold them."""
    if isinstance(cell, str):
        return is_image_name(cell.strip())
    return hasattr(cell, "getexif") or isinstance(cell, bytes) or (isinstance(cell, Mapping) and "bytes" in cell)


class _FileTable(Table):
    """Base of tables in files.

    Raises:
        MissingInputError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], argument: str) -> None:
        self.path = Path(cached_file(str(path)) if is_address(path) else path).expanduser().absolute()
        if not self.path.is_file():
            raise missing_file(self.path)
        self.place, self.argument = str(path) if is_address(path) else str(self.path), argument
        super().__init__(self.place, argument, self._header(argument))

    def _header(self, argument: str) -> Sequence[str]:
        raise NotImplementedError

    @property
    def folder(self) -> str:
        return self.place.rpartition("/")[0] if is_address(self.place) else str(self.path.parent)

    @contextmanager
    def _opened(self, argument: str) -> Iterator[TextIO]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield file
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._not_text(argument, error) from None

    def _not_text(self, argument: str, error: Exception) -> BadDataError:
        """The error for a file that is not text in UTF-8, with the line that is not, or that is not CSV."""
        if not isinstance(error, UnicodeDecodeError):
            return BadDataError(
                f"{argument}: {str(self.path)!r} cannot be read as CSV",
                why=str(error),
                fix="look for a quotation mark that is not closed",
            )
        content, encoding, why = self.path.read_bytes(), "LATIN1", str(error)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            why, encoding = "it begins as UTF-16 does", "UTF-16"
        else:
            for number, line in enumerate(content.splitlines(), start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    shown = line.decode("latin-1")[:60]
                    why = f"line {number} has the byte 0x{line[found.start]:02x}, as in {shown!r}"
                    break
        fix = f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {self.path.name} > utf8.csv"
        return BadDataError(f"{argument}: {str(self.path)!r} is not a table in UTF-8", why=why, fix=fix)


class CsvTable(_FileTable):
    """A CSV or TSV file with a header; commas, semicolons, tabs and bars are recognised by the header.

    Args:
        path: of the file, UTF-8.
        argument: that gave it, such as `train_file`, for messages.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: it has no header, or a name occurs twice in it.
    """

    def _header(self, argument: str) -> Sequence[str]:
        self._lines: list[int] = []
        with self._opened(argument) as file:
            first = file.readline()
            file.seek(0)
            self._delimiter = max(_DELIMITERS, key=first.count)
            return [name.strip() for name in next(csv.reader(file, delimiter=self._delimiter), [])]

    def values(self, names: Sequence[str], most: int | None = None) -> list[list[Any]]:
        places = [self.fields.index(name) for name in names]
        found: list[list[str]] = [[] for _ in names]
        lines: list[int] = []
        self.problems = Problems()
        for line, row in islice(self._rows(), most):
            if len(row) != len(self.fields):
                what = f"line {line} has {len(row)} cells, and the header has {len(self.fields)}"
                opened = any("\n" in cell for cell in row)
                self.problems.add(
                    "row of another length",
                    f"{self.path.name}, {what}",
                    fix=f"close the quotation mark in line {line}"
                    if opened
                    else "give each row as many cells as the header; quote those that hold a separator",
                )
                continue
            lines.append(line)
            for cells, place in zip(found, places, strict=True):
                cells.append(row[place])
        self._lines = lines
        return found

    def row(self, index: int) -> str:
        return f"line {self._lines[index]}"

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows, with the line on which each begins."""
        with self._opened(self.argument) as file:
            reader = csv.reader(file, delimiter=self._delimiter)
            next(reader)
            line = reader.line_num + 1
            for row in reader:
                if any(row):  # not an empty line
                    yield line, row
                line = reader.line_num + 1


class JsonLinesTable(_FileTable):
    """A file with a JSON object on each line; the columns are the keys of the first, others may leave some out.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: a line is not a JSON object.
    """

    def _header(self, argument: str) -> Sequence[str]:
        self._lines: list[int] = []
        return [str(name) for _, row in islice(self._rows(), 1) for name in row]

    def values(self, names: Sequence[str], most: int | None = None) -> list[list[Any]]:
        rows = list(islice(self._rows(), most))
        self._lines = [line for line, _ in rows]
        return [[row.get(name) for _, row in rows] for name in names]

    def row(self, index: int) -> str:
        return f"line {self._lines[index]}"

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._opened(self.argument) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = str(error)
                else:
                    if isinstance(row, dict):
                        yield number, row
                        continue
                    why = f"it holds {line.strip()[:60]!r}"
                raise BadDataError(
                    f"{self.argument}: {self.place!r}, line {number} is not a JSON object",
                    why=why,
                    fix='a row is a line such as {"file": "1.png", "label": "cat"}',
                )


class ParquetTable(_FileTable):
    """A Parquet file, or several that are one table, read by polars or pyarrow.

    Args:
        path: of the file.
        argument: that gave it.
        more: further files, whose rows come after.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: it cannot be read.
        UsageError: neither library is installed.
    """

    def __init__(self, path: str | os.PathLike[str], argument: str, more: Sequence[Path] = ()) -> None:
        self._more = tuple(more)
        super().__init__(path, argument)

    def _header(self, argument: str) -> Sequence[str]:
        if find_spec("polars"):
            import polars

            return list(self._read(lambda: polars.read_parquet_schema(self.path)))
        if find_spec("pyarrow"):
            import pyarrow.parquet

            return list(self._read(lambda: pyarrow.parquet.read_schema(self.path).names))
        raise UsageError(
            f"{argument}: reading {self.path.name!r} needs polars or pyarrow", fix='pip install "flashtask[tables]"'
        )

    def values(self, names: Sequence[str], most: int | None = None) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in names]
        for path in (self.path, *self._more) if most is None else (self.path,):
            for column, cells in zip(found, self._values_of(path, list(names), most), strict=True):
                column += cells
        return found

    def _values_of(self, path: Path, names: list[str], most: int | None) -> list[list[Any]]:
        if find_spec("polars"):
            import polars

            frame = self._read(lambda: polars.read_parquet(path, columns=names, n_rows=most))
            return [frame[name].to_list() for name in names]
        import pyarrow.parquet

        if most is not None:
            rows = self._read(lambda: next(pyarrow.parquet.ParquetFile(path).iter_batches(most, columns=names), []))
            return [rows[name].to_pylist() if len(rows) else [] for name in names]
        table = self._read(lambda: pyarrow.parquet.read_table(path, columns=names))
        return [table[name].to_pylist() for name in names]

    def pictures(self, name: str) -> PackedPictures | None:
        (first,) = self.values([name], _LOOKED_AT)
        if not any(isinstance(_bytes_in(cell), bytes) for cell in first):
            return None
        paths = [self.path, *self._more]
        keys = [sha256(f"{one} {name}".encode()).hexdigest()[:24] for one in content_hashes(list(map(str, paths)))]
        return PackedPictures(
            [pack_pictures(key, self._bytes_of(path, name)) for key, path in zip(keys, paths, strict=True)]
        )

    def _bytes_of(self, path: Path, name: str) -> Iterator[bytes | None]:
        """The pictures of one file, of which few are in memory at a time."""
        batches = _batches(path, name)
        while (cells := self._read(lambda: next(batches, None))) is not None:
            yield from map(_bytes_in, cells)

    def class_names(self, field: str) -> tuple[str, ...] | None:
        if not find_spec("pyarrow"):
            return None
        import pyarrow.parquet

        about = (self._read(lambda: pyarrow.parquet.read_schema(self.path)).metadata or {}).get(b"huggingface", b"{}")
        feature = json.loads(about).get("info", {}).get("features", {}).get(field, {})
        names = feature.get("names") if isinstance(feature, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) else None

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # each library has errors of its own
            raise BadDataError(f"{self.argument}: cannot read {str(self.path)!r}", why=str(error)[:300]) from error


def _batches(path: Path, name: str) -> Iterator[list[Any]]:
    """The cells of a column of a Parquet file, few at a time."""
    if find_spec("pyarrow"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_AT_ONCE, columns=[name]):
            yield batch[name].to_pylist()
        return
    import polars

    rows = polars.scan_parquet(path).select(name)
    for start in range(0, rows.select(polars.len()).collect().item(), _AT_ONCE):
        yield rows.slice(start, _AT_ONCE).collect()[name].to_list()


def _bytes_in(cell: Any) -> bytes | None:
    """The bytes of a picture in a cell; Parquet files of the hub hold them beside the name of the file."""
    found = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return found if isinstance(found, bytes) else None


class FrameTable(Table):
    """A data frame of pandas or polars, or any object with `columns` whose columns are got by name.

    Args:
        frame: the table; a mapping from names to equally long lists is one too.
        argument: that gave it, for messages.

    Raises:
        UsageError: something else, a lazy frame, or columns of different lengths.
    """

    def __init__(self, frame: Any, argument: str) -> None:
        if hasattr(frame, "collect"):
            what = f"{argument} is a {type(frame).__name__}, whose rows are not computed yet"
            raise UsageError(what, fix=f"{argument}=frame.collect()")
        fields = list(frame) if isinstance(frame, Mapping) else getattr(frame, "columns", None)
        if fields is None:
            raise UsageError(
                f"{argument} must be a data frame or the path of a table, not {type(frame).__name__}",
                fix=f'{argument}={{"file": ["1.png"], "label": ["cat"]}}',
            )
        super().__init__(type(frame).__name__, argument, [str(name) for name in fields])
        self._frame = {str(name): frame[name] for name in fields}
        for name, column in self._frame.items():
            if isinstance(column, str) or not hasattr(column, "__len__"):
                raise UsageError(f"{argument}: column {name!r} must be a list, not {type(column).__name__}")
        if len({len(column) for column in self._frame.values()}) > 1:
            raise UsageError(f"{argument}: the columns have different lengths")

    def values(self, names: Sequence[str], most: int | None = None) -> list[list[Any]]:
        columns = [self._frame[name] for name in names]
        # An array of several axes holds a picture or several targets in each row.
        rows = (one.tolist() if hasattr(one, "tolist") and getattr(one, "ndim", 1) == 1 else one for one in columns)
        return [list(islice(column, most)) for column in rows]

    def where(self, index: int, field: str = "") -> str:
        column = f", column {field!r}" if field else ""
        return f"{self.argument}, {self.row(index)}{column}"
