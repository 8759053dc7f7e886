"""What an exported model gives, by task: computed in the graph, read back, and compared with the task itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flashtask.core.library_internals import repeated_while
from flashtask.tasks.box_loss import LEAST_SCORE, MOST_BOXES, MOST_PLACES, Places, boxes_in_file, flat_outputs
from flashtask.tasks.masks import classes_in_file

if TYPE_CHECKING:
    from flashtask.data.geometry import Geometry
    from flashtask.tasks.export.resize import Place

__all__ = ["Arrays", "BoxOutputs", "FeatureOutputs", "LabelOutputs", "MaskOutputs", "NumberOutputs", "Outputs"]

#: What a runtime gives for a batch, by the name of the output.
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Outputs:
    """One tensor an image, as the task's `postprocess` gives it.

    Args:
        name: of the output.
    """

    #: Of each output, what its axes are called after that of the images.
    axes: Mapping[str, tuple[str, ...]]
    #: How far apart two results may be that count as the same, in the unit of `difference`.
    tolerance: ClassVar[float] = 1e-3
    #: What `difference` measures.
    unit: ClassVar[str] = "score"
    #: Whether results are places in the picture.
    is_spatial: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.axes = {name: ("outputs",)}

    def in_graph(self, task: Any, outputs: Any, place: Place | None) -> tuple[Tensor, ...]:
        """The outputs of a batch, in torch operations that every runtime has.

        Args:
            task: whose outputs they are.
            outputs: of its head.
            place: of the pictures in the inputs; None where the graph begins with inputs.
        """
        return (task.postprocess(outputs),)

    def of_task(self, postprocessed: Any, places: Sequence[Geometry | None]) -> list[Tensor]:
        """For each image the task's own result, as its metrics take it.

        Args:
            postprocessed: of a batch.
            places: of the images in the inputs; None for results in pixels of the input.
        """
        return list(postprocessed)

    def of_runtime(self, arrays: Arrays, scale: tuple[float, float]) -> list[Tensor]:
        """For each image the result of a runtime, in the same form.

        Args:
            arrays: of a batch.
            scale: pixels of the file in a pixel of the picture that the runtime got, along width and height.
        """
        return list(torch.from_numpy(arrays[self.name]))

    def batch(self, results: Sequence[Tensor]) -> Any:
        """The results of images, as a metric takes a batch of them."""
        return torch.stack(list(results))

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """How far the result of a runtime is from that of the task."""
        return float((ours - theirs).abs().max()) if ours.numel() else 0.0

    def is_same(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether a user would read the same from both."""
        return self.difference(ours, theirs) <= self.tolerance


