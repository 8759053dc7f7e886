"""How predictions are judged for a report: of labels, numbers, masks and boxes, a `Judgement` a sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flashtask.reports.judgement import Judgement, Pair
from flashtask.reports.statistics import mean_iou

__all__ = ["FOUND", "judged_boxes", "judged_labels", "judged_masks", "judged_multi_labels", "judged_numbers"]

#: Overlap from which a box counts as found, and from which it is an object's box at the wrong place.
FOUND, _NEAR = 0.5, 0.1
#: Numbers that belong to no class in masks.
_IGNORED = 255
#: Least probability of which the logarithm is taken.
_LEAST = 1e-12


def judged_labels(scores: Tensor, targets: Tensor, labels: Sequence[str]) -> list[Judgement]:
    """One label an image: the error is the cross-entropy, the certainty the lead of the best class over the next.

    Args:
        scores: (B, classes) probabilities.
        targets: (B,) class indices.
        labels: of the classes.
    """
    scores, best = scores.cpu(), scores.cpu().argmax(dim=1).tolist()
    leads = scores.topk(min(2, scores.shape[1]), dim=1).values
    found = []
    for row, truth, said, lead in zip(scores.tolist(), targets.tolist(), best, leads.tolist(), strict=True):
        pair = Pair(labels[truth], labels[said], score=row[said])
        of_classes = {
            label: ((score, place == truth),) for place, (label, score) in enumerate(zip(labels, row, strict=True))
        }
        found.append(Judgement(-math.log(max(row[truth], _LEAST)), lead[0] - sum(lead[1:]), (pair,), of_classes))
    return found


def judged_multi_labels(
    scores: Tensor, targets: Tensor, labels: Sequence[str], thresholds: Sequence[float]
) -> list[Judgement]:
    """Any number of labels: the error is the mean cross-entropy, the certainty the least distance to a threshold.

    Args:
        scores: (B, labels) probabilities.
        targets: (B, labels) zeros and ones.
        labels: their names.
        thresholds: of each label.
    """
    found = []
    for row, truths in zip(scores.cpu().tolist(), targets.bool().tolist(), strict=True):
        whole = list(zip(labels, row, truths, thresholds, strict=True))
        losses = [-math.log(max(score if is_true else 1 - score, _LEAST)) for _, score, is_true, _ in whole]
        pairs = [
            Pair(label if is_true else "", label if score >= bound else "", score=score)
            for label, score, is_true, bound in whole
            if is_true or score >= bound
        ]
        certainty = min(abs(score - bound) for _, score, _, bound in whole)
        of_labels = {label: ((score, is_true),) for label, score, is_true, _ in whole}
        found.append(Judgement(sum(losses) / len(losses), certainty, pairs, of_labels))
    return found


def judged_numbers(found: Tensor, targets: Tensor, names: Sequence[str]) -> list[Judgement]:
    """Numbers: the error is the absolute error, of several numbers the mean.

    Args:
        found: (B,) or (B, numbers) in the unit of the targets.
        targets: the same of the truth.
        names: of the numbers.
    """
    size = (len(found), len(names))
    rows = zip(targets.reshape(size).tolist(), found.reshape(size).tolist(), strict=True)
    numbers = [dict(zip(names, zip(*row, strict=True), strict=True)) for row in rows]
    return [
        Judgement(sum(abs(truth - said) for truth, said in one.values()) / len(one), numbers=one) for one in numbers
    ]


def judged_masks(found: Sequence[Tensor], targets: Sequence[Tensor], labels: Sequence[str]) -> list[Judgement]:
    """Masks: pairs count pixels; the error is 1 less the mean intersection over union of the classes in the image.

    Args:
        found: (H, W) class numbers of each image.
        targets: the same of the truth, 255 where none counts.
        labels: of the classes.
    """
    made = []
    for said, truth in zip(found, targets, strict=True):
        counted = truth != _IGNORED
        places = truth[counted].long() * len(labels) + said[counted].long()
        counts = torch.bincount(places, minlength=len(labels) ** 2).reshape(len(labels), -1).cpu().numpy()
        value = float(mean_iou(counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)))
        pairs = [Pair(labels[a], labels[b], float(counts[a, b])) for a, b in np.argwhere(counts).tolist()]
        made.append(Judgement(1 - value, pairs=pairs))
    return made


def judged_boxes(
    found: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str],
    thresholds: Sequence[float],
    overlaps: Sequence[Tensor] | None = None,
) -> list[Judgement]:
    """Objects: pairs are objects, with the kinds of errors of TIDE (Bolya et al., ECCV 2020) at an overlap of one half.

    The error is 1 less the F1 of the image, the certainty the least distance of a score to its threshold.

    Args:
        found: of each image (n, 6): left, top, right, bottom in pixels of the file, score, class.
        targets: of each image `boxes` (m, 4), `labels` (m,) and `is_crowd` (m,).
        labels: of the classes.
        thresholds: of each class.
        overlaps: of each image (n, m), of found and true objects; of crowds, the share of each that is found which lies
            inside. None means those of the boxes.
    """
    if overlaps is None:
        from flashtask.tasks.detection_metrics import box_overlaps

        overlaps = [box_overlaps(rows.cpu(), target) for rows, target in zip(found, targets, strict=True)]
    bounds = torch.tensor(thresholds, dtype=torch.float64)
    made = []
    for rows, target, whole in zip((one.cpu() for one in found), targets, overlaps, strict=True):
        is_said = rows[:, 4].double() >= bounds[rows[:, 5].long()]
        hits = _hits(rows, target, whole)
        pairs = list(_pairs(rows[is_said], target, whole[is_said], labels))
        right = sum(pair.truth == pair.predicted for pair in pairs)
        there, said = (sum(bool(pair[side]) for pair in pairs) for side in (0, 1))
        of_labels: dict[str, list[tuple[float, bool]]] = {}
        is_on_crowd = _on_crowds(rows, target, whole)
        for row, (_, _, _, _, score, number) in enumerate(rows.tolist()):
            if row in hits or not is_on_crowd[row]:
                of_labels.setdefault(labels[int(number)], []).append((score, row in hits))
        distances = (rows[:, 4].double() - bounds[rows[:, 5].long()]).abs().tolist()
        error = 1 - 2 * right / (there + said) if there + said else 0.0
        made.append(Judgement(error, min(distances, default=None), pairs, of_labels))
    return made


def _hits(rows: Tensor, target: Mapping[str, Tensor], overlaps: Tensor) -> dict[int, int]:
    """Which row has found which object, the best row first."""
    found: dict[int, int] = {}
    numbers, is_crowd = target["labels"].cpu(), target["is_crowd"].cpu().bool()
    for number in set(rows[:, 5].long().tolist()):
        own = torch.nonzero(rows[:, 5] == number)[:, 0]
        own = own[rows[own, 4].argsort(descending=True, stable=True)]
        objects = torch.nonzero((numbers == number) & ~is_crowd)[:, 0]
        if not len(objects):
            continue
        overlap = overlaps[own][:, objects]
        for place, row in enumerate(own.tolist()):
            most, which = overlap[place].max(dim=0)
            if most >= FOUND:
                found[row] = int(objects[which])
                overlap[:, which] = -1
    return found


def _on_crowds(rows: Tensor, target: Mapping[str, Tensor], overlaps: Tensor) -> list[bool]:
    """Whether half of what is found lies on a region of many objects of its class."""
    is_own = target["is_crowd"].cpu().bool()[None, :] & (target["labels"].cpu()[None, :] == rows[:, 5:6])
    found: list[bool] = ((overlaps >= FOUND) & is_own).any(dim=1).tolist()
    return found


def _pairs(rows: Tensor, target: Mapping[str, Tensor], overlaps: Tensor, labels: Sequence[str]) -> Iterator[Pair]:
    """The objects of an image that were found, confused, missed, and what was found besides.

    Args:
        rows: (n, 6) boxes that are predicted.
        target: of the image.
        overlaps: (n, m).
        labels: of the classes.
    """
    boxes, numbers, is_crowd = target["boxes"].cpu().float(), target["labels"].tolist(), target["is_crowd"].tolist()
    hits, is_on_crowd = _hits(rows, target, overlaps), _on_crowds(rows, target, overlaps)
    confused: set[int] = set()
    found = set(hits.values())
    for row, (*box, score, number) in enumerate(rows.tolist()):
        label, where = labels[int(number)], tuple(box)
        if row in hits:
            yield Pair(label, label, 1.0, score, where)
            continue
        if is_on_crowd[row]:
            continue
        truth, kind = "", "background"
        ordered = sorted(enumerate(overlaps[row].tolist()), key=lambda one: -one[1])
        for place, overlap in ((place, overlap) for place, overlap in ordered if not is_crowd[place]):
            is_same = numbers[place] == int(number)
            if overlap >= FOUND:
                kind = "duplicate" if is_same else "class"
                if not is_same and place not in found | confused:
                    confused.add(place)
                    truth = labels[numbers[place]]
                break
            if overlap >= _NEAR and is_same:
                kind = "localisation"
                break
        yield Pair(truth, label, 1.0, score, where, kind)
    for place, box in enumerate(boxes.tolist()):
        if not is_crowd[place] and place not in found | confused:
            yield Pair(labels[numbers[place]], "", 1.0, math.nan, tuple(box), "missed")
