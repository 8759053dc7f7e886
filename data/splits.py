"""Stratified validation splits that depend on the seed and the files' names alone.

Each sample draws a number from (seed, its name), and each class gives the samples with the smallest numbers
to validation. So the order of the listing, the machine and the run's own seed have no say, and a file that is
added later moves only few of the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import derive_seed

__all__ = ["check_share", "grouped_split", "stratified_split"]


def check_share(share: float | int) -> None:
    """Refuse what is neither a share in (0, 1) nor a count of at least 1.

    Raises:
        UsageError: it is neither.
    """
    is_share = isinstance(share, float) and 0 < share < 1
    is_count = is_whole(share)
    if not (is_share or is_count):
        raise UsageError(
            f"val_split must be a share between 0 and 1 or a number of images, not {share!r}",
            fix="val_split=0.2",
        )


def stratified_split(
    names: Sequence[str], classes: Sequence[str], share: float | int, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split samples into training and validation, each class in the same proportion.

    Args:
        names: one unique name a sample, such as its relative path.
        classes: the class of each sample.
        share: the validation part: a share in (0, 1), or a number of samples.
        seed: the split's own seed.

    Returns:
        Indices of the training and of the validation samples, both ascending. A class of two or more samples
        has at least one in each, which wins over the share; a class of one sample trains.

    Raises:
        UsageError: the share is no share, or no split can have that number of samples.
        BadDataError: no class has two samples.
    """
    check_share(share)
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        members[name].append(index)
    counts = _counts({name: len(members[name]) for name in sorted(members)}, share)
    chosen: set[int] = set()
    for name, count in counts.items():
        ranked = sorted(members[name], key=lambda i: (derive_seed("split", seed, names[i]), names[i]))
        chosen.update(ranked[:count])
    return [i for i in range(len(classes)) if i not in chosen], sorted(chosen)


def grouped_split(groups: Sequence[str], share: float | int, seed: int = 0) -> list[int]:
    """Choose validation samples by whole groups, in a random order of the groups, until the share is reached.

    Args:
        groups: the group of each sample.
        share: the validation part: a share in (0, 1), or a number of samples.
        seed: the split's own seed.

    Returns:
        Indices of the validation samples, ascending. At least one group is on either side; the number of samples is
        the nearest that whole groups in this order give.

    Raises:
        UsageError: the share is not a share.
        BadDataError: there is one group only.
    """
    check_share(share)
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise BadDataError("val_split: all samples are of one group, so none can be split", fix="val_file=...")
    target = share if isinstance(share, int) else round(share * len(groups))
    chosen: set[str] = set()
    count = 0
    for name in sorted(sizes, key=lambda name: (derive_seed("split", seed, name), name))[:-1]:
        if chosen and abs(count + sizes[name] - target) > abs(count - target):
            break
        chosen.add(name)
        count += sizes[name]
    return [i for i, name in enumerate(groups) if name in chosen]


def _counts(sizes: dict[str, int], share: float | int) -> dict[str, int]:
    """How many samples of each class go to validation: largest remainders within 1..size-1."""
    total = sum(sizes.values())
    splittable = {name: size for name, size in sizes.items() if size >= 2}
    if not splittable:
        raise BadDataError("val_split: no class has two images, so none can be split", fix="val_folder=...")
    least, most = len(splittable), sum(splittable.values()) - len(splittable)
    target = share if isinstance(share, int) else min(max(round(share * total), least), most)
    if not least <= target <= most:
        raise UsageError(
            f"val_split={share} is impossible with these {total} images in {len(sizes)} classes",
            why=f"each class keeps one image on either side, so from {least} to {most} images can validate",
            fix=f"val_split={min(max(target, least), most)}",
        )
    quotas = {name: target * size / sum(splittable.values()) for name, size in splittable.items()}
    counts = {name: min(max(int(quotas[name]), 1), size - 1) for name, size in splittable.items()}
    while sum(counts.values()) < target:
        open_classes = [name for name in counts if counts[name] < sizes[name] - 1]
        counts[max(open_classes, key=lambda name: quotas[name] - counts[name])] += 1
    while sum(counts.values()) > target:
        open_classes = [name for name in counts if counts[name] > 1]
        counts[min(open_classes, key=lambda name: quotas[name] - counts[name])] -= 1
    return counts
