"""Pictures that are in a data set more than once, also as files of another format, size or quality."""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashtask.core.errors import FlashtaskError
from flashtask.data.fingerprint import Fingerprint, are_alike, near_pairs, thumbnail
from flashtask.data.images import bounds_of_file, load_image, load_scaled
from flashtask.data.samples import Column, SampleTable
from flashtask.data.threads import in_threads

__all__ = ["Copies", "find_copies", "warnings_of_copies"]


@dataclass(frozen=True)
class Copies:
    """Which samples show the same picture.

    Args:
        groups: rows of samples, the first of each group the lowest.
        how: for each group, in words, how its members differ.
    """

    groups: list[list[int]] = field(default_factory=list)
    how: list[str] = field(default_factory=list)


def find_copies(
    paths: Sequence[str],
    prints: Sequence[Fingerprint | None],
    concerns: Callable[[int, int], bool] = lambda one, other: True,
) -> Copies:
    """Find pictures that are there more than once, also as files of another format, size or quality.

    Candidates are found by their hashes, and decoded once more to compare them. Of blank pictures, which all look
    alike, only equal files count.

    Args:
        paths: of files.
        prints: theirs; files without one are left out.
        concerns: which pairs of rows matter.
    """
    rows = [row for row, one in enumerate(prints) if one is not None and not one.is_blank]
    near = near_pairs([one.hash for row in rows if (one := prints[row]) is not None])
    pairs = [(rows[one], rows[other]) for one, other in near.tolist() if concerns(rows[one], rows[other])]
    wanted = sorted({row for pair in pairs for row in pair if paths[pair[0]] != paths[pair[1]]})
    small = dict(zip(wanted, in_threads(lambda row: _thumbnail(paths[row]), wanted), strict=True))
    same = [
        (one, other)
        for one, other in pairs
        if paths[one] == paths[other] or _both_alike(small.get(one), small.get(other))
    ]
    same += [pair for pair in _equal_blanks(paths, prints) if concerns(*pair)]
    groups = _joined(same)
    return Copies(groups, [_difference([paths[row] for row in group]) for group in groups])


def _thumbnail(path: str) -> Any:
    """None of a file that cannot be read any more."""
    try:
        bounds = bounds_of_file(path)
        range_of_values = "format" if bounds is None or bounds[0] == bounds[1] else bounds
        picture, _ = load_scaled(path, 1, lambda whole: (64, 64), value_range=range_of_values)
    except FlashtaskError:
        return None
    return thumbnail(picture)


def _both_alike(one: Any, other: Any) -> bool:
    return one is not None and other is not None and are_alike(one, other)


def _equal_blanks(paths: Sequence[str], prints: Sequence[Fingerprint | None]) -> Iterator[tuple[int, int]]:
    firsts: dict[Fingerprint, list[int]] = defaultdict(list)
    for row, one in enumerate(prints):
        if one is None or not one.is_blank:
            continue
        for first in firsts[one]:
            if _are_equal(paths[first], paths[row]):
                yield first, row
                break
        else:
            firsts[one].append(row)


def _are_equal(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _joined(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The groups that pairs make, in the order of their first members."""
    above: dict[int, int] = {}

    def root(row: int) -> int:
        while (higher := above.setdefault(row, row)) != row:
            above[row] = above[higher]
            row = higher
        return row

    for one, other in pairs:
        first, second = sorted((root(one), root(other)))
        above[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for row in sorted(above):
        groups[root(row)].append(row)
    return list(groups.values())


def _difference(paths: Sequence[str]) -> str:
    first, others = paths[0], [path for path in paths if path != paths[0]]
    if not others:
        return "the same file"
    if all(_are_equal(first, path) for path in others):
        return "files with the same content"
    try:
        pixels = np.asarray(load_image(first, value_range="format"))
        is_equal = all(np.array_equal(pixels, np.asarray(load_image(path, value_range="format"))) for path in others)
    except FlashtaskError:
        is_equal = False
    return "the same pixels in different files" if is_equal else "a copy of another size, quality or brightness"


def warnings_of_copies(
    table: SampleTable,
    fingerprints: Mapping[str, Fingerprint],
    values: Column | None,
    known: Iterable[tuple[str, str]],
) -> Iterator[str]:
    """What a run says before it begins: pictures in two parts, and pictures with two targets.

    Args:
        table: of the parts that the run uses.
        fingerprints: of its inputs.
        values: as in `audit_table`.
        known: pairs of files that were reported already.
    """
    paths, parts = table.inputs.tolist(), table.parts.tolist()
    targets = [b""] * len(paths) if values is None else [value.tobytes() for value in values]

    def concerns(one: int, other: int) -> bool:
        return parts[one] != parts[other] or targets[one] != targets[other]

    copies = find_copies(paths, [fingerprints.get(path) for path in paths], concerns)
    reported = {frozenset(pair) for pair in known}
    across = [group for group in copies.groups if len({parts[row] for row in group}) > 1]
    across = [group for group in across if not any({paths[row] for row in group} >= pair for pair in reported)]
    twice = [group for group in copies.groups if len({targets[row] for row in group}) > 1]
    for groups, what in ((across, "are in two parts as different files"), (twice, "have two different targets")):
        if groups:
            shown = "; ".join(f"{paths[one]!r} and {paths[other]!r}" for one, other, *_ in groups[:3])
            yield f"warning: {len(groups)} picture(s) {what}: {shown}; `flashtask audit` lists all"
