"""Metrics of masks, over all pixels of a data set that count. Importing this imports torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics import classification as of_classes

from flashtask.core.errors import UsageError
from flashtask.data.semantic_segmentation import IGNORED
from flashtask.tasks.metrics import Maker, NamedMetrics, label_metrics, named_metrics

__all__ = ["BoundaryF", "mask_metrics", "mask_metrics_by_class", "named_mask_metrics"]


class _OverPixels:
    """Gives a metric of torchmetrics the pixels of maps (H, W), of any sizes, that count."""

    def update(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Take the maps of a batch: class numbers, 255 in the targets where none counts."""
        counted = [target != IGNORED for target in targets]
        flat = [torch.cat([one[where] for one, where in zip(m, counted, strict=True)]) for m in (predicted, targets)]
        if len(flat[0]):
            super().update(*(one.long() for one in flat))  # type: ignore[misc]


def _over_pixels(kind: Any) -> Any:
    """The metric for maps that a class of torchmetrics becomes."""
    return type(kind.__name__, (_OverPixels, kind), {})


_IoU, _Dice, _Accuracy = map(
    _over_pixels, (of_classes.MulticlassJaccardIndex, of_classes.MulticlassF1Score, of_classes.MulticlassAccuracy)
)


class BoundaryF(Metric):
    """F1 of the borders of classes, with a tolerance (Csurka et al., BMVC 2013), the mean over classes.

    Precision is the share of the predicted border pixels that lie near a true one, recall the share of the true ones
    that lie near a predicted one, both over the whole data set. Borders with pixels that do not count are left out.

    Args:
        num_classes: how many there are.
        tolerance: share of the diagonal of an image that is near, at least a pixel.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, tolerance: float = 0.0075) -> None:
        super().__init__()
        self.num_classes, self.tolerance = num_classes, tolerance
        self.add_state("counts", torch.zeros(num_classes, 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Take the maps of a batch, as other metrics of masks."""
        for own, target in zip(predicted, targets, strict=True):
            height, width = target.shape
            reach = max(1, round(self.tolerance * (height**2 + width**2) ** 0.5))
            counted = ~_spread((target == IGNORED)[None], 1)[0]
            for number in range(self.num_classes):
                borders = [_border(one == number) & counted for one in (own, target)]
                if borders[0].any() or borders[1].any():
                    near = [_spread(border[None], reach)[0] for border in borders]
                    found = (
                        (borders[0] & near[1]).sum(),
                        borders[0].sum(),
                        (borders[1] & near[0]).sum(),
                        borders[1].sum(),
                    )
                    self.counts[number] += torch.stack(found)

    def compute(self) -> Tensor:
        """The mean over classes with a border; NaN without any."""
        right, predicted, reached, there = self.counts.unbind(1)
        precision, recall = right / predicted.clamp(min=1), reached / there.clamp(min=1)
        each = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return each[(predicted + there) > 0].mean()


def _border(region: Tensor) -> Tensor:
    """The pixels of a region (H, W) beside another one; the edge of the image is no border."""
    return region & _spread(~region[None], 1)[0]


def _spread(regions: Tensor, reach: int) -> Tensor:
    """Regions (N, H, W) with all that is at most so many pixels away along both axes."""
    return functional.max_pool2d(regions[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def mask_metrics(num_classes: int) -> dict[str, Metric]:
    """Those that every segmentation has; a class that is neither there nor predicted does not count in a mean."""
    return {
        "miou": _IoU(num_classes, validate_args=False),
        "dice": _Dice(num_classes, average="macro", validate_args=False),
        "pixel_accuracy": _Accuracy(num_classes, average="micro", validate_args=False),
        "boundary_f": BoundaryF(num_classes),
    }


def mask_metrics_by_class(num_classes: int) -> dict[str, Metric]:
    """IoU, Dice, precision and recall of each class."""
    precision, recall = map(_over_pixels, (of_classes.MulticlassPrecision, of_classes.MulticlassRecall))
    made = {"iou": _IoU, "dice": _Dice, "precision": precision, "recall": recall}
    return {name: kind(num_classes, average=None, validate_args=False) for name, kind in made.items()}


#: Metrics of torchmetrics for class numbers, which need no probabilities.
_NUMBERS: tuple[str, ...] = (
    "accuracy",
    "precision",
    "recall",
    "f1_score",
    "f1",
    "fbeta_score",
    "fbeta",
    "jaccard_index",
    "iou",
)
_NUMBERS += ("specificity", "cohen_kappa", "kappa", "matthews_corr_coef", "mcc", "balanced_accuracy")


def named_mask_metrics(given: Any, num_classes: int) -> NamedMetrics:
    """Further metrics by name, with or without arguments, as for `ImageClassifier`.

    Raises:
        UsageError: a metric that is an object: those of torchmetrics do not take masks of several sizes.
    """
    if isinstance(given, Metric) or (isinstance(given, (list, tuple)) and any(isinstance(g, Metric) for g in given)):
        raise UsageError("metrics of masks are given by name", fix='metrics=["mcc"]')
    known: dict[str, Maker] = {}
    for name in _NUMBERS:
        make: Any = label_metrics.get(name)
        if make is not None:
            known[name] = type(make)(_over_pixels(make.kind), make.counted, **make.fixed)
    return named_metrics(given, known, num_classes)
