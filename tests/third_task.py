"""A task that flashtask does not have, in one file: the direction of a bar in a picture, as an angle.

Its targets are read by a reader of its own, its loss has two parts, and its predictions are a record of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchmetrics import MeanMetric

from flashtask import ImageData, Prediction, TargetReader, Task
from flashtask.core.errors import BadDataError


@dataclass(frozen=True)
class AngleReader(TargetReader):
    """Degrees, read as cosine and sine (N, 2) float32."""

    kind = "angle"

    def read(self, raw: Any, source: Any) -> Any:
        """Cosine and sine of each angle."""
        try:
            angles = np.radians(raw.astype(np.float64))
        except ValueError as error:
            raise BadDataError(f"{source.argument}: an angle is not a number of degrees", why=str(error)) from None
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class AngleData(ImageData):
    """Images with an angle in degrees each."""

    readers = (AngleReader,)


@dataclass(frozen=True)
class Angle(Prediction):
    """An angle in degrees, from 0 to below 360."""

    degrees: float

    def as_row(self, **options: Any) -> dict[str, Any]:
        """`path` and `degrees`."""
        return {"path": self.path, "degrees": self.degrees}


class _AngularError(MeanMetric):
    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:  # type: ignore[override]
        cosines = torch.nn.functional.cosine_similarity(outputs, targets).clamp(-1, 1)
        super().update(torch.rad2deg(torch.arccos(cosines)))


class AnglePredictor(Task):
    """Two outputs, cosine and sine."""

    name = "angle"
    monitor, monitor_mode = "val_degrees", "min"
    data_class = AngleData
    prediction_class = Angle

    def __init__(self, backbone: str = "timm/test_resnet", **options: Any) -> None:
        super().__init__(backbone, "linear", num_outputs=2, **options)
        self.save_hyperparameters()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The direction, and that the outputs lie near the unit circle."""
        direction = 1 - torch.nn.functional.cosine_similarity(outputs, targets).mean()
        return {"direction": direction, "length": 0.1 * (outputs.norm(dim=1) - 1).square().mean()}

    def make_metrics(self, num_outputs: int) -> dict[str, Any]:
        """The mean difference in degrees."""
        return {"degrees": _AngularError()}

    def to_predictions(self, outputs: torch.Tensor, samples: Any) -> list[Angle]:
        """An `Angle` an image."""
        angles = torch.rad2deg(torch.atan2(outputs[:, 1], outputs[:, 0])) % 360
        return [Angle(sample.path, angle) for sample, angle in zip(samples, angles.tolist(), strict=True)]


def write_bars(folder: Any, count: int = 24) -> Any:
    """A table `bars.csv` of pictures with a bar from the middle outwards, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,direction"]
    for number in range(count):
        angle = 360 * number / count
        picture = Image.new("RGB", (32, 32), "black")
        end = (16 + 14 * math.cos(math.radians(angle)), 16 + 14 * math.sin(math.radians(angle)))
        ImageDraw.Draw(picture).line([(16, 16), end], "white", 4)
        picture.save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,{angle}")
    (folder / "bars.csv").write_text("\n".join(lines) + "\n")
    return folder / "bars.csv"
