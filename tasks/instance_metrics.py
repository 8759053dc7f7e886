"""COCO's twelve numbers of masks, those of boxes beside them, and thresholds by the overlap of masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from flashtask.data.shapes import polygons_of
from flashtask.tasks.detection_metrics import (
    COCO_NUMBERS,
    ClassScores,
    DetectionNumber,
    DetectionScores,
    as_torchmetrics,
    coco_metric,
)

__all__ = ["InstanceClassScores", "InstanceScores", "instance_metrics", "mask_overlaps"]

#: Numbers of boxes that are logged beside those of masks, as `box_map`, ...
_OF_BOXES = ("map", "map_50", "map_75")
_Rle = dict[str, Any]


class InstanceScores(DetectionScores):
    """As `DetectionScores`, by the overlap of masks; `numbers` has those of boxes too, as `box_map`, ...

    Masks are kept as the bytes of COCO's run lengths, all in one tensor, so that processes can gather them.
    """

    widths: ClassVar[Mapping[str, int]] = {"counts": 4, "found": 7, "true": 8, "found_runs": 1, "true_runs": 1}
    kinds: ClassVar[Mapping[str, torch.dtype]] = {
        "counts": torch.long,
        "found_runs": torch.uint8,
        "true_runs": torch.uint8,
    }
    found_runs: list[Tensor] | Tensor
    true_runs: list[Tensor] | Tensor

    def update(  # type: ignore[override]
        self, preds: Sequence[tuple[Tensor, Sequence[str]]], target: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count a batch.

        Args:
            preds: for each image (n, 6), as of boxes, and the run lengths of each mask.
            target: for each image what is known of its boxes, `shapes` (m JSON texts, as a table has them) and `size`
                (width and height of the file). An area of 0 is that of the mask.
        """
        counts, runs = [], {"found": b"", "true": b""}
        rows: dict[str, list[Tensor]] = {"found": [], "true": []}
        for (boxes, texts), one in zip(preds, target, strict=True):
            width, height = one["size"].tolist()
            true = [_run_lengths(text, (width, height)) for text in one["shapes"]]
            columns = [one[name][:, None].float() for name in ("labels", "is_crowd", "areas")]
            whole = {
                "found": ([boxes], [text.encode() for text in texts]),
                "true": ([one["boxes"].float(), *columns], true),
            }
            for name, (parts, encoded) in whole.items():
                lengths = torch.tensor([len(text) for text in encoded], dtype=torch.float32)
                rows[name].append(torch.cat([*(part.cpu() for part in parts), lengths[:, None]], dim=1))
                runs[name] += b"".join(encoded)
            counts.append([len(texts), len(true), width, height])
        self.counts.append(torch.tensor(counts).reshape(-1, 4).to(self.device))  # type: ignore[union-attr]
        for name in ("found", "true"):
            getattr(self, name).append(torch.cat(rows[name]).to(self.device))
            text = torch.from_numpy(np.frombuffer(runs[name], dtype=np.uint8).copy())
            getattr(self, f"{name}_runs").append(text[:, None].to(self.device))

    def compute(self) -> Tensor:
        """The mean average precision of masks; NaN without a true object."""
        sizes = self._whole("counts").long().tolist()
        found, found_masks = self._images("found", [one[0] for one in sizes], sizes)
        true, true_masks = self._images("true", [one[1] for one in sizes], sizes)
        whole = zip(found_masks, true_masks, true, strict=True)
        overlaps = [_overlaps(own, theirs, one[:, 5].int().tolist()) for own, theirs, one in whole]
        self.numbers = self._numbers_of_both(found, true, found_masks, true_masks)
        self.numbers |= self._f1(found, true, overlaps)
        return torch.tensor(self.numbers["map"])

    def _images(
        self, name: str, counts: Sequence[int], sizes: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Tensor], list[list[_Rle]]]:
        """The rows of each image, and its masks as COCO's programs take them."""
        rows = torch.split(self._whole(name), list(counts)) if counts else ()
        runs = self._whole(f"{name}_runs").to(torch.uint8).numpy().tobytes()
        ends = list(accumulate(int(length) for one in rows for length in one[:, -1].tolist()))
        texts = iter([runs[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        return rows, [
            [{"size": [height, width], "counts": next(texts)} for _ in range(len(one))]
            for one, (_, _, width, height) in zip(rows, sizes, strict=True)
        ]

    def _numbers_of_both(
        self,
        found: Sequence[Tensor],
        true: Sequence[Tensor],
        found_masks: Sequence[Sequence[_Rle]],
        true_masks: Sequence[Sequence[_Rle]],
    ) -> dict[str, Any]:
        metric = coco_metric("bbox", "segm")
        both = as_torchmetrics(found, true)
        # torchmetrics takes arrays and keeps run lengths, which are here already: it is given arrays of one pixel.
        for images in both:
            for one in images:
                one["masks"] = torch.zeros(len(one["labels"]), 1, 1, dtype=torch.bool)
        metric.update(*both)
        for state, masks in {"detection_mask": found_masks, "groundtruth_mask": true_masks}.items():
            setattr(metric, state, [tuple((tuple(rle["size"]), rle["counts"]) for rle in one) for one in masks])
        values = metric.compute() if len(found) else {}
        of_boxes = self._numbers_of(values, "bbox_")
        return {**self._numbers_of(values, "segm_"), **{f"box_{name}": of_boxes[name] for name in COCO_NUMBERS}}


class InstanceClassScores(ClassScores, InstanceScores):
    """A number for each class, of objects that it counts itself."""


def instance_metrics(num_classes: int) -> dict[str, Metric]:
    """COCO's twelve numbers of masks, three of boxes, and F1, precision and recall at the thresholds."""
    scores = InstanceScores(num_classes)
    others = [*COCO_NUMBERS[1:], *(f"box_{name}" for name in _OF_BOXES), "f1", "precision", "recall"]
    return {"map": scores, **{name: DetectionNumber(scores, name) for name in others}}


@cache
def _coco_masks() -> ModuleType:
    """COCO's functions of run lengths.

    Raises:
        UsageError: faster-coco-eval is not installed.
    """
    coco_metric("segm")  # says which package is missing
    return import_module("faster_coco_eval.core.mask")


def mask_overlaps(found: Sequence[str], target: Mapping[str, Any]) -> Tensor:
    """Intersection over union of found (n) and true masks (m), (n, m); of crowds, the share of each mask inside.

    Args:
        found: run lengths of each mask.
        target: of the image `shapes`, `is_crowd` and `size`, as `InstanceScores.update` takes them.
    """
    width, height = target["size"].tolist()
    own = [{"size": [height, width], "counts": text.encode()} for text in found]
    theirs = [{"size": [height, width], "counts": _run_lengths(text, (width, height))} for text in target["shapes"]]
    return _overlaps(own, theirs, target["is_crowd"].int().tolist())


def _overlaps(own: Sequence[_Rle], theirs: Sequence[_Rle], is_crowd: Sequence[int]) -> Tensor:
    found = np.array(_coco_masks().iou(list(own), list(theirs), list(is_crowd))) if own and theirs else np.zeros(0)
    return torch.from_numpy(found.reshape(len(own), len(theirs))).float()


def _run_lengths(text: str, size: tuple[int, int]) -> bytes:
    """The compressed run lengths of a shape in a table; polygons are drawn as COCO's own programs draw them."""
    content = json.loads(text)
    if isinstance(content, Mapping) and "counts" in content:
        return str(content["counts"]).encode()
    width, height = size
    drawn = _coco_masks().merge(_coco_masks().frPyObjects(polygons_of(content, size), height, width))
    counts = drawn["counts"]
    return counts if isinstance(counts, bytes) else str(counts).encode()
