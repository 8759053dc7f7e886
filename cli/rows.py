"""How predictions are written: a table to read, CSV, JSON, or one JSON object a line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from flashtask.core.errors import UsageError
from flashtask.core.names import shown_name

__all__ = ["WRITERS", "Columns", "format_of"]

_GAP = "  "
#: The format that the ending of a file's name means.
_ENDINGS = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "table"}


@dataclass(frozen=True)
class Columns:
    """What a table needs to know before the first row.

    Args:
        paths: of all images; a table is as wide as they need.
        labels: that may occur in a cell of text, for the same reason.
        options: of `Prediction.as_row` and `to_dict`.
    """

    paths: Sequence[str]
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
            fix=f"--format {', '.join(WRITERS)}; or one of the endings {', '.join(_ENDINGS)}",
        )
    if given in WRITERS and meant not in (None, "table", given):
        raise UsageError(
            f"--output {output} and --format {given} contradict each other",
            fix=f"--format {meant}, or --output {Path(output or '').with_suffix(_ending(given))}",
        )
    return given or meant or "table"


def _ending(form: str) -> str:
    return next(ending for ending, meant in _ENDINGS.items() if meant == form)


def _write_table(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """Columns under a header; on a terminal, long paths lose their beginning so that a row is a line."""
    label_width = max((len(shown_name(label)) for label in columns.labels), default=0)
    path_width = max(map(len, ("path", *map(shown_name, columns.paths))))
    widths: list[int] = []
    for number, prediction in enumerate(predictions):
        row = prediction.as_row(**columns.options)
        cells = [(shown_name(title), cell) for title, cell in _cells(row)]
        if not number:
            widths = [max(len(title), label_width if isinstance(cell, str) else 6) for title, cell in cells]
            if stream.isatty():
                others = sum(len(_GAP) + width for width in widths)
                path_width = max(12, min(path_width, shutil.get_terminal_size().columns - others - 1))
            stream.write(_line("path", path_width, [(title, isinstance(cell, str)) for title, cell in cells], widths))
        shown = [(shown_name(c), True) if isinstance(c, str) else (_number_or_json(c), False) for _, c in cells]
        stream.write(_line(_fitted(os.fspath(row["path"]), path_width), path_width, shown, widths))
        stream.flush()
    if not widths:
        stream.write("path\n")


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
        if name not in ("path", "labels", "scores") and not (name in ("label", "score") and labels is not None):
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


def _write_csv(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """A header and a row an image; lists are written as JSON."""
    for number, prediction in enumerate(predictions):
        row = prediction.as_row(**columns.options)
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


def _write_jsonl(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """One object an image, on a line of its own."""
    for prediction in predictions:
        stream.write(json.dumps(prediction.to_dict(**columns.options)) + "\n")
        stream.flush()


def _write_json(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """A list of objects, an image a line."""
    separator = "["
    for prediction in predictions:
        stream.write(f"{separator}\n{json.dumps(prediction.to_dict(**columns.options))}")
        stream.flush()
        separator = ","
    stream.write("[]\n" if separator == "[" else "\n]\n")


WRITERS: dict[str, Callable[[Iterable[Any], TextIO, Columns], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}
