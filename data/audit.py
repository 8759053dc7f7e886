"""What is suspicious about a data set. Nothing is changed; what to do about it is the user's decision.

The cheap part works on the table of samples and on fingerprints, which are taken while every image is decoded once.
With a model it also finds suspected label errors and neighbours in its features.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from flashtask.core.errors import FlashtaskError
from flashtask.data.checks import BadImage, Looked
from flashtask.data.copies import Copies, find_copies
from flashtask.data.decoding import Decoding
from flashtask.data.findings import KINDS, Audit, Finding, Sample
from flashtask.data.fingerprint import Fingerprint, fingerprint
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.inputs import Input
from flashtask.data.samples import PARTS, Column, SampleTable
from flashtask.data.targets import LabelReader, TargetReader
from flashtask.data.value_range import Bounds

__all__ = ["Examined", "Examiner", "audit_table", "label_errors"]

#: Fewer training images than these of a class are reported, and classes that are so many times as large as another.
_FEW, _IMBALANCE = 5, 10
#: Sides in pixels, and how many times as long one side is as the other.
_TINY, _LONG = 16, 4.0
#: Grey levels of dark and bright pictures, if the others are not like that.
_DARK, _BRIGHT = 16.0, 240.0
#: Sharpness of a blurred picture, also as a share of the median of all.
_BLURRED, _BLURRED_SHARE = 0.1, 1 / 3
#: Least cosine of the centred features of neighbours.
_NEIGHBOURS = 0.95
#: Rows of features that are compared with all others at a time.
_ROWS = 1024


class Examined(NamedTuple):
    """What a model finds out about samples, one row each.

    Args:
        features: (N, F) floats.
        scores: (N, classes) the probability of each class, by heads that were not fitted to the sample or a copy of
            it; None without classes.
    """

    features: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any] | None


class Examiner(Protocol):
    """A model that `audit` can use; every task is one."""

    def examine(
        self, paths: Sequence[str], targets: Column | None, groups: Sequence[int], images: ImageSource = FILES
    ) -> Examined:
        """Look at samples.

        Args:
            paths: of the images, or the names that `images` has for them.
            targets: (N,) class indices, None without classes.
            groups: (N,) those of samples that must not be separated by a split for cross-fitting.
            images: where the pictures are read.
        """


def audit_table(
    table: SampleTable,
    looked: Looked,
    reader: TargetReader,
    values: Column | None = None,
    examiner: Examiner | None = None,
    ignored: Sequence[str] = (),
    *,
    images: ImageSource = FILES,
) -> Audit:
    """Look for everything that is suspicious about samples.

    Args:
        table: of all parts.
        looked: what `look_at_images` found about its inputs.
        reader: of its targets.
        values: the targets as a model takes them, (N,) or (N, K), anything for samples without one; None if they cannot
            be compared.
        examiner: finds label errors and neighbours.
        ignored: patterns of findings that are left out, as `read_ignored` gives them.
        images: where the pictures are read.
    """
    parts = [PARTS[number] for number in table.parts.tolist()]
    labels = reader.labels if isinstance(reader, LabelReader) else ()
    texts = _in_words(parts, reader, values)
    samples = [Sample(*one) for one in zip(parts, table.names(), table.inputs.tolist(), texts, strict=True)]
    prints = [_print_of(sample.path, looked, images) for sample in samples]
    copies = find_copies([sample.path for sample in samples], prints, images=images)
    found = list(_unreadable(samples, looked.bad))
    found += _of_copies(samples, copies, values)
    found += _of_groups(samples, table.groups)
    found += _of_classes(samples, values, labels)
    found += _of_pictures(samples, prints)
    why = "give a model, for example --backbone efficientnet_lite0"
    if examiner is not None:
        # A model that was not trained on this data does not know what is white in a file of more than 8 bits.
        usable = [row for row, one in enumerate(samples) if prints[row] is not None and one.path not in looked.bounds]
        why = "" if labels else "the targets are not classes"
        found += _of_features(samples, copies, usable, values, labels, examiner, images)
    kept = [finding for finding in found if not any(map(finding.matches, ignored))]
    unused = [pattern for pattern in ignored if not any(finding.matches(pattern) for finding in found)]
    sizes = {part: parts.count(part) for part in PARTS if part in parts}
    ordered = sorted(kept, key=lambda finding: [*KINDS].index(finding.kind))
    return Audit(sizes, tuple(ordered), len(found) - len(kept), tuple(unused), why, images)


def _in_words(parts: Sequence[str], reader: TargetReader, values: Column | None) -> list[str]:
    """The target of each sample; empty for those without one."""
    if values is None:
        return [""] * len(parts)
    known = zip(parts, values, strict=True)
    return ["" if part == "predict" else ", ".join(reader.lines(value)) for part, value in known]


def _print_of(path: str, looked: Looked, images: ImageSource) -> Fingerprint | None:
    """The fingerprint of a file; one of more than 8 bits is read again, from black to white by its own values."""
    bounds = looked.bounds.get(path)
    return looked.fingerprints.get(path) if bounds is None else _print_of_wide(images.input(path), bounds)


def _print_of_wide(wide: Input, bounds: Bounds) -> Fingerprint | None:
    try:
        if bounds[0] == bounds[1]:
            return Fingerprint(*wide.size(), "0" * 64, 0.0, 0.0, 0.0)
        picture = Image.fromarray(wide.read(Decoding(3, value_range=bounds)))
    except FlashtaskError:
        return None
    return fingerprint(picture, picture.size)


def _of_copies(samples: Sequence[Sample], copies: Copies, values: Column | None) -> Iterator[Finding]:
    for group, how in zip(copies.groups, copies.how, strict=True):
        own = tuple(samples[row] for row in group)
        parts = dict.fromkeys(sample.part for sample in own)
        if len(parts) > 1:
            yield Finding("leak", f"{how}, in {' and '.join(parts)}", own)
        if (targets := _different(group, samples, values)) is not None:
            yield Finding("conflict", f"{how}, as {' and '.join(targets)}", own)
        if len(parts) == 1 and targets is None:
            yield Finding("duplicate", how, own)


def _different(rows: Sequence[int], samples: Sequence[Sample], values: Column | None) -> list[str] | None:
    """The targets of copies in words if they differ."""
    known = [row for row in rows if values is not None and samples[row].part != "predict"]
    if values is None or len({values[row].tobytes() for row in known}) < 2:
        return None
    return [repr(text) for text in dict.fromkeys(samples[row].target for row in known)]


# ---- groups and classes


def _unreadable(samples: Sequence[Sample], bad: Sequence[BadImage]) -> Iterator[Finding]:
    reasons = {image.path: image.reason for image in bad}
    return (Finding("unreadable", reasons[one.path], (one,)) for one in samples if one.path in reasons)


def _of_groups(samples: Sequence[Sample], groups: Column | None) -> Iterator[Finding]:
    first: dict[str, dict[str, Sample]] = defaultdict(dict)
    for sample, group in zip(samples, () if groups is None else groups.tolist(), strict=groups is not None):
        if group:
            first[group].setdefault(sample.part, sample)
    for group, of_parts in first.items():
        if len(of_parts) > 1:
            yield Finding(
                "group_leak", f"group {group!r} is in {' and '.join(of_parts)}", tuple(of_parts.values()), None, group
            )


def _of_classes(samples: Sequence[Sample], values: Column | None, labels: Sequence[str]) -> Iterator[Finding]:
    if values is None or not labels:
        return
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for sample, value in zip(samples, values.tolist(), strict=True):
        if sample.part != "predict":
            counts[sample.part][value] += 1
    for part, count in counts.items():
        for number, label in enumerate(labels):
            if not count[number]:
                yield Finding("missing_class", f"no image of class {label!r} in {part}", (), None, label)
    own = counts.get("train") or next(iter(counts.values()), Counter())
    sizes = {number: own[number] for number in range(len(labels)) if own[number]}
    for number, size in sizes.items():
        if size < _FEW:
            yield Finding("few", f"class {labels[number]!r} has {size} image(s)", (), float(size), labels[number])
    if sizes and max(sizes.values()) >= _IMBALANCE * min(sizes.values()):
        most, least = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        ratio = sizes[most] / sizes[least]
        said = f"{labels[most]!r} has {sizes[most]:,} images, {labels[least]!r} {sizes[least]:,}"
        yield Finding("imbalance", f"{said}: {ratio:.0f} to 1", (), ratio, labels[least])


# ---- single pictures


def _of_pictures(samples: Sequence[Sample], prints: Sequence[Fingerprint | None]) -> Iterator[Finding]:
    """Those that differ much from the others: a data set of night views, of scanned pages or of thumbnails is fine."""
    known = [one for one in prints if one is not None]
    if not known:
        return
    middle = {
        "side": float(np.median([min(one.width, one.height) for one in known])),
        "ratio": float(np.median([_ratio(one) for one in known])),
        "mean": float(np.median([one.mean for one in known])),
        "sharpness": float(np.median([one.sharpness for one in known])),
    }
    for sample, one in zip(samples, prints, strict=True):
        if one is not None:
            for kind, detail, score in _oddities(one, middle):
                yield Finding(kind, detail, (sample,), score)


def _oddities(one: Fingerprint, middle: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    side, ratio = min(one.width, one.height), _ratio(one)
    if side < _TINY and side < middle["side"] / 2:
        yield "size", f"{one.width} x {one.height} pixels", float(side)
    elif ratio > _LONG * middle["ratio"]:
        yield "size", f"{one.width} x {one.height} pixels, {ratio:.0f} to 1", ratio
    if one.is_blank:
        yield "blank", f"grey level {one.mean:.0f} of 255 everywhere", one.deviation
    elif one.mean < _DARK and one.mean < middle["mean"] / 4:
        yield "dark", f"mean grey level {one.mean:.0f} of 255, of all images {middle['mean']:.0f}", one.mean
    elif one.mean > _BRIGHT and 255 - one.mean < (255 - middle["mean"]) / 4:
        yield "bright", f"mean grey level {one.mean:.0f} of 255, of all images {middle['mean']:.0f}", one.mean
    elif one.sharpness < _BLURRED and one.sharpness < _BLURRED_SHARE * middle["sharpness"]:
        yield "blurred", f"sharpness {one.sharpness:.2f}, of all images {middle['sharpness']:.2f}", one.sharpness


def _ratio(one: Fingerprint) -> float:
    return max(one.width, one.height) / max(1, min(one.width, one.height))


# ---- with a model


def _of_features(
    samples: Sequence[Sample],
    copies: Copies,
    usable: Sequence[int],
    values: Column | None,
    labels: Sequence[str],
    examiner: Examiner,
    images: ImageSource,
) -> Iterator[Finding]:
    together = {row: number for number, group in enumerate(copies.groups) for row in group}
    # Copies share a number below that of the first sample that is alone.
    groups = {row: together.get(row, len(copies.groups) + row) for row in usable}
    with_class = [row for row in usable if labels and samples[row].part != "predict"]
    others = [row for row in usable if not labels or samples[row].part == "predict"]
    features: list[Any] = []
    for rows, targets in ((with_class, None if values is None else values[with_class]), (others, None)):
        if rows:
            given = None if not labels or rows is others else targets
            paths = [samples[row].path for row in rows]
            examined = examiner.examine(paths, given, [groups[row] for row in rows], images)
            features.append(examined.features)
            if examined.scores is not None and given is not None:
                yield from label_errors([samples[row] for row in rows], given, examined.scores, labels)
    if features:
        yield from _neighbours(samples, [*with_class, *others], np.concatenate(features), groups)


def label_errors(
    samples: Sequence[Sample], targets: Column, scores: np.ndarray[Any, Any], labels: Sequence[str]
) -> Iterator[Finding]:
    """Labels that scores contradict which others than these samples led to, the most certain contradiction first.

    Another class must be at least as probable as it is on average for its own samples: confident learning (Northcutt,
    Jiang and Chuang, Journal of Artificial Intelligence Research 70, 2021).
    """
    rows = np.arange(len(targets))
    own = scores[rows, targets]
    members = [targets == number for number in range(scores.shape[1])]
    usual = np.array([own[member].mean() if member.any() else 1.0 for member in members])
    rest = np.where(scores >= usual, scores, 0.0)
    rest[rows, targets] = 0
    better = rest.argmax(axis=1)
    margins = own - rest[rows, better]
    suspects = np.flatnonzero((rest[rows, better] > 0) & (margins < 0))
    for row in suspects[np.argsort(margins[suspects], kind="stable")].tolist():
        other = labels[better[row]]
        said = (
            f"labelled {labels[targets[row]]!r} ({own[row]:.2f}), looks like {other!r} ({rest[row, better[row]]:.2f})"
        )
        yield Finding("label", said, (samples[row],), float(margins[row]))


def _neighbours(
    samples: Sequence[Sample], rows: Sequence[int], features: np.ndarray[Any, Any], groups: Mapping[int, int]
) -> Iterator[Finding]:
    """Samples of two parts whose features nearly agree, without the copies that were found already."""
    centred = np.asarray(features, dtype=np.float32) - features.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-12
    parts = np.array([PARTS.index(samples[row].part) for row in rows])
    if len(set(parts.tolist())) < 2:
        return
    found = []
    for start in range(0, len(rows), _ROWS):
        cosines = centred[start : start + _ROWS] @ centred.T
        is_other = parts[start : start + _ROWS, None] > parts  # each pair once, the earlier part second
        cosines[~is_other] = -1
        best = cosines.argmax(axis=1)
        for offset, (other, cosine) in enumerate(zip(best.tolist(), cosines.max(axis=1).tolist(), strict=True)):
            one = rows[start + offset]
            if cosine >= _NEIGHBOURS and groups[one] != groups[rows[other]]:
                found.append((cosine, rows[other], one))
    for cosine, one, other in sorted(found, reverse=True):
        yield Finding("neighbour", f"cosine of the features {cosine:.3f}", (samples[one], samples[other]), cosine)
