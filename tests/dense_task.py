"""A family of tasks on maps in one file: the place of one point in each image, found by a heatmap.

Nothing in the package knows it. It has a reader of targets that move with the image, a head that takes maps, a loss
over all pixels, and predictions in the pixels of the user's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.tv_tensors import KeyPoints

from flashtask import HEADS, ImageData, Prediction, SpatialReader, Task
from flashtask.core.errors import BadDataError

#: Pixels of the input in a pixel of the heatmap, along one side.
STRIDE = 4


@dataclass(frozen=True)
class PointReader(SpatialReader):
    """One point, in the pixels of the file: columns x and y."""

    kind = "point"

    def read(self, raw: Any, source: Any) -> Any:
        """The coordinates (N, 2) float32."""
        try:
            return raw.astype(np.float64).astype(np.float32)
        except ValueError as error:
            raise BadDataError(f"{source.argument}: a coordinate is not a number", why=str(error)) from None

    def target(self, value: Any, size: tuple[int, int]) -> Any:
        """The point in the whole picture."""
        return KeyPoints(torch.from_numpy(value.copy())[None], canvas_size=size[::-1])

    def finished(self, target: Any) -> Tensor:
        """(2,) float32, in pixels of the input; it may lie outside."""
        return target.as_subclass(Tensor)[0].float()


class PointData(ImageData):
    """Images with a point each."""

    readers = (PointReader,)


@dataclass(frozen=True)
class Point(Prediction):
    """A point, in pixels of the file."""

    x: float
    y: float

    def as_row(self, **options: Any) -> dict[str, Any]:
        """`path`, `x` and `y`."""
        return {"path": self.path, "x": self.x, "y": self.y}


class HeatmapHead(nn.Module):
    """All maps at the scale of the finest, then one convolution: (B, num_outputs, h, w) logits."""

    takes = "maps"

    def __init__(self, features: Any, num_outputs: int, *, width: int = 16) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in features.channels)
        self.out = nn.Conv2d(width, num_outputs, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        same = [
            nn.functional.interpolate(one(each), size, mode="bilinear")
            for one, each in zip(self.lateral, maps, strict=True)
        ]
        return self.out(torch.stack(same).sum(0).relu())


class _Distance(MeanMetric):
    def update(self, points: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update((points - targets).norm(dim=1))


class PointFinder(Task):
    """The pixel of a heatmap in which the point lies, by cross-entropy over all pixels."""

    name = "point"
    monitor, monitor_mode = "val_distance", "min"
    data_class = PointData
    prediction_class = Point
    heads_take = ("maps",)

    def __init__(self, backbone: Any = "timm/test_resnet", head: Any = "heatmap", **options: Any) -> None:
        options["backbone_options"] = {"out_indices": [1, 2, 3], **(options.get("backbone_options") or {})}
        super().__init__(backbone, head, num_outputs=1, **options)
        self.save_hyperparameters()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with the pixel that the point lies in."""
        height, width = outputs.shape[-2:]
        column, row = ((targets / STRIDE).long().clamp(min=0)).unbind(1)
        place = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
        return nn.functional.cross_entropy(outputs.flatten(1), place)

    def postprocess(self, outputs: Tensor) -> Tensor:
        """Points (B, 2) in pixels of the input: the mean place, by the probabilities."""
        height, width = outputs.shape[-2:]
        chances = outputs.flatten(1).softmax(dim=1).view(-1, height, width)
        x = (chances.sum(1) * (torch.arange(width) + 0.5)).sum(1)
        y = (chances.sum(2) * (torch.arange(height) + 0.5)).sum(1)
        return torch.stack([x, y], dim=1) * STRIDE

    def make_metrics(self, num_outputs: int) -> dict[str, Any]:
        """The mean distance in pixels of the input."""
        return {"distance": _Distance()}

    def to_predictions(self, outputs: Tensor, samples: Any) -> list[Point]:
        """A `Point` an image, in pixels of its file."""
        placed = [sample.placed(self.preprocessing) for sample in samples]
        points = [where.points_in_file(point) for where, point in zip(placed, outputs.cpu(), strict=True)]
        return [Point(sample.path, *point.tolist()) for sample, point in zip(samples, points, strict=True)]


def register() -> None:
    """Make the head known by its name."""
    HEADS.register("heatmap", HeatmapHead)


def write_points(folder: Any, count: int = 24, size: tuple[int, int] = (96, 64), radius: int = 4) -> Any:
    """A table `points.csv` of dark pictures with one white square each, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,x,y"]
    places = np.random.default_rng(0).integers(16, [size[0] - 16, size[1] - 16], (count, 2))
    for number, (x, y) in enumerate(places.tolist()):
        pixels = np.full((size[1], size[0], 3), 20, dtype=np.uint8)
        pixels[y - radius : y + radius, x - radius : x + radius] = 250
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,{x},{y}")
    (folder / "points.csv").write_text("\n".join(lines) + "\n")
    return folder / "points.csv"
