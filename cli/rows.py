"""How predictions are written: a table to read, CSV, JSON, one JSON object a line, or Parquet."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flashtask.core.errors import UsageError
from flashtask.core.names import shown_name

__all__ = ["PARQUET", "ROW_FORMATS", "WRITERS", "Columns", "Row", "format_of", "require_parquet", "row_of"]
__all__ += ["write_parquet"]

#: The cells of one image by the names of their columns.
Row = Mapping[str, Any]
PARQUET = "parquet"
#: Rows of a Parquet file that are in memory at a time.
_ROWS_AT_ONCE = 10_000

_GAP = "  "
#: The format that the ending of a file's name means.
_ENDINGS = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "table", ".parquet": PARQUET}


@dataclass(frozen=True)
class Columns:
    """What a table needs to know before the first row.

    Args:
        paths: of all images; a table is as wide as they need.
        labels: that may occur in a cell of text, for the same reason.
        options: of `Prediction.as_row` and `to_dict`.
    """

    paths: Iterable[str]
    labels: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def format_of(given: str | None, output: str | None) -> str:
    """The format to write: the one that was given, else what the name of the file says, else a table.

    Raises:
        UsageError: the two contradict each other, or the name says nothing that is known.
    """
    ending = Path(output or "").suffix.lower()
    meant = _ENDINGS.get(ending)
    if given is None and ending and meant is None:
        raise UsageError(
            f"--output {output}: {ending} is not the ending of a known format",
            fix=f"--format {', '.join(ROW_FORMATS)}; or one of the endings {', '.join(_ENDINGS)}",
        )
    if given in ROW_FORMATS and meant not in (None, "table", given):
        raise UsageError(
            f"--output {output} and --format {given} contradict each other",
            fix=f"--format {meant}, or --output {Path(output or '').with_suffix(_ending(given))}",
        )
    return given or meant or "table"


def _ending(form: str) -> str:
    return next(ending for ending, meant in _ENDINGS.items() if meant == form)


def row_of(prediction: Any, form: str, columns: Columns) -> dict[str, Any]:
    """The row of a prediction, as the writer of a format takes it."""
    if form in ("json", "jsonl"):
        return dict(prediction.to_dict(**columns.options))
    return dict(prediction.as_row(**columns.options))


def _aligned(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, all with the columns of the first that has no error; those before it wait for it."""
    waiting: list[Row] = []
    names: list[str] = []
    for row in rows:
        if not names and row.get("error"):
            waiting.append(row)
            continue
        names = names or list(row)
        for one in (*waiting, row):
            yield {name: one.get(name) for name in names} if one.get("error") else one
        waiting = []
    yield from waiting


def _write_table(rows: Iterable[Row], stream: TextIO, columns: Columns) -> None:
    """Columns under a header; on a terminal, long paths lose their beginning so that a row is a line."""
    label_width = max((len(shown_name(label)) for label in columns.labels), default=0)
    path_width = max(map(len, ("path", *map(shown_name, columns.paths))))
    widths: list[int] = []
    unreadable: list[Row] = []
    for row in rows:
        if row.get("error"):
            unreadable.append(row)
            if widths:
                _write_errors(unreadable, stream, path_width)
            continue
        cells = [(shown_name(title), cell) for title, cell in _cells(row)]
        if not widths:
            widths = [max(len(title), label_width if isinstance(cell, str) else 6) for title, cell in cells]
            if stream.isatty():
                others = sum(len(_GAP) + width for width in widths)
                path_width = max(12, min(path_width, shutil.get_terminal_size().columns - others - 1))
            stream.write(_line("path", path_width, [(title, isinstance(cell, str)) for title, cell in cells], widths))
            _write_errors(unreadable, stream, path_width)
        shown = [(shown_name(c), True) if isinstance(c, str) else (_number_or_json(c), False) for _, c in cells]
        stream.write(_line(_fitted(os.fspath(row["path"]), path_width), path_width, shown, widths))
        stream.flush()
    if not widths:
        stream.write("path\n")
        _write_errors(unreadable, stream, path_width)


def _write_errors(rows: list[Row], stream: TextIO, path_width: int) -> None:
    """Write the rows of images that could not be read, which have no cells but the reason, and forget them."""
    for row in rows:
        stream.write(_line(_fitted(os.fspath(row["path"]), path_width), path_width, [(row["error"], True)], [0]))
    rows.clear()


