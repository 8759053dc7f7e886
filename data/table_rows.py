"""The rows of tables: paths or pictures, targets, and the columns of parts, groups and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.arguments import PathLike
from flashtask.data.cached_inputs import is_address
from flashtask.data.given_rows import Rows
from flashtask.data.image_source import MemoryImages
from flashtask.data.problems import Problems
from flashtask.data.samples import as_text
from flashtask.data.tables import Table

__all__ = ["require_columns", "rows_of_table", "understood"]


def rows_of_table(
    part: str,
    table: Table,
    inputs: str,
    fields: tuple[str, ...],
    columns: Mapping[str, str],
    own: Mapping[str, Any],
) -> tuple[Rows, Sequence[Any] | None]:
    """The rows of one table, and the pictures if it holds these rather than paths.

    Args:
        part: that the table was given for.
        table: the table.
        inputs: the column of the images.
        fields: the columns of the targets.
        columns: `split_field`, `group_field` and `weight_field` -> the column, of those that are used.
        own: may hold `images_root` and `resolver`.

    Raises:
        BadDataError: there are no rows, or the resolver fails.
        UsageError: the resolver is not a function.
    """
    words = {"groups": "group_field", "weights": "weight_field", "parts": "split_field"}
    extra = {word: columns[name] for word, name in words.items() if name in columns} if part == "train" else {}
    own_fields = fields if part != "predict" else ()
    others = table.columns([*own_fields, *extra.values()])
    held, folder = table.pictures(inputs), own.get("images_root") or table.folder
    (cells,) = table.values([inputs]) if held is None else (held,)
    if not len(cells) and not len(table.problems):
        raise BadDataError(f"{table.argument}: {table.place!r} has a header and no rows")
    if held is not None:
        names = MemoryImages.names(table.argument, len(held))
    elif all(isinstance(cell, (str, os.PathLike)) or cell is None for cell in cells):
        names = _paths_in(table, inputs, cells, folder, own.get("resolver"))
    else:
        held = [_picture_in(cell) for cell in cells]
        names = MemoryImages.names(table.argument, len(held))
    count = len(own_fields)
    targets = np.stack(others[:count], axis=1) if count > 1 else others[0] if count else None
    found = dict(zip(extra, others[count:], strict=True))
    rows = Rows(
        part,
        table.argument,
        table.where,
        as_text(names),
        inputs,
        targets,
        "" if held is not None else folder,
        fields=tuple(extra.items()),
        problems=table.problems if len(table.problems) else None,
        **found,
    )
    return rows, held


def _paths_in(
    table: Table, field: str, cells: Sequence[Any], folder: str, resolver: Callable[[str], PathLike] | None
) -> list[str]:
    """The paths that the cells of a column mean.

    Raises:
        UsageError: the resolver is not a function.
        BadDataError: it fails.
    """
    if resolver is None:
        return [_path_in(cell, folder, None) for cell in cells]
    if not callable(resolver):
        raise UsageError(f"resolver must be a function from a cell to a path, not {resolver!r}")
    paths: list[str] = []
    for row, cell in enumerate(cells):
        try:
            paths.append(_path_in(cell, folder, resolver))
        except Exception as error:  # the function is the user's
            why = f"{type(error).__name__}: {error}"
            raise BadDataError(f"{table.where(row, field)}: resolver fails", why=why) from error
    return paths


def _path_in(cell: Any, folder: str, resolver: Callable[[str], PathLike] | None) -> str:
    """The path that a cell means; empty for an empty cell."""
    text = "" if cell is None else os.fspath(cell).strip()
    if not text:
        return ""
    if resolver is not None:
        text = os.fspath(resolver(text))
    if is_address(text):
        return text
    return f"{folder.rstrip('/')}/{text}" if is_address(folder) else os.path.normpath(os.path.join(folder, text))


def _picture_in(cell: Any) -> Any:
    """A picture in a cell; Parquet files of the hub hold the bytes of a file beside its name."""
    if isinstance(cell, Mapping):
        return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell


def require_columns(tables: Mapping[str, Table], inputs: str, fields: tuple[str, ...]) -> None:
    """Require the columns of the first table in all of them.

    Raises:
        BadDataError: tables lack columns; all are named.
    """
    problems = Problems()
    for part, table in tables.items():
        for name in (inputs, *(fields if part != "predict" else ())):
            if name not in table.fields:
                there = ", ".join(map(repr, table.fields[:20]))
                problems.add("missing column", f"{table.argument}: no column {name!r}; there are: {there}")
    problems.refuse(" and ".join(table.argument for table in tables.values()))


def understood(
    tables: Mapping[str, Table],
    rows: Sequence[Rows],
    inputs: str,
    fields: tuple[str, ...],
    columns: Mapping[str, str],
) -> str:
    """One line on what was read from tables."""
    counts = ", ".join(
        f"{len(one.inputs):,} rows of {os.path.basename(table.place)}"
        for one, table in zip(rows, tables.values(), strict=True)
    )
    words = {"split_field": "part", "group_field": "group", "weight_field": "weight"}
    used = [f"image {inputs!r}", *([f"target {', '.join(map(repr, fields))}"] if fields else [])]
    used += [f"{words[name]} {column!r}" for name, column in columns.items()]
    return f"{counts}; columns: {', '.join(used)}"
