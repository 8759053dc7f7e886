"""COCO's twelve numbers, and the thresholds at which the boxes of each class have the best F1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from flashtask.core.errors import UsageError

__all__ = ["COCO_NUMBERS", "ClassScores", "DetectionNumber", "DetectionScores", "as_torchmetrics", "coco_metric"]
__all__ += ["box_overlaps", "detection_metrics"]

#: What torchmetrics calls COCO's numbers; `map` is the average over overlaps from 0.5 to 0.95.
COCO_NUMBERS: tuple[str, ...] = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
COCO_NUMBERS += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")

#: COCO's own, in double precision: torchmetrics has 0.60000002 for 0.6, and a box may overlap by just that.
_OVERLAPS, _RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
#: Overlap from which a box counts as found, for F1.
_FOUND = 0.5


class DetectionScores(Metric):
    """COCO's mean average precision, with all other numbers of the same boxes in `numbers`.

    Boxes are kept as few flat tensors, so that processes with unequal numbers of images can gather them.

    Args:
        num_classes: how many there are.
        thresholds: of each class, for F1; None chooses those with the best F1.
    """

    higher_is_better = True
    full_state_update = False
    #: What is kept -> numbers in a row; and those that are not float32.
    widths: ClassVar[Mapping[str, int]] = {"counts": 2, "found": 6, "true": 7}
    kinds: ClassVar[Mapping[str, torch.dtype]] = {"counts": torch.long}
    counts: list[Tensor] | Tensor
    found: list[Tensor] | Tensor
    true: list[Tensor] | Tensor

    def __init__(self, num_classes: int, thresholds: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.num_classes, self.thresholds = num_classes, thresholds
        #: The thresholds of the last `compute`, and its numbers; those of classes are lists.
        self.chosen: tuple[float, ...] | None = None
        self.numbers: dict[str, Any] = {}
        # Of each image how many boxes were found and are true; all that were found: box, score, class; all that are
        # true: box, class, crowd, area.
        for name in self.widths:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: Sequence[Tensor], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a batch.

        Args:
            preds: for each image (n, 6): left, top, right, bottom in pixels of the file, score, class.
            target: for each image `boxes` (m, 4), `labels` (m,), `is_crowd` (m,) and `areas` (m,).
        """
        true = [
            torch.cat([one["boxes"].float(), *(one[n][:, None].float() for n in ("labels", "is_crowd", "areas"))], 1)
            for one in target
        ]
        counts = [[len(one), len(two)] for one, two in zip(preds, true, strict=True)]
        batch = {
            "counts": torch.tensor(counts).reshape(-1, 2),
            "found": torch.cat(list(preds)),
            "true": torch.cat(true),
        }
        for name, value in batch.items():
            getattr(self, name).append(value.to(self.device))

    def sync(self, *arguments: Any, **options: Any) -> None:
        """Gather the boxes of all processes; one that saw no image takes part too."""
        for name, width in self.widths.items():
            value = getattr(self, name)
            if isinstance(value, list) and not value:
                kind = self.kinds.get(name, torch.float32)
                value.append(torch.zeros(0, width, dtype=kind, device=self.device))
        super().sync(*arguments, **options)

    def _whole(self, name: str) -> Tensor:
        value: Any = getattr(self, name)  # a tensor once it was gathered
        whole: Tensor = (
            value
            if isinstance(value, Tensor)
            else torch.cat(value or [torch.zeros(0, self.widths[name], device=self.device)])
        )
        return whole.cpu()

    def compute(self) -> Tensor:
        """The mean average precision; NaN without a true box."""
        sizes = self._whole("counts").long().tolist()
        found = torch.split(self._whole("found"), [one for one, _ in sizes]) if sizes else ()
        true = torch.split(self._whole("true"), [one for _, one in sizes]) if sizes else ()
        overlaps = [
            box_overlaps(one, {"boxes": two[:, :4], "is_crowd": two[:, 5] > 0})
            for one, two in zip(found, true, strict=True)
        ]
        self.numbers = {**self._coco(found, true), **self._f1(found, true, overlaps)}
        return torch.tensor(self.numbers["map"])

    def _coco(self, found: Sequence[Tensor], true: Sequence[Tensor]) -> dict[str, Any]:
        metric = coco_metric("bbox")
        metric.update(*as_torchmetrics(found, true))
        return self._numbers_of(metric.compute() if len(found) else {})

    def _numbers_of(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The twelve numbers that torchmetrics has found, and `average_precision` of each class."""
        numbers: dict[str, Any] = {name: _number(values.get(prefix + name, math.nan)) for name in COCO_NUMBERS}
        each = [math.nan] * self.num_classes
        classes = torch.as_tensor(values.get("classes", [])).reshape(-1).tolist()
        of_classes = torch.as_tensor(values.get(f"{prefix}map_per_class", [])).reshape(-1).tolist()
        for number, value in zip(classes, of_classes, strict=True):
            each[int(number)] = _number(value)
        return {**numbers, "average_precision": each}

    def _f1(self, found: Sequence[Tensor], true: Sequence[Tensor], overlaps: Sequence[Tensor]) -> dict[str, Any]:
        """F1 of each class, precision and recall at the thresholds, and their means over the classes that occur."""
        chosen, f1s, precisions, recalls = [], [], [], []
        for number in range(self.num_classes):
            scores, hits, total = _matches(found, true, overlaps, number)
            given = None if self.thresholds is None else self.thresholds[number]
            threshold, counts = _at_threshold(scores, hits, total, given)
            hit, said = counts
            chosen.append(threshold)
            occurs = total > 0 or said > 0
            f1s.append(2 * hit / (said + total) if occurs else math.nan)
            precisions.append(hit / said if said else (0.0 if occurs else math.nan))
            recalls.append(hit / total if total else (0.0 if occurs else math.nan))
        self.chosen = tuple(chosen)
        named = {"f1": f1s, "precision": precisions, "recall": recalls}
        means = {name: _mean(values) for name, values in named.items()}
        return {**means, **{f"{name}_by_class": values for name, values in named.items()}}


class DetectionNumber(Metric):
    """One number of a `DetectionScores` that is logged beside it.

    Args:
        scores: that counts the boxes.
        name: of the number.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, scores: DetectionScores, name: str) -> None:
        super().__init__()
        # In a tuple it is not a part of this module, so its state is there once.
        self._scores, self.name = (scores,), name

    def update(self, preds: Any, target: Any) -> None:
        """Do nothing: `scores` counts the boxes."""

    def compute(self) -> Tensor:
        """The number; NaN where no class has it."""
        (scores,) = self._scores
        scores.compute()
        return torch.tensor(scores.numbers[self.name])


