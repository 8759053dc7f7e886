"""Groups of images that belong together: read from names, and suspected where nobody gave them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from flashtask.core.errors import UsageError

__all__ = ["compiled_pattern", "groups_of_names", "suspected_groups"]

#: What names such as `patient12_03.png` have before their last number, if that has a number itself.
_NUMBERED = r"(.*\d)\D+\d+\.\w+$"
#: Seconds between two files of one burst, and bursts that are needed to speak of them.
_PAUSE, _LEAST_BURSTS, _MOST_IN_BURST = 60.0, 10, 50
#: Files whose times are looked at.
_MOST_FILES = 100_000


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of `group_pattern`.

    Raises:
        UsageError: it is not one, or has no group.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(f"group_pattern={pattern!r} is not a regular expression", why=str(error)) from None
    if not compiled.groups:
        raise UsageError(
            f"group_pattern={pattern!r} has no group", fix="put the part that names the group in parentheses"
        )
    return compiled


def groups_of_names(names: Sequence[str], pattern: str) -> list[str]:
    """The group that each name tells; a name that does not match is a group of its own.

    Args:
        names: relative paths with forward slashes.
        pattern: a regular expression, searched in each; its first group is the group.

    Raises:
        UsageError: it matches none.
    """
    compiled = compiled_pattern(pattern)
    found = [compiled.search(name) for name in names]
    if names and not any(found):
        raise UsageError(
            f"group_pattern={pattern!r} matches none of {len(names):,} names, such as {names[0]!r}",
            why="it is searched in each path relative to the folder of its part",
        )
    return [name if match is None else match[1] or "" for match, name in zip(found, names, strict=True)]


def suspected_groups(
    names: Sequence[str], files: Sequence[str], val: Collection[int], num_classes: int, *, skips_folder: bool
) -> str:
    """A warning if the split separates images that seem to belong together; empty if nothing suggests it.

    Args:
        names: relative paths of the samples that were split.
        files: their paths; empty for what is not a file here.
        val: the samples that validate.
        num_classes: with no more groups than classes, a group is likely to be a class.
        skips_folder: the first folder of each name is its class.
    """
    chosen = set(val)
    below = [name.partition("/")[2] if skips_folder else name for name in names]
    found = [re.search(_NUMBERED, name) for name in below]
    stems = ["" if match is None else match[1] for match in found]
    if example := _separated(stems, chosen, num_classes):
        one, other, count, groups = example
        return (
            f"warning: names suggest {groups:,} groups of images that the split separates, such as {names[one]!r} and "
            f"{names[other]!r} ({count:,} of {len(names):,} images): "
            f"group_pattern={_NUMBERED!r} keeps them together, group_pattern='' accepts the split"
        )
    if len(files) > _MOST_FILES:
        return ""
    bursts = _bursts([file for file in files if file])
    marks = [bursts.get(file, "") for file in files]
    if example := _separated(marks, chosen, max(num_classes, _LEAST_BURSTS - 1)):
        one, other, count, groups = example
        return (
            f"warning: times of files suggest {groups:,} series of images that the split separates, such as "
            f"{names[one]!r} and {names[other]!r}, which were written within a minute ({count:,} of {len(names):,} "
            "images): group_pattern or group_field keeps them together, group_pattern='' accepts the split"
        )
    return ""


def _separated(groups: Sequence[str], val: Collection[int], least: int) -> tuple[int, int, int, int] | None:
    """Two samples of a group on different sides, how many samples are in groups, and how many groups there are.

    None unless more than `least` groups hold at least half of all samples, in twos or more.
    """
    sizes = Counter(group for group in groups if group)
    several = {group for group, size in sizes.items() if size > 1}
    count = sum(sizes[group] for group in several)
    if len(several) <= least or 2 * count < len(groups):
        return None
    trains: dict[str, int] = {}
    for row, group in enumerate(groups):
        if group in several and row not in val:
            trains.setdefault(group, row)
    for row in sorted(val):
        if groups[row] in trains:
            return row, trains[groups[row]], count, len(several)
    return None


def _bursts(files: Sequence[str]) -> dict[str, str]:
    """The burst of each file that was written in one: by time of modification, with pauses between them."""
    times = []
    for file in files:
        try:
            times.append(os.stat(file).st_mtime)
        except OSError:
            return {}
    order = np.argsort(times, kind="stable")
    breaks = np.flatnonzero(np.diff(np.asarray(times)[order]) > _PAUSE) + 1
    parts = np.split(order, breaks) if len(order) else []
    return {files[row]: f"{number}" for number, part in enumerate(parts) if len(part) <= _MOST_IN_BURST for row in part}
