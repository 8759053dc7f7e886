"""How predictions are written: a table to read, CSV, or one JSON object a line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from flashtask.core.plain_json import number_or_null

__all__ = ["WRITERS"]

_GAP = "  "


def _write_table(
    predictions: Iterable[Any],
    stream: TextIO,
    *,
    top_k: int | None,
    paths: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Columns under a header; on a terminal, long paths lose their beginning so that a row is a line."""
    label_width = max(len("label"), *map(len, labels))
    path_width = max(len("path"), *map(len, paths)) if paths else len("path")
    if stream.isatty():
        columns = shutil.get_terminal_size().columns
        others = (label_width + len(_GAP) + len("0.0000") + len(_GAP)) * (top_k or 1)
        path_width = max(12, min(path_width, columns - others - 1))
    titles = f"{_GAP}{'label':<{label_width}}{_GAP}score " * (top_k or 1)
    stream.write(f"{'path':<{path_width}}{titles}".rstrip() + "\n")
    for prediction in predictions:
        path = os.fspath(prediction.path)
        shown = path if len(path) <= path_width else "..." + path[3 - path_width :]
        pairs = zip(prediction.labels[: top_k or 1], prediction.scores[: top_k or 1], strict=True)
        cells = [f"{_GAP}{label:<{label_width}}{_GAP}{score:.4f}" for label, score in pairs]
        stream.write(f"{shown:<{path_width}}" + "".join(cells) + "\n")
        stream.flush()


def _write_csv(
    predictions: Iterable[Any],
    stream: TextIO,
    *,
    top_k: int | None,
    paths: Sequence[str],
    labels: Sequence[str],
) -> None:
    """A header and a row an image; with top-k, `labels` and `scores` are JSON lists."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", "label", "score", *(["labels", "scores"] if top_k else [])])
    for prediction in predictions:
        row = _row(prediction, top_k)
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row.values()])
        stream.flush()


def _write_jsonl(
    predictions: Iterable[Any],
    stream: TextIO,
    *,
    top_k: int | None,
    paths: Sequence[str],
    labels: Sequence[str],
) -> None:
    """One object an image, on a line of its own."""
    for prediction in predictions:
        row = _row(prediction, top_k)
        row["score"] = number_or_null(row["score"])
        if top_k:
            row["scores"] = [number_or_null(score) for score in row["scores"]]
        stream.write(json.dumps(row) + "\n")
        stream.flush()


def _row(prediction: Any, top_k: int | None) -> dict[str, Any]:
    row = {"path": prediction.path, "label": prediction.label, "score": prediction.score}
    if top_k:
        row |= {"labels": list(prediction.labels[:top_k]), "scores": list(prediction.scores[:top_k])}
    return row


WRITERS: dict[str, Callable[..., None]] = {"table": _write_table, "csv": _write_csv, "jsonl": _write_jsonl}
