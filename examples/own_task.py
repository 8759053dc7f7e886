"""A task of your own: predict a number from an image, here how bright it is. Run: `python examples/own_task.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchmetrics import MeanAbsoluteError, Metric

from flashtask import ImageClassificationData, Task, Trainer


class Brightness(Task):
    """One number an image: class folders are named by it, such as `0.2`."""

    name = "brightness"
    monitor, monitor_mode = "val_error", "min"

    def __init__(self, backbone: str = "timm/test_resnet", **options: Any) -> None:
        super().__init__(backbone, "linear", num_outputs=1, **options)
        self.save_hyperparameters()

    def connect(self, datamodule: Any) -> None:
        """Keep the numbers that the folders stand for."""
        super().connect(datamodule)
        self.values = torch.tensor([float(label) for label in datamodule.labels])

    def to_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """The numbers (B, 1) that the class indices (B,) stand for."""
        return self.values.to(targets.device)[targets].unsqueeze(1)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean squared error of numbers (B, 1)."""
        return torch.nn.functional.mse_loss(outputs, targets)

    def make_metrics(self, num_outputs: int) -> dict[str, Metric]:
        """Mean absolute error, in the number's own unit."""
        return {"error": MeanAbsoluteError()}


def make_images(root: Path, each: int = 12) -> Path:
    """Noisy grey pictures in folders named by their mean brightness."""
    generator = np.random.default_rng(0)
    for value in (0.2, 0.5, 0.8):
        (root / str(value)).mkdir(parents=True)
        for index in range(each):
            pixels = np.clip(255 * (value + generator.normal(0, 0.1, (48, 48, 3))), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(value) / f"{index}.png")
    return root


def main(folder: Path) -> float:
    """Train for a few epochs; gives the mean absolute error of the best one."""
    data = ImageClassificationData.from_folders(
        train_folder=make_images(folder / "images"), val_split=0.25, batch_size=4
    )
    model = Brightness(pretrained=False, learning_rate=0.003)
    trainer = Trainer(max_epochs=8, default_root_dir=folder)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    (metrics,) = trainer.validate(model, datamodule=data)
    return float(metrics["val_error"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(f"mean absolute error: {main(Path(scratch)):.3f}")
