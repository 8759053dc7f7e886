"""Which training samples validate: `val_split` or `fold`, by classes and groups, with what is worth saying of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashtask.data.groups import suspected_groups
from flashtask.data.samples import PARTS, SampleTable
from flashtask.data.splits import grouped_folds, grouped_split, read_fold, stratified_folds, stratified_split
from flashtask.data.targets import TargetReader

__all__ = ["Split", "split_off_validation"]

#: Classes that a line names at the most.
_SHOWN = 5


class Split(NamedTuple):
    """A table of which some training samples validate now.

    Args:
        table: all samples.
        manifest: the names of those that validate.
        remarks: classes that are not validated, and groups that were not given.
    """

    table: SampleTable
    manifest: tuple[str, ...]
    remarks: list[str]


def split_off_validation(
    table: SampleTable, reader: TargetReader, arguments: Mapping[str, Any], *, is_of_folders: bool
) -> Split:
    """Let some of the training samples validate.

    Args:
        table: with training samples, and none to validate on.
        reader: of the targets, which says what a split should keep even.
        arguments: `val_split` or `fold`, `split_seed` and `group_pattern`.
        is_of_folders: the folders of the files are the classes, which suggest no groups.
    """
    rows = np.flatnonzero(table.parts == PARTS.index("train"))
    whole = table.at(rows)
    strata: Sequence[str] = [""] * len(rows)
    classes = None
    if whole.targets is not None:
        strata, classes = reader.strata(whole.targets), reader.classes(whole.targets)
    val = _validating(whole, reader, strata, classes, arguments)
    names = whole.names()
    remarks = [] if classes is None else [_not_validated(classes, val)]
    if whole.groups is None and arguments.get("group_pattern") is None:
        files = [path if os.path.isabs(path) else "" for path in whole.inputs.tolist()]
        count = len({name for own in classes or () for name in own})
        remarks.append(suspected_groups(names, files, val, count, skips_folder=is_of_folders))
    return Split(table.with_part(rows[val], "val"), tuple(names[i] for i in val), list(filter(None, remarks)))


def _validating(
    whole: SampleTable,
    reader: TargetReader,
    strata: Sequence[str],
    classes: list[tuple[str, ...]] | None,
    arguments: Mapping[str, Any],
) -> list[int]:
    """The positions of the samples that validate."""
    share, seed, names = arguments["val_split"], arguments["split_seed"], whole.names()
    fold, count = (0, 0) if share is not None else read_fold(arguments["fold"])
    if whole.groups is not None:
        groups, keep = whole.groups.tolist(), classes is not None
        own = classes if classes is not None else [(name,) for name in strata]
        if share is not None:
            return grouped_split(groups, share, seed, own, keep=keep)
        return np.flatnonzero(grouped_folds(groups, count, seed, own, keep=keep) == fold - 1).tolist()
    if share is not None:
        _, val = stratified_split(names, strata, share, seed, each=reader.validates_each)
    else:
        val = np.flatnonzero(stratified_folds(names, strata, count, seed) == fold - 1).tolist()
    return val if classes is None else _without_whole_classes(val, classes)


def _without_whole_classes(val: Sequence[int], classes: Sequence[Sequence[str]]) -> list[int]:
    """The samples that validate, without the first of each class that would have none to train on."""
    trains = Counter(name for own in classes for name in own)
    trains.subtract(name for row in val for name in classes[row])
    kept = []
    for row in val:
        if any(not trains[name] for name in classes[row]):
            trains.update(classes[row])
        else:
            kept.append(row)
    return kept


def _not_validated(classes: Sequence[Sequence[str]], val: Sequence[int]) -> str:
    """One line on the classes that have training images only; empty if there are none."""
    validates = {name for row in val for name in classes[row]}
    sizes = Counter(name for own in classes for name in own)
    missing = sorted((size, name) for name, size in sizes.items() if name not in validates)
    if not missing:
        return ""
    shown = ", ".join(f"{name!r} ({size:,} image{'s' if size > 1 else ''})" for size, name in missing[:_SHOWN])
    more = ", ..." if len(missing) > _SHOWN else ""
    return f"{len(missing)} of {len(sizes)} classes are not validated, as all of their images train: {shown}{more}"
