"""Rows that a constructor was given, with where each of them is, and everything that can be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.data.cached_inputs import is_address
from flashtask.data.layout import part_in_name
from flashtask.data.path_advice import advice_on_paths
from flashtask.data.problems import Problems
from flashtask.data.samples import PARTS, Column, SampleTable, as_text
from flashtask.data.tables import BETWEEN, as_cell
from flashtask.data.targets import are_shares, number_or_nan

__all__ = ["TARGET_FORMATS", "Rows", "TargetFormat", "check_rows", "table_of_rows", "target_column", "with_format"]

#: What `target_format` may be; `auto` takes the only reading that is possible.
TARGET_FORMATS = ("auto", "label", "one_hot", "multi_hot", "list", "separated", "soft", "number")

_FLAGS = ("0", "1", "0.0", "1.0", "False", "True", "false", "true")
_ON = ("1", "1.0", "True", "true")
#: The parts that a model is measured on, as numbers.
_MEASURED = (PARTS.index("val"), PARTS.index("test"))


@dataclass(frozen=True)
class Rows:
    """The rows of one argument, all columns as text.

    Args:
        part: that they belong to, unless `parts` says otherwise.
        argument: that gave them: `train_file`.
        where: from a row and a column to what messages call the cell.
        inputs: (N,) paths, or names of pictures in memory.
        input_field: the column of the paths.
        targets: (N,) or (N, K); None for prediction.
        root: what names are relative to.
        groups: (N,).
        weights: (N,).
        parts: (N,), names of parts.
        fields: the columns of groups, weights and parts, by these words.
        problems: what was found before.
    """

    part: str
    argument: str
    where: Callable[[int, str], str]
    inputs: Column
    input_field: str = ""
    targets: Column | None = None
    root: str = ""
    groups: Column | None = None
    weights: Column | None = None
    parts: Column | None = None
    fields: tuple[tuple[str, str], ...] = ()
    problems: Problems | None = None

    def field(self, word: str) -> str:
        """The column of the groups, weights or parts."""
        return dict(self.fields).get(word, "")


def target_column(targets: Any, argument: str, count: int) -> Column:
    """Targets given in Python as text: (N,), or (N, K) for an array or tensor with two axes.

    Args:
        targets: a list, an array or a tensor; each target is a text, a number, or a list of these.
        argument: that gave them.
        count: how many there must be.

    Raises:
        UsageError: their number is another one, or they have more than two axes.
    """
    if hasattr(targets, "detach"):
        targets = targets.detach().cpu().numpy()
    if hasattr(targets, "__iter__") and not hasattr(targets, "__len__"):
        targets = list(targets)
    is_one = isinstance(targets, (str, bytes)) or getattr(targets, "ndim", 1) == 0 or not hasattr(targets, "__len__")
    if is_one or len(targets) != count:
        given = repr(targets) if is_one else f"{len(targets):,}"
        raise UsageError(f"{argument} must have one target for each of the {count:,} images, not {given}")
    if getattr(targets, "ndim", 1) > 2:
        raise UsageError(f"{argument} must be (N,) or (N, K), not {tuple(targets.shape)}")
    if getattr(targets, "ndim", 1) == 2:
        rows = np.asarray(targets).tolist()
        columns = len(rows[0]) if rows else 0
        texts = as_text(as_cell(value) for row in rows for value in row).reshape(-1, max(1, columns))
        return texts[:, 0] if columns == 1 else texts
    return as_text(map(as_cell, targets.tolist() if hasattr(targets, "tolist") else targets))


@dataclass(frozen=True)
class TargetFormat:
    """How the targets of all parts are written.

    Args:
        name: one of TARGET_FORMATS, other than `auto` where one reading is possible only.
        fields: the columns of the targets.
        separator: between several labels in one cell; None if there is one.
    """

    name: str
    fields: tuple[str, ...]
    separator: str | None


def with_format(
    rows: Sequence[Rows],
    fields: tuple[str, ...],
    name: str,
    separator: str | None,
    labels: Sequence[str] | None,
    *,
    kind: str,
) -> tuple[list[Rows], TargetFormat]:
    """Bring the targets of all parts to columns that readers take, and say how they were written.

    One-hot targets become the names of their columns; lists of flags or numbers become columns; numbers of classes
    become the names that `labels` has for them.

    Args:
        rows: of all parts.
        fields: the columns of the targets.
        name: one of TARGET_FORMATS.
        separator: between several labels in one cell, as the user gave it.
        labels: names of the classes, in the order of the columns or of the numbers.
        kind: `labels` or `numbers`; empty for targets of another kind, which their reader checks.

    Raises:
        UsageError: an unknown format, one that does not fit, or targets that can be read in two ways.
    """
    if name not in TARGET_FORMATS:
        fix = did_you_mean(str(name), TARGET_FORMATS) or f"one of: {', '.join(TARGET_FORMATS)}"
        raise UsageError(f"target_format cannot be {name!r}", fix=fix)
    if labels is not None:
        _check_labels(labels)
    if name == "separated" and separator is None:
        raise UsageError("target_format='separated' needs a label_separator", fix='label_separator=";"')
    known = [one for one in rows if one.targets is not None and len(one.targets)]
    are_lists = any(one.targets.ndim == 1 and any(BETWEEN in cell for cell in one.targets) for one in known)  # type: ignore[union-attr]
    if name == "auto" and are_lists:
        name = _format_of_lists(known) if kind == "labels" else "number"
    made = list(rows)
    if name in ("one_hot", "multi_hot", "soft", "number") and are_lists:
        width = max(cell.count(BETWEEN) for one in known for cell in one.targets) + 1  # type: ignore[union-attr]
        made = [replace(one, targets=_as_columns(one, width)) for one in rows]
        fields = tuple(labels) if labels is not None else tuple(f"{place}" for place in range(width))
    elif labels is not None and len(fields) > 1:
        fields = tuple(labels)
    _check_width(made, fields, labels)
    if name == "soft" and any(one.targets is not None and one.targets.ndim == 1 for one in made):
        raise UsageError("target_format='soft' needs a column with the share of each class")
    if name == "auto" and kind == "labels" and len(fields) > 1 and _hold_shares(made):
        name = "soft"
    if name == "one_hot":
        made = [replace(one, targets=_names_of_one_hot(one, fields)) for one in made]
    elif labels is not None and len(fields) == 1 and kind == "labels":
        made = [replace(one, targets=_named(one, list(labels))) for one in made]
    return made, TargetFormat(name, fields, BETWEEN if name == "list" else separator)


def _check_labels(labels: Sequence[str]) -> None:
    """Refuse names of classes that are not different texts.

    Raises:
        UsageError: naming what is wrong.
    """
    if isinstance(labels, (str, bytes)) or not all(isinstance(label, str) and label for label in labels):
        raise UsageError(f"labels must be a list of names, not {labels!r}", fix='labels=["cat", "dog"]')
    if twice := [label for label in labels if list(labels).count(label) > 1]:
        raise UsageError(
            f"labels has {twice[0]!r} twice, so two classes would be one",
            fix="labels=[...] with a name of its own for each class",
        )


def _format_of_lists(known: Sequence[Rows]) -> str:
    cells = [cell.split(BETWEEN) for one in known for cell in one.targets]  # type: ignore[union-attr]
    have_one_length = len({len(cell) for cell in cells}) == 1
    if have_one_length and are_shares(np.array(cells)):
        return "soft"
    are_flags = have_one_length and all(value in _FLAGS for cell in cells for value in cell)
    if not are_flags:
        return "list"
    if any(len(set(cell)) < len(cell) for cell in cells):
        return "multi_hot"  # no list names a label twice
    raise UsageError(
        "the targets are lists of 0 and 1, which can be the numbers of labels, or a flag for each label",
        fix='target_format="list" or target_format="multi_hot"',
    )


def _hold_shares(rows: Sequence[Rows]) -> bool:
    found = [one.targets for one in rows if one.targets is not None and len(one.targets)]
    return bool(found) and are_shares(np.concatenate(found))


def _as_columns(one: Rows, width: int) -> Column | None:
    if one.targets is None:
        return None
    rows = [(cell.split(BETWEEN) + [""] * width)[:width] for cell in one.targets]
    return as_text(cell for row in rows for cell in row).reshape(-1, width)


def _check_width(rows: Sequence[Rows], fields: tuple[str, ...], labels: Sequence[str] | None) -> None:
    for one in rows:
        if one.targets is None or one.targets.ndim == 1:
            continue
        if one.targets.shape[1] != len(fields):
            what = "labels" if labels is not None else "columns"
            raise UsageError(
                f"{one.argument} has {one.targets.shape[1]} targets for each image, and there are {len(fields)} {what}"
            )


def _names_of_one_hot(one: Rows, fields: tuple[str, ...]) -> Column | None:
    if one.targets is None:
        return None
    if one.targets.ndim == 1:
        raise UsageError(f"{one.argument}: target_format='one_hot' needs a column for each class")
    on = np.array([[cell in _ON for cell in row] for row in one.targets.tolist()])
    wrong = np.flatnonzero(on.sum(axis=1) != 1)
    if len(wrong):
        raise UsageError(
            f"{one.where(int(wrong[0]), '')}: {int(on[wrong[0]].sum())} of the columns {', '.join(fields)} hold 1",
            why=f"one-hot targets have one 1 in each row; {len(wrong):,} rows have another number",
            fix='target_format="multi_hot", if an image can have any number of labels',
        )
    return as_text(fields[place] for place in on.argmax(axis=1))


def _named(one: Rows, labels: list[str]) -> Column | None:
    """Numbers of classes as the names of these classes; names stay."""
    if one.targets is None:
        return None

    def name(text: str, row: int) -> str:
        if not text.isascii() or not text.isdigit() or text in labels:
            return text
        if int(text) >= len(labels):
            raise UsageError(f"{one.where(row, '')}: class {text}, but labels has {len(labels)} names")
        return labels[int(text)]

    return as_text(
        BETWEEN.join(name(part, row) for part in cell.split(BETWEEN)) for row, cell in enumerate(one.targets)
    )


def table_of_rows(rows: Sequence[Rows], problems: Problems) -> SampleTable:
    """The samples of all rows; what is wrong with their weights and parts is added to the problems."""
    tables = []
    for one in rows:
        weights = None if one.weights is None else _weights_in(one, problems)
        groups = one.groups
        made = SampleTable.of_part(one.part, one.inputs, one.targets, groups=groups, root=one.root, weights=weights)
        for name in () if one.parts is None else sorted(set(one.parts.tolist())):
            chosen = np.flatnonzero(one.parts == name)
            if (meant := part_in_name(name)) is None:
                field = one.field("parts")
                what = f"column {field!r} has {name!r}, which is not a part of the data"
                problems.add("unknown part", f"{one.where(int(chosen[0]), '')}: {what}", fix="train, val or test")
            else:
                made = made.with_part(chosen, meant)
        tables.append(made)
    return SampleTable.joined(tables)


def _weights_in(one: Rows, problems: Problems) -> Column:
    assert one.weights is not None
    weights = np.array([number_or_nan(cell) for cell in one.weights], dtype=np.float32)
    field = one.field("weights")
    for row in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0))):
        text = str(one.weights[row])
        problems.add("bad weight", f"{one.where(int(row), field)}: {text!r}", fix="a weight is a number of 0 or more")
    return weights


def check_rows(
    rows: Sequence[Rows],
    table: SampleTable,
    targets: TargetFormat,
    problems: Problems,
    *,
    kind: str,
    are_files: bool,
    may_be_missing: bool,
) -> None:
    """Look for empty cells, paths that lead nowhere, duplicates that contradict each other, and bad targets.

    Args:
        rows: of all parts.
        table: the samples that `table_of_rows` made of them.
        targets: how they are written.
        problems: what is found is added to it.
        kind: `labels` or `numbers`; empty for targets of another kind, which their reader checks.
        are_files: whether inputs are paths.
        may_be_missing: whether files that are not there are left out later.
    """
    names, counts = np.unique(table.inputs, return_counts=True)
    repeated: set[str] = set(names[counts > 1].tolist()) if are_files else set()
    seen: dict[str, tuple[Any, Callable[[int, str], str], int]] = {}
    for one in rows:
        missing: list[str] = []
        for row, path in enumerate(one.inputs):
            if not path:
                problems.add("empty cell", f"{one.where(row, one.input_field)} is empty")
            elif are_files and not may_be_missing and not is_address(path) and not os.path.exists(path):
                place = f"{one.where(row, one.input_field)}: the file does not exist: {_shortened(path)!r}"
                problems.add("missing image", place)
                missing.append(str(path))
        if missing and one.input_field:
            problems.advise("missing image", _advice_on_missing(one, missing, targets))
        if one.targets is None:
            continue
        for row, what in _bad_targets(one, targets, kind):
            problems.add(*what, fix=_TARGET_FIXES.get(what[0], "") if row >= 0 else _other_separator(one))
        if repeated:
            _find_contradictions(one, repeated, seen, problems)
    if kind == "labels":
        _find_new_labels(rows, table, targets, problems)


def _advice_on_missing(one: Rows, missing: Sequence[str], targets: TargetFormat) -> str:
    """What to do about inputs that do not exist; if none does but the targets do, the columns were exchanged."""
    if len(missing) < len(one.inputs):
        return 'correct these paths, or leave the images out with on_bad_image="skip"'
    if one.targets is not None and one.targets.ndim == 1 and targets.fields:
        named = [os.path.join(one.root, str(cell)) for cell in one.targets[:2]]
        if all(map(os.path.isfile, named)):
            return f'input_field="{targets.fields[0]}", target_fields="{one.input_field}"'
    return advice_on_paths(missing, one.root, one.input_field)


_TARGET_FIXES = {
    "empty cell": "fill the cells, or remove the rows",
    "NaN target": "write a target into the cells, or remove the rows",
    "target that is not a number": "correct the cells, or choose another column: target_fields=...",
}


def _other_separator(one: Rows) -> str:
    """The separator that occurs in the cells; without any, a cell holds one label."""
    assert one.targets is not None
    found = next((sign for sign in "|;,/ " if any(sign in cell for cell in one.targets.ravel().tolist())), None)
    return f'label_separator="{found}"' if found else "leave out label_separator: each cell holds one label"


def _bad_targets(one: Rows, targets: TargetFormat, kind: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """The row, the kind and the place of each target that cannot be read; row -1 is about all."""
    assert one.targets is not None
    columns = one.targets if one.targets.ndim == 2 else one.targets[:, None]
    fields = targets.fields if len(targets.fields) == columns.shape[1] else ("",) * columns.shape[1]
    may_be_empty = kind == "labels" and (targets.separator is not None or columns.shape[1] > 1)
    for place, field in enumerate(fields if kind else ()):
        for row, text in enumerate(columns[:, place]):
            if not text and not may_be_empty:
                yield row, ("empty cell", f"{one.where(row, field)} is empty: the sample has no target")
            elif text.lower() == "nan":
                yield row, ("NaN target", f"{one.where(row, field)}: {text!r}")
            elif kind == "numbers" and text and not np.isfinite(number_or_nan(text)):
                yield row, ("target that is not a number", f"{one.where(row, field)}: {text!r} is not a number")
    separator = targets.separator
    if separator not in (None, BETWEEN) and one.part == "train" and not any(separator in cell for cell in one.targets):
        what = f"{one.argument}: label_separator={separator!r} occurs in none of {len(one.targets):,} rows"
        yield -1, ("separator that never occurs", what)


def _find_contradictions(
    one: Rows, repeated: set[str], seen: dict[str, tuple[Any, Callable[[int, str], str], int]], problems: Problems
) -> None:
    assert one.targets is not None
    for row, (path, target) in enumerate(zip(one.inputs, one.targets.tolist(), strict=True)):
        if path not in repeated:
            continue
        known, where, first = seen.setdefault(path, (target, one.where, row))
        if known != target:
            place = f"{one.where(row, one.input_field)}: {os.path.basename(path)!r} has the target {_shown(target)}"
            problems.add("duplicate with another target", f"{place}, and {_shown(known)} in {where(first, '')}")


def _find_new_labels(rows: Sequence[Rows], table: SampleTable, targets: TargetFormat, problems: Problems) -> None:
    """Labels that no training sample has: each is named where it occurs first."""
    if table.targets is None or table.targets.ndim == 2 or not table.has("train"):
        return

    def names(cell: str) -> list[str]:
        return [name.strip() for name in cell.split(targets.separator)] if targets.separator else [cell]

    trained = table.targets[table.parts == PARTS.index("train")]
    known = {name for cell in set(trained.tolist()) for name in names(cell)}
    field, start = targets.fields[0] if len(targets.fields) == 1 else "", 0
    for one in rows:
        parts = table.parts[start : start + len(one.inputs)]
        start += len(one.inputs)
        found: set[str] = set()
        targets_of_one = one.targets
        if targets_of_one is None:
            continue
        for row in np.flatnonzero(np.isin(parts, _MEASURED)).tolist():
            for name in names(str(targets_of_one[row])):
                if name and name not in known and name not in found:
                    found.add(name)
                    what = f"{one.where(row, field)}: {name!r} is in {PARTS[parts[row]]} only, not in train"
                    problems.add("new label", what, fix=did_you_mean(name, known))


def _shortened(path: str) -> str:
    """A path that fits in a message; the longest that a file can have is 4,096 characters."""
    return path if len(path) <= 4096 else f"{path[:100]}...{path[-100:]}"


def _shown(target: Any) -> str:
    return repr(target.replace(BETWEEN, ", ") if isinstance(target, str) else target)
