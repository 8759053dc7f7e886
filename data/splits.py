"""Validation splits and folds that depend on the seed and the files' names alone.

Each sample draws a number from (seed, its name), and each class gives the samples with the smallest numbers
to validation. So the order of the listing, the machine and the run's own seed have no say, and a file that is
added later moves only few of the others.

Whole groups are shared out one after the other, the largest first, each to the side that is then least full of the
classes in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import derive_seed

__all__ = [
    "ALWAYS_TRAINS",
    "Fold",
    "check_share",
    "grouped_folds",
    "grouped_split",
    "read_fold",
    "stratified_folds",
    "stratified_split",
]

#: A fold as the user gives it: `(2, 5)` or `"2/5"`.
Fold = str | Sequence[int]
#: The fold of a sample that no fold validates, since training needs it in all of them.
ALWAYS_TRAINS = -1

Places = np.ndarray[Any, np.dtype[np.int64]]


def check_share(share: float | int) -> None:
    """Refuse what is neither a share in (0, 1) nor a number of images; 0 splits none off.

    Raises:
        UsageError: it is neither.
    """
    is_share = isinstance(share, float) and 0 < share < 1
    is_count = is_whole(share, 0)
    if not (is_share or is_count):
        raise UsageError(
            f"val_split must be a share between 0 and 1 or a number of images, not {share!r}",
            fix="val_split=0.2",
        )


def read_fold(fold: Fold) -> tuple[int, int]:
    """Which fold of how many, both counted from 1.

    Args:
        fold: `"2/5"` or `(2, 5)`.

    Raises:
        UsageError: something else, or there is no such fold.
    """
    parts: Any = fold
    if isinstance(fold, str):
        found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", fold)
        parts = () if found is None else tuple(map(int, found.groups()))
    is_pair = isinstance(parts, (tuple, list)) and len(parts) == 2 and all(is_whole(part) for part in parts)
    if not is_pair or not 1 <= parts[0] <= parts[1] or parts[1] < 2:
        raise UsageError(f"fold must be the second of five as 2/5 or (2, 5), not {fold!r}", fix='fold="1/5"')
    return parts[0], parts[1]


def stratified_split(
    names: Sequence[str], classes: Sequence[str], share: float | int, seed: int = 0, *, each: bool = True
) -> tuple[list[int], list[int]]:
    """Split samples into training and validation, each class in the same proportion.

    Args:
        names: one unique name a sample, such as its relative path.
        classes: the class of each sample.
        share: the validation part: a share in (0, 1), or a number of samples.
        seed: the split's own seed.
        each: a class of two or more samples has at least one in validation, which wins over the share.

    Returns:
        Indices of the training and of the validation samples, both ascending. Each class has at least one training
        sample.

    Raises:
        UsageError: the share is no share, or no split can have that number of samples.
        BadDataError: no class has two samples.
    """
    check_share(share)
    members = _members(classes)
    counts = _counts({name: len(rows) for name, rows in members.items()}, share, each=each)
    chosen: set[int] = set()
    for name, count in counts.items():
        chosen.update(_ranked(members[name], names, seed)[:count])
    return [i for i in range(len(classes)) if i not in chosen], sorted(chosen)


def stratified_folds(names: Sequence[str], classes: Sequence[str], count: int, seed: int = 0) -> Places:
    """Share samples out over folds, each class in equal parts.

    Args:
        names: one unique name a sample.
        classes: the class of each sample.
        count: of the folds, at least 2.
        seed: the split's own seed.

    Returns:
        The fold that validates each sample, counted from 0: (N,). A class of one sample has `ALWAYS_TRAINS`.

    Raises:
        BadDataError: no class has two samples, or there are fewer samples than folds.
    """
    folds = np.full(len(names), ALWAYS_TRAINS, dtype=np.int64)
    for name, rows in _members(classes).items():
        if len(rows) > 1:
            # Classes that do not divide evenly begin with different folds, so no fold gets the rest of all.
            first = derive_seed("fold", seed, name) % count
            folds[_ranked(rows, names, seed)] = (np.arange(len(rows)) * count // len(rows) + first) % count
    return _checked(folds, count, "no class has two images")


def grouped_split(
    groups: Sequence[str],
    share: float | int,
    seed: int = 0,
    classes: Sequence[Sequence[str]] | None = None,
    *,
    keep: bool = True,
) -> list[int]:
    """Choose validation samples by whole groups, with about the same share of each class.

    Args:
        groups: the group of each sample.
        share: the validation part: a share in (0, 1), or a number of samples.
        seed: the split's own seed.
        classes: those of each sample; None if there are none.
        keep: each class needs a training sample, so a group that has all samples of one trains.

    Returns:
        Indices of the validation samples, ascending. At least one group is on either side.

    Raises:
        UsageError: the share is not a share, or is more than there is.
        BadDataError: no group can validate.
    """
    check_share(share)
    part = share / len(groups) if isinstance(share, int) else share
    if part >= 1:
        raise UsageError(f"val_split={share} leaves none of {len(groups)} images to train on", fix="val_split=0.2")
    table = _GroupTable(groups, classes, seed)
    sides = table.shared_out([1 - part, part], keep=keep, spare=0)
    if not (sides == 1).any():
        movable = [group for group in table.order if sides[group] == 0 and not (keep and group in table.with_own_class)]
        if not movable:
            raise BadDataError("val_split: every group has all images of a class, so none can validate")
        sides[movable[-1]] = 1
    return np.flatnonzero(sides[table.group] == 1).tolist()


def grouped_folds(
    groups: Sequence[str],
    count: int,
    seed: int = 0,
    classes: Sequence[Sequence[str]] | None = None,
    *,
    keep: bool = True,
) -> Places:
    """Share samples out over folds by whole groups, with about the same share of each class.

    Args:
        groups: the group of each sample.
        count: of the folds, at least 2.
        seed: the split's own seed.
        classes: those of each sample; None if there are none.
        keep: each class needs a training sample, so a group that has all samples of one has `ALWAYS_TRAINS`.

    Returns:
        The fold that validates each sample, counted from 0: (N,).

    Raises:
        BadDataError: there are fewer groups than folds.
    """
    table = _GroupTable(groups, classes, seed)
    folds = table.shared_out([1 / count] * count, keep=keep, spare=None)[table.group]
    return _checked(folds, count, "every group has all images of a class")


class _GroupTable:
    """How many samples of each class every group has.

    Args:
        groups: the group of each sample.
        classes: those of each sample.
        seed: of the order of groups of one size.
    """

    def __init__(self, groups: Sequence[str], classes: Sequence[Sequence[str]] | None, seed: int) -> None:
        names = sorted(set(groups))
        if len(names) < 2:
            raise BadDataError("val_split: all samples are of one group, so none can be split", fix="val_file=...")
        place = {name: index for index, name in enumerate(names)}
        known = sorted({name for own in classes or () for name in own})
        column = {name: index for index, name in enumerate(known)}
        self.group = np.array([place[name] for name in groups], dtype=np.int64)
        pairs = [(self.group[row], column[name]) for row, own in enumerate(classes or ()) for name in set(own)]
        # The last column has all samples, so that sides become equally full where classes do not decide.
        self.counts = np.zeros((len(names), len(known) + 1))
        if pairs:
            np.add.at(self.counts, tuple(np.array(pairs).T), 1)
        self.counts[:, -1] = np.bincount(self.group)
        self.has = self.counts[:, :-1] > 0
        own = self.has[:, self.has.sum(axis=0) == 1]
        #: Groups that have all samples of a class.
        self.with_own_class = np.flatnonzero(own.sum(axis=1)).tolist()
        drawn = [derive_seed("split", seed, name) for name in names]
        self.order = sorted(range(len(names)), key=lambda group: (-self.counts[group, -1], drawn[group], names[group]))

    def shared_out(self, shares: Sequence[float], *, keep: bool, spare: int | None) -> Places:
        """The side of each group.

        Args:
            shares: of the samples, by side.
            keep: no side takes all groups of a class; those that have one alone go to the spare side.
            spare: the side that trains and may have everything; with None such groups have `ALWAYS_TRAINS`.
        """
        sides = np.full(len(self.counts), ALWAYS_TRAINS if spare is None else spare, dtype=np.int64)
        fixed = np.zeros(len(sides), dtype=bool)
        fixed[self.with_own_class if keep else []] = True
        free = np.ones(len(sides), dtype=bool) if spare is not None else ~fixed
        room = np.maximum(np.outer(shares, self.counts[free].sum(axis=0)), 1e-9)
        filled = np.zeros_like(room)
        taken = np.zeros((len(shares), self.has.shape[1]), dtype=np.int64)  # groups with a class, by side
        if spare is not None:
            filled[spare] = self.counts[fixed].sum(axis=0)
        is_safe = self.has[fixed].any(axis=0)  # classes that train in any case
        left = self.has[~fixed].sum(axis=0)
        for group in self.order:
            if fixed[group]:
                continue
            own, has = self.counts[group], self.has[group]
            left = left - has
            fullness = ((filled + own) / room) @ (own / own.sum())
            is_last = has & (left == 0) & ~is_safe
            takes_all = (taken[:, is_last] == taken[:, is_last].sum(axis=0)).any(axis=1)
            if keep:
                fullness[[side for side in np.flatnonzero(takes_all) if side != spare]] = np.inf
            if np.isfinite(fullness).any():
                sides[group] = side = int(np.argmin(fullness))
                filled[side] += own
                taken[side] += has
            else:
                is_safe |= has
        return sides


def _members(classes: Sequence[str]) -> dict[str, list[int]]:
    """The samples of each class, classes sorted by name."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        members[name].append(index)
    return {name: members[name] for name in sorted(members)}


