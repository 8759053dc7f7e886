"""A task of another package, found by flashtask through its entry point: how bright an image is, as one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric

from flashtask import ImageClassificationData, Task

__all__ = ["BrightnessRegressor", "NumberedFolders"]


class NumberedFolders(ImageClassificationData):
    """Class folders whose names are numbers; a target is that number, not the index of the class."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The numbers, float32 (B,), in the place of the class indices; images without a target stay as they are."""
        if not isinstance(batch, (list, tuple)):
            return batch
        images, indices = batch
        return images, torch.tensor([float(label) for label in self.labels], device=indices.device)[indices]


class BrightnessRegressor(Task):
    """One number an image, trained by the squared error and judged by the absolute one."""

    name = "example_brightness"
    monitor = "val_mean_error"
    monitor_mode = "min"
    data_class = NumberedFolders

    def __init__(
        self, backbone: str | nn.Module = "resnet18", head: str | nn.Module = "linear", **options: Any
    ) -> None:
        super().__init__(backbone, head, num_outputs=1, **options)
        self.save_hyperparameters()

    def forward(self, images: Tensor) -> Tensor:
        """Numbers (B,) of images (B, C, H, W)."""
        return super().forward(images).squeeze(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of numbers (B,) and numbers (B,)."""
        return nn.functional.mse_loss(outputs, targets)

    def make_metrics(self, num_outputs: int) -> dict[str, Metric]:
        """The mean absolute error."""
        return {"mean_error": MeanAbsoluteError()}
