"""`InstanceSegmentation`: any number of objects an image, each with a label, a box and a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.data.boxes import BoxReader
from flashtask.data.decoding import Fitting
from flashtask.data.geometry import Geometry
from flashtask.data.inputs import Input
from flashtask.data.instance_segmentation import InstanceSegmentationData
from flashtask.data.instances import InstanceReader
from flashtask.data.masks import rle_counts
from flashtask.data.shapes import Block, block_counts, shape_text
from flashtask.tasks.batches import StepOutput
from flashtask.tasks.box_loss import boxes_in_file
from flashtask.tasks.instance_loss import FoundObjects, instance_loss, objects_of_outputs
from flashtask.tasks.instance_predictions import Instances
from flashtask.tasks.object_detection import ObjectDetector, whole_target
from flashtask.tasks.predictions import Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy

__all__ = ["InstanceSegmentation"]

#: By which share of its sides a mask may lie beyond its box, so that a box that is a little small cuts nothing off.
_BEYOND = 0.25


class InstanceSegmentation(ObjectDetector):
    """A backbone with a dense head for boxes and masks, judged by COCO's mean average precision of masks.

    The head is that of `ObjectDetector` with a branch for masks (CondInst): each place gives the weights of a small
    network that draws the mask of its object. The loss has a third part, `mask`, by Dice. The threshold of each class
    is the one with the best F1 by the overlap of masks. `predict` gives `Instances`.

    Args:
        backbone: a registered name of a model that has maps at several scales, or a module.
        num_classes: learned from the data if not given; the background is not a class.
        head: `condinst`, another registered name, or a module that has `strides` and the outputs of `CondInstHead`.
        options: those of `ObjectDetector`, such as `resize`, `score_threshold` and `nms_threshold`, and of `Task`.

    Raises:
        UsageError: an invalid value, or a backbone without maps.
    """

    name = "instance_segmentation"
    data_class = InstanceSegmentationData
    prediction_class: ClassVar[type[Prediction]] = Instances
    pipeline_tag = "image-segmentation"
    _reader_class: ClassVar[type[BoxReader]] = InstanceReader

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_classes: int | None = None,
        head: str | nn.Module = "condinst",
        **options: Any,
    ) -> None:
        super().__init__(backbone, num_classes, head, **options)

    def loss(self, outputs: Any, targets: Any) -> Mapping[str, torch.Tensor]:
        """The parts `cls`, `box` and `mask`.

        Args:
            outputs: of the head.
            targets: of each image `boxes` (n, 4) in pixels of the input, `labels` (n,), -1 for a region in which
                nothing is learned, and `masks`: of each box (n, H, W), or as `InstanceReader` gives them.
        """
        return instance_loss(outputs, targets, self._strides)

    def postprocess(self, outputs: Any) -> list[FoundObjects]:  # type: ignore[override]
        """Of each image the boxes and the logits of the masks, the best first."""
        return objects_of_outputs(outputs, self._strides, self.nms_threshold)

    def metric_inputs(self, step: StepOutput) -> tuple[Any, Any]:
        """What was found and what is true, in pixels of the files; of batches that do not know them, of the input."""
        true = [target.get("in_file") or _whole(target) for target in step.targets]
        fitting, found = Fitting(self.preprocessing), []
        for objects, one, target in zip(self.postprocess(step.outputs), true, step.targets, strict=True):
            width, height = one["size"].tolist()
            size = (width, height)
            place = fitting.geometry(size) if "in_file" in target else Geometry(size, size, 0, 0, size)
            rows, counts = _objects_in_file(objects, place)
            found.append((rows, counts))
        return found, true

    def _to_judge(self, found: Any, true: Any) -> tuple[Any, Any, list[torch.Tensor] | None]:
        from flashtask.tasks.instance_metrics import mask_overlaps

        overlaps = [mask_overlaps(counts, one) for (_, counts), one in zip(found, true, strict=True)]
        return [rows for rows, _ in found], true, overlaps

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """COCO's twelve numbers of masks, three of boxes, and F1, precision and recall of what `predict` gives."""
        from flashtask.tasks.instance_metrics import instance_metrics

        return instance_metrics(num_outputs)

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Average precision and F1 of each class, by masks."""
        from flashtask.tasks.instance_metrics import InstanceClassScores

        thresholds = self._thresholds_of(num_outputs)
        numbers = {"average_precision": "average_precision", "f1": "f1_by_class"}
        return {name: InstanceClassScores(num_outputs, thresholds, number) for name, number in numbers.items()}

    def to_predictions(  # type: ignore[override]
        self, outputs: Sequence[FoundObjects], samples: Sequence[Input]
    ) -> Sequence[Instances]:
        """`Instances` an image, those that reach the threshold of their class, in pixels of its file."""
        found = []
        for objects, sample in zip(outputs, samples, strict=True):
            is_predicted, place = self._is_predicted(objects.boxes), sample.placed(self.preprocessing)
            rows, counts = _objects_in_file(objects.chosen(is_predicted), place)
            masks = tuple({"size": list(place.whole[::-1]), "counts": text} for text in counts)
            found.append(Instances(sample.path, **self._columns_of(rows), masks=masks, size=place.whole))
        return found


def _objects_in_file(found: FoundObjects, place: Geometry) -> tuple[torch.Tensor, list[str]]:
    """Boxes (n, 6) and run lengths of masks in pixels of the file; an object without a pixel is left out.

    A mask is looked at in its box and a little beyond.
    """
    found = found.cpu()
    rows = boxes_in_file(found.boxes, place)
    kept, counts = [], []
    for number, box in enumerate(rows[:, :4].tolist()):
        columns, lines = (_around(box[axis], box[axis + 2], place.whole[axis]) for axis in (0, 1))
        height, width = found.features.shape[-2:]
        across = _steps(columns, place.whole[0] / place.resized[0], place.left, found.stride, width)
        down = _steps(lines, place.whole[1] / place.resized[1], place.top, found.stride, height)
        mask = found.chosen(slice(number, number + 1)).masks(across, down)
        part = replace(
            place,
            left=place.left + across.start * found.stride,
            top=place.top + down.start * found.stride,
            size=(mask.shape[2] * found.stride, mask.shape[1] * found.stride),
        )
        inside = part.map_in_file(mask, rows=lines, columns=columns)[0] > 0
        if inside.any():
            kept.append(number)
            counts.append(block_counts(Block(columns.start, lines.start, inside.numpy()), place.whole))
    return rows[kept], counts


def _around(start: float, end: float, most: int) -> range:
    """The pixels of a file in which the mask of a box is looked at, along one axis."""
    beyond = _BEYOND * (end - start) + 1
    return range(max(0, int(start - beyond)), min(most, int(end + beyond) + 1))


def _steps(pixels: range, scale: float, offset: int, stride: int, most: int) -> slice:
    """The steps of the features that pixels of the file lie in, along one axis, with the two beside them."""
    first, last = (int((end / scale - offset) // stride) for end in (pixels.start, pixels.stop))
    start = min(max(0, first - 1), most - 1)
    return slice(start, max(start + 1, min(most, last + 2)))


def _whole(target: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What metrics compare with where a batch of the user's own loader has `boxes`, `labels`, `masks` (n, H, W)."""
    masks = target["masks"].bool().cpu().numpy()
    size = list(masks.shape[1:])
    shapes = [shape_text({"size": size, "counts": rle_counts(mask)}) for mask in masks]
    areas = target["masks"].flatten(1).sum(1)
    return {**whole_target(target), "areas": areas, "shapes": shapes, "size": torch.tensor(size[::-1])}