def _ranked(rows: Sequence[int], names: Sequence[str], seed: int) -> list[int]:
    """Samples in the order of the numbers that they draw."""
    return sorted(rows, key=lambda row: (derive_seed("split", seed, names[row]), names[row]))


def _checked(folds: Places, count: int, why: str) -> Places:
    validated = int((folds != ALWAYS_TRAINS).sum())
    if not validated:
        raise BadDataError("fold: none of the images can validate", why=why)
    if len(np.unique(folds[folds != ALWAYS_TRAINS])) < count:
        raise BadDataError(f"fold: {validated:,} images that can validate do not fill {count} folds", fix='fold="1/2"')
    return folds


def _counts(sizes: dict[str, int], share: float | int, *, each: bool) -> dict[str, int]:
    """How many samples of each class go to validation: largest remainders within 1..size-1, or 0..size-1."""
    total = sum(sizes.values())
    splittable = {name: size for name, size in sizes.items() if size >= 2}
    if not splittable:
        raise BadDataError(
            "val_split: no class has two images, so none can be split",
            fix="val_split=0 to train without validation; if labels are not meant to be unique, choose other targets",
        )
    least, most = len(splittable) if each else 1, sum(splittable.values()) - len(splittable)
    target = share if isinstance(share, int) else min(max(round(share * total), least), most)
    if not least <= target <= most:
        raise UsageError(
            f"val_split={share} is impossible with these {total} images in {len(sizes)} classes",
            why=f"each class keeps one image on either side, so from {least} to {most} images can validate",
            fix=f"val_split={min(max(target, least), most)}",
        )
    quotas = {name: target * size / sum(splittable.values()) for name, size in splittable.items()}
    counts = {name: min(max(int(quotas[name]), int(each)), size - 1) for name, size in splittable.items()}
    while sum(counts.values()) < target:
        open_classes = [name for name in counts if counts[name] < sizes[name] - 1]
        counts[max(open_classes, key=lambda name: quotas[name] - counts[name])] += 1
    while sum(counts.values()) > target:
        open_classes = [name for name in counts if counts[name] > int(each)]
        counts[min(open_classes, key=lambda name: quotas[name] - counts[name])] -= 1
    return counts