def _number_or_json(cell: Any) -> str:
    """A number as a table shows it; what holds several, such as a list of boxes, as JSON."""
    return f"{cell:.4f}" if isinstance(cell, float) else json.dumps(cell, ensure_ascii=False)


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, str | float]]:
    """The titles and cells of a row without its path: text, numbers; lists of labels and scores as pairs."""
    labels, scores = row.get("labels"), row.get("scores") or []
    if labels is not None and "label" in row:  # the best ones, of which the first is `label`
        for pair in zip(labels, scores, strict=True):
            yield from zip(("label", "score"), pair, strict=True)
    for name, value in row.items():
        if name not in ("path", "error", "labels", "scores") and not (
            name in ("label", "score") and labels is not None
        ):
            yield name.removeprefix("score_"), value
    if labels is not None and "label" not in row:  # last, because nobody knows how long it becomes
        yield "labels", ", ".join(f"{label} {score:.4f}" for label, score in zip(labels, scores, strict=True)) or "-"


def _line(path: str, path_width: int, cells: Sequence[tuple[str, bool]], widths: Sequence[int]) -> str:
    """A line of a table; text is flush left, numbers are flush right."""
    padded = (
        f"{text:<{width}}" if is_text else f"{text:>{width}}"
        for (text, is_text), width in zip(cells, widths, strict=True)
    )
    return _GAP.join([f"{path:<{path_width}}", *padded]).rstrip() + "\n"


def _fitted(path: str, width: int) -> str:
    """A path that is too long loses its beginning, unless that would leave half of a name in the shell's form."""
    shown = shown_name(path)
    return shown if len(shown) <= width or shown != path else "..." + path[3 - width :]


def _write_csv(rows: Iterable[Row], stream: TextIO, columns: Columns) -> None:
    """A header and a row an image; lists are written as JSON."""
    for number, row in enumerate(_aligned(rows)):
        if not number:
            _write_cells(stream, list(row))
        _write_cells(
            stream, [json.dumps(c, ensure_ascii=False) if isinstance(c, (list, dict)) else c for c in row.values()]
        )
        stream.flush()


def _write_cells(stream: TextIO, cells: Sequence[Any]) -> None:
    # The csv module of Python 3.11 writes a carriage return without quotes, and its reader ends the row there.
    is_odd = any("\r" in cell for cell in cells if isinstance(cell, str))
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if is_odd else csv.QUOTE_MINIMAL).writerow(cells)


def _write_jsonl(rows: Iterable[Row], stream: TextIO, columns: Columns) -> None:
    """One object an image, on a line of its own."""
    for row in rows:
        stream.write(json.dumps(row) + "\n")
        stream.flush()


def _write_json(rows: Iterable[Row], stream: TextIO, columns: Columns) -> None:
    """A list of objects, an image a line."""
    separator = "["
    for row in rows:
        stream.write(f"{separator}\n{json.dumps(row)}")
        stream.flush()
        separator = ","
    stream.write("[]\n" if separator == "[" else "\n]\n")


#: What writes rows as they become known.
WRITERS: dict[str, Callable[[Iterable[Row], TextIO, Columns], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}
ROW_FORMATS = (*WRITERS, PARQUET)


def require_parquet(output: str | None) -> None:
    """Require what a Parquet file needs: a name, and pyarrow.

    Raises:
        UsageError: one of them is missing.
    """
    if not output:
        raise UsageError("--format parquet writes a file", fix="--output rows.parquet")
    if not find_spec("pyarrow"):
        raise UsageError("writing Parquet needs pyarrow", fix='pip install "flashtask[tables]"')


def write_parquet(rows: Iterable[Row], file: BinaryIO) -> None:
    """Write rows with a type for each column that suits all of them, some thousands at a time.

    Args:
        rows: gone through twice.
        file: to write to.
    """
    import pyarrow
    import pyarrow.parquet

    def tables(schema: Any = None) -> Iterator[Any]:
        every = map(_in_utf8, _aligned(rows))
        while some := [*islice(every, _ROWS_AT_ONCE)]:
            yield pyarrow.Table.from_pylist(some, schema)

    found = [table.schema for table in tables()] or [pyarrow.schema([("path", pyarrow.string())])]
    schema = pyarrow.unify_schemas(found, promote_options="permissive")
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for table in tables(schema):
            writer.write_table(table)


def _in_utf8(row: Row) -> Row:
    """A row whose path Parquet can hold: a byte that is not UTF-8 is written as `\\xe9`."""
    path = row["path"]
    return {**row, "path": os.fsencode(path).decode(errors="backslashreplace")}
