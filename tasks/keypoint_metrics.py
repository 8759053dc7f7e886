"""COCO's ten numbers of keypoints, those of boxes beside them, PCK, and thresholds by the similarity of keypoints."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_iou

from flashtask.core.errors import UsageError
from flashtask.tasks.detection_metrics import ClassScores, DetectionNumber, DetectionScores
from flashtask.tasks.keypoint_loss import similarity, triples_of

__all__ = ["KEYPOINT_NUMBERS", "KeypointClassScores", "KeypointScores", "keypoint_metrics"]
__all__ += ["keypoint_overlaps"]

#: COCO's numbers of keypoints in their order; `map` is the average over similarities from 0.5 to 0.95.
KEYPOINT_NUMBERS: tuple[str, ...] = ("map", "map_50", "map_75", "map_medium", "map_large")
KEYPOINT_NUMBERS += ("mar", "mar_50", "mar_75", "mar_medium", "mar_large")
#: Numbers of boxes that are logged beside those of keypoints, as `box_map`, ...
_OF_BOXES = ("map", "map_50", "map_75")
#: PCK: how far a keypoint may be from the true one, as a share of the longer side of the true box.
_NEAR = 0.1
#: Overlap from which a box belongs to a true object, for PCK.
_FOUND = 0.5


class KeypointScores(DetectionScores):
    """COCO's mean average precision by the similarity of keypoints (OKS); `numbers` has all others.

    An object without a labelled keypoint counts neither as found nor as missed, as in COCO's own program.

    Args:
        num_classes: how many there are.
        sigmas: of each keypoint.
        thresholds: of each class, for F1 and PCK; None chooses those with the best F1 at a similarity of 0.5.
    """

    widths: ClassVar[Mapping[str, int]] = {"counts": 2, "found": 6, "true": 7}

    def __init__(self, num_classes: int, sigmas: Sequence[float], thresholds: tuple[float, ...] | None = None) -> None:
        super().__init__(num_classes, thresholds)
        self.sigmas = tuple(sigmas)
        more = 3 * len(self.sigmas)
        self.widths = {"counts": 2, "found": 6 + more, "true": 7 + more}  # type: ignore[misc]

    def update(self, preds: Sequence[Tensor], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a batch.

        Args:
            preds: for each image (n, 6 + 3 * K): left, top, right, bottom in pixels of the file, score, class, then x,
                y and a probability of each keypoint.
            target: as of boxes, with `keypoints` (m, K, 3).
        """
        rows = [_rows_of(one) for one in target]
        counts = torch.tensor([[len(one), len(two)] for one, two in zip(preds, rows, strict=True)]).reshape(-1, 2)
        batch = {"counts": counts, "found": torch.cat(list(preds)), "true": torch.cat(rows)}
        for name, value in batch.items():
            getattr(self, name).append(value.to(self.device))

    def compute(self) -> Tensor:
        """The mean average precision of keypoints; NaN without a true object that has some."""
        sizes = self._whole("counts").long().tolist()
        found = torch.split(self._whole("found"), [one for one, _ in sizes]) if sizes else ()
        true = torch.split(self._whole("true"), [one for _, one in sizes]) if sizes else ()
        of_boxes = self._coco(found, true)
        ignored = [_without_labelled(one) for one in true]
        overlaps = [_similarities(one, two, self.sigmas) for one, two in zip(found, ignored, strict=True)]
        self.numbers = {f"box_{name}": of_boxes[name] for name in _OF_BOXES}
        self.numbers |= {**self._of_keypoints(found, true), **self._f1(found, ignored, overlaps)}
        self.numbers["pck"] = self._pck(found, ignored)
        return torch.tensor(self.numbers["map"])

    def _of_keypoints(self, found: Sequence[Tensor], true: Sequence[Tensor]) -> dict[str, Any]:
        """COCO's ten numbers, and the average precision of each class, by faster-coco-eval.

        Raises:
            UsageError: it is not installed.
        """
        try:
            from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise UsageError(
                "the metrics of keypoints need the package faster-coco-eval",
                why=str(error),
                fix='pip install "flashtask[detection]"',
            ) from None
        each = [math.nan] * self.num_classes
        results = _results(found)
        annotations = _annotations(true)
        if not annotations or not results:
            nothing = math.nan if not annotations else 0.0
            known = [math.nan if not annotations else 0.0] * len(KEYPOINT_NUMBERS)
            for number in {one["category_id"] for one in annotations}:
                each[number] = nothing
            return {**dict(zip(KEYPOINT_NUMBERS, known, strict=True)), "average_precision": each}
        with redirect_stdout(io.StringIO()):
            truth = COCO(
                {
                    "images": [{"id": number} for number in range(len(true))],
                    "annotations": annotations,
                    "categories": [{"id": number, "name": str(number)} for number in range(self.num_classes)],
                }
            )
            measured = COCOeval_faster(
                truth,
                truth.loadRes(results),
                "keypoints",
                print_function=lambda *_: None,
                kpt_oks_sigmas=np.array(self.sigmas),
            )
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        for number in range(self.num_classes):
            precision = measured.eval["precision"][:, :, number, 0, -1]
            each[number] = float(precision[precision > -1].mean()) if (precision > -1).any() else math.nan
        values = [math.nan if value < 0 else float(value) for value in measured.stats[: len(KEYPOINT_NUMBERS)]]
        return {**dict(zip(KEYPOINT_NUMBERS, values, strict=True)), "average_precision": each}

    def _pck(self, found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
        """The share of labelled keypoints that are near enough; all of an object that is not found are too far.

        A true object takes the found one that overlaps most with it, of those of its class that are predicted.
        """
        assert self.chosen is not None
        near = total = 0
        thresholds = torch.tensor(self.chosen, dtype=torch.float64)
        for one, two in zip(found, true, strict=True):
            predicted = one[one[:, 4].double() >= thresholds[one[:, 5].long()]]
            objects = two[two[:, 5] == 0]
            points = triples_of(objects[:, 7:])
            is_labelled = points[..., 2] > 0
            total += int(is_labelled.sum())
            overlap = box_iou(objects[:, :4], predicted[:, :4])
            overlap = overlap.where(objects[:, None, 4] == predicted[:, 5], 0.0)
            if not overlap.numel():
                continue
            most, place = overlap.max(dim=1)
            theirs = triples_of(predicted[place, 6:])
            sides = (objects[:, 2:4] - objects[:, :2]).amax(1)
            distance = (theirs[..., :2] - points[..., :2]).norm(dim=-1)
            is_near = (distance <= _NEAR * sides[:, None]) & (most >= _FOUND)[:, None]
            near += int((is_near & is_labelled).sum())
        return near / total if total else math.nan


class KeypointClassScores(ClassScores, KeypointScores):
    """A number for each class, of objects that it counts itself.

    Args:
        num_classes: how many there are.
        sigmas: of each keypoint.
        thresholds: of each class.
        name: of the number: `average_precision` or `f1_by_class`.
    """

    def __init__(self, num_classes: int, sigmas: Sequence[float], thresholds: tuple[float, ...], name: str) -> None:
        KeypointScores.__init__(self, num_classes, sigmas, thresholds)
        self.name = name


def keypoint_metrics(num_classes: int, sigmas: Sequence[float]) -> dict[str, Metric]:
    """COCO's ten numbers, three of boxes, PCK, and F1, precision and recall at the thresholds."""
    scores = KeypointScores(num_classes, sigmas)
    others = [*KEYPOINT_NUMBERS[1:], *(f"box_{name}" for name in _OF_BOXES), "pck", "f1", "precision", "recall"]
    return {"map": scores, **{name: DetectionNumber(scores, name) for name in others}}


def keypoint_overlaps(found: Tensor, target: Mapping[str, Tensor], sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The similarity (OKS) of found and true objects (n, m); and which of the latter do not count (m,).

    Of those that do not count, crowds and objects without a labelled keypoint, it is the share of each box inside.

    Args:
        found: (n, 6 + 3 * K), as `KeypointScores.update` takes it.
        target: of the image, as it takes it.
        sigmas: of the keypoints.
    """
    true = _without_labelled(_rows_of(target)).cpu()
    return _similarities(found.cpu(), true, sigmas), true[:, 5] > 0


def _rows_of(target: Mapping[str, Tensor]) -> Tensor:
    """(m, 7 + 3 * K): the box, class, whether it is a crowd, area and keypoints of each object."""
    columns = [target[name][:, None].float() for name in ("labels", "is_crowd", "areas")]
    return torch.cat([target["boxes"].float(), *columns, target["keypoints"].flatten(1).float()], dim=1)


def _similarities(found: Tensor, true: Tensor, sigmas: Sequence[float]) -> Tensor:
    own, theirs = triples_of(found[:, None, 6:]), triples_of(true[None, :, 7:])
    alike = similarity(own[..., :2], theirs, true[None, :, 6], torch.tensor(sigmas))
    shared = torch.minimum(found[:, None, 2:4], true[:, 2:4]) - torch.maximum(found[:, None, :2], true[:, :2])
    areas = (found[:, 2:4] - found[:, :2]).prod(1, keepdim=True).clamp(min=1e-9)
    return torch.where(true[:, 5] > 0, shared.clamp(min=0).prod(2) / areas, alike)


def _without_labelled(true: Tensor) -> Tensor:
    """Rows of true objects; those of which no keypoint is labelled are marked like crowds."""
    is_labelled = (true[:, 9::3] > 0).any(1)
    changed = true.clone()
    changed[:, 5] = torch.maximum(true[:, 5], (~is_labelled).float())
    return changed


def _bbox(row: Sequence[float]) -> list[float]:
    left, top, right, bottom = row
    return [left, top, right - left, bottom - top]


def _results(found: Sequence[Tensor]) -> list[dict[str, Any]]:
    """COCO's list of results."""
    return [
        {
            "image_id": image,
            "category_id": int(row[5]),
            "bbox": _bbox(row[:4]),
            "score": row[4],
            "keypoints": row[6:],
        }
        for image, one in enumerate(found)
        for row in one.double().tolist()
    ]


def _annotations(true: Sequence[Tensor]) -> list[dict[str, Any]]:
    """COCO's annotations."""
    rows = [(image, row) for image, one in enumerate(true) for row in one.double().tolist()]
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": int(row[4]),
            "bbox": _bbox(row[:4]),
            "iscrowd": int(row[5]),
            "area": row[6],
            "keypoints": row[7:],
            "num_keypoints": sum(seen > 0 for seen in row[9::3]),
        }
        for number, (image, row) in enumerate(rows, 1)
    ]