class ClassScores(DetectionScores):
    """A number for each class, of boxes that it counts itself.

    Args:
        num_classes: how many there are.
        thresholds: of each class, for F1.
        name: of the number: `average_precision` or `f1_by_class`.
    """

    def __init__(self, num_classes: int, thresholds: tuple[float, ...], name: str) -> None:
        super().__init__(num_classes, thresholds)
        self.name = name

    def compute(self) -> Tensor:
        """The number of each class (num_classes,); NaN for a class without a true box."""
        super().compute()
        return torch.tensor(self.numbers[self.name])


def coco_metric(*kinds: Literal["bbox", "segm"]) -> MeanAveragePrecision:
    """COCO's average precision by torchmetrics, for `bbox`, `segm`, or both.

    Raises:
        UsageError: faster-coco-eval is not installed.
    """
    try:
        metric = MeanAveragePrecision(
            iou_type=kinds,
            iou_thresholds=_OVERLAPS,
            rec_thresholds=_RECALLS,
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            "the metrics of boxes need the package faster-coco-eval",
            why=str(error),
            fix='pip install "flashtask[detection]"',
        ) from None
    metric.warn_on_many_detections = False
    return metric


def as_torchmetrics(
    found: Sequence[Tensor], true: Sequence[Tensor]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The rows that a `DetectionScores` keeps of each image, as torchmetrics takes them."""
    own = [{"boxes": one[:, :4], "scores": one[:, 4], "labels": one[:, 5].long()} for one in found]
    return own, [
        {"boxes": one[:, :4], "labels": one[:, 4].long(), "iscrowd": one[:, 5].long(), "area": one[:, 6]}
        for one in true
    ]


def detection_metrics(num_classes: int) -> dict[str, Metric]:
    """COCO's twelve numbers, and F1, precision and recall at the thresholds."""
    scores = DetectionScores(num_classes)
    others = [*COCO_NUMBERS[1:], "f1", "precision", "recall"]
    return {"map": scores, **{name: DetectionNumber(scores, name) for name in others}}


def _matches(
    found: Sequence[Tensor], true: Sequence[Tensor], overlaps: Sequence[Tensor], number: int
) -> tuple[Tensor, Tensor, int]:
    """Of a class: the scores of boxes, the best first, whether each finds an object, and how many objects there are.

    Each object is found once, by the box with the highest score that overlaps with it by half or more. Boxes on
    crowds, and those above a hundred an image, do not count.
    """
    scores, hits, total = [], [], 0
    for one, two, whole in zip(found, true, overlaps, strict=True):
        is_own, is_crowd = two[:, 4] == number, two[:, 5] > 0
        of_class = (one[:, 5] == number).nonzero()[:, 0]
        ranked = of_class[one[of_class, 4].argsort(descending=True, stable=True)]
        boxes, overlap, of_crowds = (
            one[ranked],
            whole[ranked][:, is_own & ~is_crowd],
            whole[ranked][:, is_own & is_crowd],
        )
        total += overlap.shape[1]
        if not len(boxes):
            continue
        is_hit, counts = torch.zeros(len(boxes), dtype=torch.bool), torch.ones(len(boxes), dtype=torch.bool)
        for row in range(len(boxes) if overlap.shape[1] else 0):
            most, place = overlap[row].max(dim=0)
            if most >= _FOUND:
                is_hit[row] = True
                overlap[:, place] = -1
        if of_crowds.shape[1]:
            counts = is_hit | (of_crowds.amax(1) < _FOUND)
        scores.append(boxes[counts, 4])
        hits.append(is_hit[counts])
    if not scores:
        return torch.zeros(0), torch.zeros(0, dtype=torch.bool), total
    values, order = torch.cat(scores).sort(descending=True, stable=True)
    return values, torch.cat(hits)[order], total


def box_overlaps(found: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Intersection over union of found (n, 6) and true boxes (m), (n, m); of crowds, the share of each box inside.

    Args:
        found: left, top, right, bottom, score, class.
        target: of the image `boxes` (m, 4) and `is_crowd` (m,).
    """
    boxes, is_crowd = target["boxes"].cpu().float(), target["is_crowd"].cpu().bool()
    return torch.where(is_crowd, _share_inside(found[:, :4].float(), boxes), box_iou(found[:, :4].float(), boxes))


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """The share of each box (n, 4) that lies in each region (m, 4)."""
    shared = torch.minimum(boxes[:, None, 2:], regions[:, 2:]) - torch.maximum(boxes[:, None, :2], regions[:, :2])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1, keepdim=True).clamp(min=1e-9)
    return shared.clamp(min=0).prod(2) / areas


def _at_threshold(scores: Tensor, hits: Tensor, total: int, given: float | None) -> tuple[float, tuple[int, int]]:
    """The threshold in hundredths with the best F1 (of equal ones the nearest to 0.5), with hits and boxes above it."""
    grid = [given] if given is not None else sorted((n / 100 for n in range(1, 100)), key=lambda n: abs(n - 0.5))
    best = (-1.0, 0.5, (0, 0))
    for threshold in grid:
        said = int((scores.double() >= threshold).sum())
        hit = int(hits[:said].sum())
        f1 = 2 * hit / max(1, said + total)
        if f1 > best[0] + 1e-12:
            best = (f1, threshold, (hit, said))
    return best[1], best[2]


def _number(value: Any) -> float:
    """COCO writes -1 where there is nothing to measure."""
    found = float(value)
    return math.nan if found < 0 else found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