class LabelOutputs(Outputs):
    """Probabilities of classes.

    Args:
        thresholds: of several labels an image; None where the most probable one counts.
    """

    def __init__(self, thresholds: Sequence[float] | None) -> None:
        super().__init__("scores")
        self.axes = {"scores": ("classes",)}
        self.thresholds = None if thresholds is None else torch.tensor(list(thresholds), dtype=torch.float64)

    def is_same(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether the label, or every one of several, is the same."""
        if self.thresholds is None:
            return bool(ours.argmax() == theirs.argmax())
        return bool(((ours >= self.thresholds) == (theirs >= self.thresholds)).all())


class NumberOutputs(Outputs):
    """Numbers in their own unit.

    Args:
        scale: the standard deviation of each, by which differences are divided.
    """

    unit = "standard deviation"

    def __init__(self, scale: Tensor) -> None:
        super().__init__("values")
        self.axes = {"values": ("targets",)}
        self.scale = scale

    def batch(self, results: Sequence[Tensor]) -> Tensor:
        """(B,) if there is one number an image, else (B, targets)."""
        found = torch.stack(list(results))
        return found[:, 0] if found.shape[1] == 1 else found

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """The largest, in standard deviations of the training targets."""
        return super().difference(ours / self.scale, theirs / self.scale)


class FeatureOutputs(Outputs):
    """Feature vectors, which differ by the length of their difference as a share of their own."""

    unit = "length"

    def __init__(self) -> None:
        super().__init__("features")
        self.axes = {"features": ("features",)}

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """The length of the difference, as a share of that of the task's own vector."""
        return float((ours - theirs).norm() / ours.norm().clamp(min=1e-12))


class MaskOutputs(Outputs):
    """The class of each pixel of the picture; two masks differ by a share of the pixels."""

    tolerance = 1e-4
    unit = "share of the pixels"
    is_spatial = True

    def __init__(self) -> None:
        super().__init__("classes")
        self.axes = {"classes": ("height", "width")}

    def in_graph(self, task: Any, outputs: Tensor, place: Place | None) -> tuple[Tensor]:
        """(N, H, W) uint8, in the pixels of the picture, else of the input."""
        chances = task.postprocess(outputs)
        if place is not None:
            chances = _in_picture(chances, place)
        return (chances.argmax(dim=1).to(torch.uint8),)

    def of_task(self, postprocessed: Tensor, places: Sequence[Geometry | None]) -> list[Tensor]:
        """Maps (H, W) of class numbers in the pixels of the files."""
        return [
            chances.argmax(dim=0) if place is None else classes_in_file(chances, place)
            for chances, place in zip(postprocessed, places, strict=True)
        ]

    def of_runtime(self, arrays: Arrays, scale: tuple[float, float]) -> list[Tensor]:
        """The maps as they are: for them pictures are decoded whole."""
        return list(torch.from_numpy(arrays["classes"]).long())

    def batch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """A list, because files differ in size."""
        return list(results)

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """The share of the pixels whose class differs."""
        return float((ours != theirs).double().mean())


def _in_picture(chances: Tensor, place: Place) -> Tensor:
    """Maps over the input as maps over the pictures, as `Geometry.map_in_file` computes them."""
    axes = []
    for axis in range(2):
        pixels = place.pixels[axis].to(chances.dtype)
        ratio = place.resized[axis].double() / place.whole[axis].double()
        middles = (pixels + 0.5) * ratio.to(chances.dtype) - place.starts[axis].to(chances.dtype)
        axes.append(middles * (2 / chances.shape[2 + axis]) - 1)
    down, across = torch.meshgrid(axes[0], axes[1], indexing="ij")
    grid = torch.stack([across, down], dim=-1)[None].expand(chances.shape[0], -1, -1, -1)
    return functional.grid_sample(chances, grid, "bilinear", "border", align_corners=False)


class BoxOutputs(Outputs):
    """At most 100 boxes an image, the best first: those of a dense head after non-maximum suppression.

    Args:
        thresholds: of each class, from which score on a box is predicted.
        strides: of the head's maps.
        nms_threshold: overlap with a better box of its class above which a box is left out.
    """

    is_spatial = True

    def __init__(self, thresholds: Sequence[float], strides: Sequence[int], nms_threshold: float) -> None:
        super().__init__("boxes")
        self.axes = {"boxes": ("boxes", "corners"), "scores": ("boxes",), "labels": ("boxes",)}
        self.thresholds = torch.tensor(list(thresholds))
        self.strides, self.nms_threshold = tuple(strides), nms_threshold

    def in_graph(self, task: Any, outputs: Sequence[Tensor], place: Place | None) -> tuple[Tensor, ...]:
        """Boxes (N, 100, 4), their scores (N, 100) and their labels (N, 100); where there is none, 0, 0 and -1."""
        distances, logits = flat_outputs(outputs)
        scores, count = logits.sigmoid(), logits.shape[2]
        most = min(MOST_PLACES, scores.shape[1] * count)
        values, order = scores.flatten(1).topk(most)
        every = Places(outputs, self.strides).boxes(distances)
        rows = torch.div(order, count, rounding_mode="floor")
        boxes = every.gather(1, rows[..., None].expand(-1, -1, 4))
        classes = order - rows * count
        kept = _suppressed(boxes, values, classes, self.nms_threshold)
        is_there = kept < most
        kept = kept.clamp(max=most - 1)
        boxes = boxes.gather(1, kept[..., None].expand(-1, -1, 4))
        if place is not None:
            offset = place.starts.flip(0).float().repeat(2)
            scale = (place.whole.double() / place.resized.double()).float().flip(0).repeat(2)
            edge = place.whole.flip(0).float().repeat(2)
            boxes = ((boxes + offset) * scale).clamp(min=0).minimum(edge)
        return (
            boxes.where(is_there[..., None], 0.0),
            values.gather(1, kept).where(is_there, 0.0),
            classes.gather(1, kept).where(is_there, -1),
        )

    def of_task(self, postprocessed: Sequence[Tensor], places: Sequence[Geometry | None]) -> list[Tensor]:
        """Rows (n, 6) in pixels of the files."""
        pairs = zip(postprocessed, places, strict=True)
        return [rows if place is None else boxes_in_file(rows, place) for rows, place in pairs]

    def of_runtime(self, arrays: Arrays, scale: tuple[float, float]) -> list[Tensor]:
        """Rows (n, 6) in pixels of the files."""
        boxes, scores, labels = (torch.from_numpy(arrays[name]) for name in self.axes)
        rows = torch.cat([boxes * boxes.new_tensor(scale * 2), scores[..., None], labels[..., None].float()], dim=2)
        return [one[own >= 0] for one, own in zip(rows, labels, strict=True)]

    def batch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """A list, because images have different numbers of boxes."""
        return list(results)

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """The largest difference of scores between boxes that both predict; 1 where they predict different boxes."""
        own, other = (self._predicted(rows) for rows in (ours, theirs))
        if own.shape != other.shape:
            return 1.0
        found, left = 0.0, list(range(len(other)))
        for row in own:
            apart = [float((row[:4] - other[place, :4]).abs().max()) for place in left]
            same = [one for one, gap in zip(left, apart, strict=True) if gap <= 1 and row[5] == other[one, 5]]
            if not same:
                return 1.0
            nearest = min(same, key=lambda place: float((row - other[place]).abs().max()))
            found = max(found, float((row[4] - other[nearest, 4]).abs()))
            left.remove(nearest)
        return found

    def _predicted(self, rows: Tensor) -> Tensor:
        return rows[rows[:, 4] >= self.thresholds[rows[:, 5].long()]]


def _suppressed(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression in each class.

    Args:
        boxes: (N, K, 4), the best first.
        scores: (N, K).
        classes: (N, K).
        threshold: overlap above which a worse box of the same class is left out.

    Returns:
        (N, 100) places among the K of what is kept, the best first; K where nothing is left.
    """
    number = boxes.shape[1]
    places = torch.arange(number, device=boxes.device)
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    columns = torch.arange(MOST_BOXES, device=boxes.device)

    def step(turn: Tensor, alive: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = places.where(alive, number).amin(dim=1, keepdim=True)
        at = best.clamp(max=number - 1)
        one = boxes.gather(1, at[..., None].expand(-1, -1, 4))
        corner = torch.maximum(one[..., :2], boxes[..., :2])
        sides = (torch.minimum(one[..., 2:], boxes[..., 2:]) - corner).clamp(min=0)
        shared = sides[..., 0] * sides[..., 1]
        overlap = shared / (areas.gather(1, at) + areas - shared)
        is_lost = (overlap > threshold) & (classes == classes.gather(1, at))
        return turn + 1, alive & ~is_lost & (places != best), best.where(columns == turn, kept)

    alive = scores >= LEAST_SCORE
    kept = torch.full_like(classes[:, :1], number).expand(-1, MOST_BOXES).contiguous()
    start = torch.zeros((), dtype=torch.int64, device=boxes.device)
    return repeated_while(lambda turn, alive, kept: turn < MOST_BOXES, step, (start, alive, kept))[2]
