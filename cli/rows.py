"""How predictions are written: a table to read, CSV, JSON, or one JSON object a line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from flashtask.core.errors import UsageError
from flashtask.core.names import shown_name
from flashtask.core.plain_json import number_or_null

__all__ = ["WRITERS", "Columns", "format_of"]

_GAP = "  "
#: The format that the ending of a file's name means.
_ENDINGS = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "table"}


@dataclass(frozen=True)
class Columns:
    """What a row has, besides path, label and score.

    Args:
        labels: all that the model knows, in the order of its outputs.
        paths: of all images; a table is as wide as they need.
        top_k: how many labels and scores, best first; None for none.
        all_scores: the score of every label.
    """

    labels: Sequence[str]
    paths: Sequence[str]
    top_k: int | None = None
    all_scores: bool = False


def format_of(given: str | None, output: str | None) -> str:
    """The format to write: the one that was given, else what the name of the file says, else a table.

    Raises:
        UsageError: the two contradict each other, or the name says nothing that is known.
    """
    ending = Path(output or "").suffix.lower()
    meant = _ENDINGS.get(ending)
    if given is None and ending and meant is None:
        raise UsageError(
            f"--output {output}: {ending} is not the ending of a format",
            fix=f"--format {', '.join(WRITERS)}; or one of the endings {', '.join(_ENDINGS)}",
        )
    if given is not None and meant not in (None, "table", given):
        raise UsageError(
            f"--output {output} and --format {given} contradict each other",
            fix=f"--format {meant}, or --output {Path(output or '').with_suffix(_ending(given))}",
        )
    return given or meant or "table"


def _ending(form: str) -> str:
    return next(ending for ending, meant in _ENDINGS.items() if meant == form)


def _write_table(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """Columns under a header; on a terminal, long paths lose their beginning so that a row is a line."""
    top_k, labels = columns.top_k or 1, [shown_name(label) for label in columns.labels]
    label_width = max(len("label"), *map(len, labels))
    score_widths = [max(len("0.0000"), len(label)) for label in labels] if columns.all_scores else []
    path_width = max(map(len, ("path", *map(shown_name, columns.paths))))
    if stream.isatty():
        others = (label_width + len(_GAP) + len("0.0000") + len(_GAP)) * top_k
        others += sum(len(_GAP) + width for width in score_widths)
        path_width = max(12, min(path_width, shutil.get_terminal_size().columns - others - 1))
    titles = f"{_GAP}{'label':<{label_width}}{_GAP}score " * top_k
    titles += "".join(f"{_GAP}{label:>{width}}" for label, width in zip(labels, score_widths, strict=False))
    stream.write(f"{'path':<{path_width}}{titles}".rstrip() + "\n")
    for prediction in predictions:
        pairs = zip(prediction.labels[:top_k], prediction.scores[:top_k], strict=True)
        cells = [f"{_GAP}{shown_name(label):<{label_width}}{_GAP}{score:.4f}" for label, score in pairs]
        if columns.all_scores:
            scores = _all_scores(prediction, columns)
            cells += [f"{_GAP}{score:>{width}.4f}" for score, width in zip(scores, score_widths, strict=True)]
        stream.write(f"{_fitted(os.fspath(prediction.path), path_width):<{path_width}}" + "".join(cells) + "\n")
        stream.flush()


def _fitted(path: str, width: int) -> str:
    """A path that is too long loses its beginning, unless that would leave half of a name in the shell's form."""
    shown = shown_name(path)
    return shown if len(shown) <= width or shown != path else "..." + path[3 - width :]


def _write_csv(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """A header and a row an image; with top-k, `labels` and `scores` are JSON lists."""
    extra = ["labels", "scores"] if columns.top_k else []
    if columns.all_scores:
        extra += [f"score_{label}" for label in columns.labels]
    _write_cells(stream, ["path", "label", "score", *extra])
    for prediction in predictions:
        cells = [prediction.path, prediction.label, prediction.score]
        if columns.top_k:
            best = (prediction.labels[: columns.top_k], prediction.scores[: columns.top_k])
            cells += [json.dumps(list(part), ensure_ascii=False) for part in best]
        if columns.all_scores:
            cells += _all_scores(prediction, columns)
        _write_cells(stream, cells)
        stream.flush()


def _write_cells(stream: TextIO, cells: Sequence[Any]) -> None:
    # The csv module of Python 3.11 writes a carriage return without quotes, and its reader ends the row there.
    is_odd = any("\r" in cell for cell in cells if isinstance(cell, str))
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if is_odd else csv.QUOTE_MINIMAL).writerow(cells)


def _write_jsonl(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """One object an image, on a line of its own."""
    for prediction in predictions:
        stream.write(json.dumps(_object(prediction, columns)) + "\n")
        stream.flush()


def _write_json(predictions: Iterable[Any], stream: TextIO, columns: Columns) -> None:
    """A list of objects, an image a line."""
    separator = "["
    for prediction in predictions:
        stream.write(f"{separator}\n{json.dumps(_object(prediction, columns))}")
        stream.flush()
        separator = ","
    stream.write("[]\n" if separator == "[" else "\n]\n")


def _object(prediction: Any, columns: Columns) -> dict[str, Any]:
    found = {"path": prediction.path, "label": prediction.label, "score": number_or_null(prediction.score)}
    if columns.top_k:
        scores = [number_or_null(score) for score in prediction.scores[: columns.top_k]]
        found |= {"labels": list(prediction.labels[: columns.top_k]), "scores": scores}
    if columns.all_scores:
        scores = [number_or_null(score) for score in _all_scores(prediction, columns)]
        found["scores"] = dict(zip(columns.labels, scores, strict=True))
    return found


def _all_scores(prediction: Any, columns: Columns) -> list[float]:
    """In the order of the model's labels."""
    by_label = prediction.probabilities
    return [by_label[label] for label in columns.labels]


WRITERS: dict[str, Callable[[Iterable[Any], TextIO, Columns], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}
