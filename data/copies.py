"""Pictures that are in a data set more than once, also as files of another format, size or quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashtask.core.errors import FlashtaskError
from flashtask.data.decoding import Decoding
from flashtask.data.fingerprint import Fingerprint, are_alike, near_pairs, thumbnail
from flashtask.data.image_source import FILES, ImageSource
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
    images: ImageSource = FILES,
) -> Copies:
    """Find pictures that are there more than once, also as files of another format, size or quality.

    Candidates are found by their hashes, and decoded once more to compare them. Of blank pictures, which all look
    alike, only equal files count.

    Args:
        paths: of files, or the names that `images` has for pictures.
        prints: theirs; pictures without one are left out.
        concerns: which pairs of rows matter.
        images: where the pictures are read.
    """
    rows = [row for row, one in enumerate(prints) if one is not None and not one.is_blank]
    near = near_pairs([one.hash for row in rows if (one := prints[row]) is not None])
    pairs = [(rows[one], rows[other]) for one, other in near.tolist() if concerns(rows[one], rows[other])]
    wanted = sorted({row for pair in pairs for row in pair if paths[pair[0]] != paths[pair[1]]})
    small = dict(zip(wanted, in_threads(lambda row: _thumbnail(images, paths[row]), wanted), strict=True))
    same = [
        (one, other)
        for one, other in pairs
        if paths[one] == paths[other] or _both_alike(small.get(one), small.get(other))
    ]
    same += [pair for pair in _equal_blanks(paths, prints, images) if concerns(*pair)]
    groups = _joined(same)
    return Copies(groups, [_difference([paths[row] for row in group], images) for group in groups])


def _thumbnail(images: ImageSource, path: str) -> Any:
    """None of a picture that cannot be read any more."""
    try:
        return thumbnail(images.input(path).thumbnail(64, channels=1))
    except FlashtaskError:
        return None


def _both_alike(one: Any, other: Any) -> bool:
    return one is not None and other is not None and are_alike(one, other)


def _equal_blanks(
    paths: Sequence[str], prints: Sequence[Fingerprint | None], images: ImageSource
) -> Iterator[tuple[int, int]]:
    firsts: dict[Fingerprint, list[int]] = defaultdict(list)
    for row, one in enumerate(prints):
        if one is None or not one.is_blank:
            continue
        for first in firsts[one]:
            if _are_equal([paths[first], paths[row]], images):
                yield first, row
                break
        else:
            firsts[one].append(row)


def _are_equal(paths: Sequence[str], images: ImageSource) -> bool:
    """Whether pictures have the same content to the bit."""
    try:
        sizes = images.sizes(paths)
        return all(path in sizes for path in paths) and len({*sizes.values()}) == len({*images.hashes(paths)}) == 1
    except (FlashtaskError, OSError):
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


def _difference(paths: Sequence[str], images: ImageSource) -> str:
    first, others = paths[0], [path for path in paths if path != paths[0]]
    if not others:
        return "the same file"
    if _are_equal(paths, images):
        return "files with the same content"
    try:
        decoding = Decoding(3, value_range="format")
        pixels = images.input(first).read(decoding)
        is_equal = all(np.array_equal(pixels, images.input(path).read(decoding)) for path in others)
    except FlashtaskError:
        is_equal = False
    return "the same pixels in different files" if is_equal else "a copy of another size, quality or brightness"


def warnings_of_copies(
    table: SampleTable,
    fingerprints: Mapping[str, Fingerprint],
    values: Column | None,
    known: Iterable[tuple[str, str]],
    images: ImageSource,
) -> Iterator[str]:
    """What a run says before it begins: pictures in two parts, and pictures with two targets.

    Args:
        table: of the parts that the run uses.
        fingerprints: of its inputs.
        values: as in `audit_table`.
        known: pairs of files that were reported already.
        images: where the pictures are read.
    """
    paths, parts = table.inputs.tolist(), table.parts.tolist()
    targets = [b""] * len(paths) if values is None else [value.tobytes() for value in values]

    def concerns(one: int, other: int) -> bool:
        return parts[one] != parts[other] or targets[one] != targets[other]

    copies = find_copies(paths, [fingerprints.get(path) for path in paths], concerns, images)
    reported = {frozenset(pair) for pair in known}
    across = [group for group in copies.groups if len({parts[row] for row in group}) > 1]
    across = [group for group in across if not any({paths[row] for row in group} >= pair for pair in reported)]
    twice = [group for group in copies.groups if len({targets[row] for row in group}) > 1]
    for groups, what in ((across, "are in two parts as different files"), (twice, "have two different targets")):
        if groups:
            shown = "; ".join(f"{paths[one]!r} and {paths[other]!r}" for one, other, *_ in groups[:3])
            yield f"warning: {len(groups)} picture(s) {what}: {shown}; `flashtask audit` lists all"
