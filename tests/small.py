"""Small things that several tests train: coloured images in class folders, a module on random numbers."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Module, Trainer

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def made_long_ago(files: Iterable[str | os.PathLike[str]], second: int = 1) -> None:
    """Date files back, and wait until the kernel's own time of change, which nobody can set, counts as past too."""
    for file in files:
        os.utime(file, (second, second))
    time.sleep(0.15)


def colour_folders(root: Path, each: int = 8, classes: tuple[str, ...] = ("blue", "red"), size: int = 40) -> Path:
    """Class folders of noisy one-coloured PNGs: easy to learn, no two alike."""
    generator = np.random.default_rng(zlib.crc32(root.name.encode()))
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(each):
            noise = generator.integers(-40, 40, (size, size, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


class Net(Module):
    """A small module with everything that makes exact resuming hard: dropout, BatchNorm, a schedule."""

    def __init__(self, width: int = 8, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = torch.nn.Sequential(
            torch.nn.Linear(4, width),
            torch.nn.ReLU(),  # before BatchNorm, without which only rounding would move the bias of the layer before
            torch.nn.BatchNorm1d(width),
            torch.nn.Linear(width, width),
        )
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, inputs):
        return self.head(self.drop(self.backbone(inputs)))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = torch.nn.functional.cross_entropy(self(inputs), targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self(inputs), targets))

    def test_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("test_loss", torch.nn.functional.cross_entropy(self(inputs), targets))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)}


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def loaders(samples: int = 50, batch_size: int = 8) -> tuple[DataLoader, DataLoader]:
    """A shuffled loader and a plain one over the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 4, generator=generator)
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    return DataLoader(data, batch_size=batch_size, shuffle=True), DataLoader(data, batch_size=batch_size)


def quiet(tmp_path: Path, **options: Any) -> Trainer:
    """A trainer for one epoch that prints nothing and logs nothing."""
    given = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False, **options}
    return Trainer(default_root_dir=tmp_path, **given)


def digest(module: torch.nn.Module) -> str:
    """A hash of every weight and buffer."""
    parts = [name.encode() + value.numpy().tobytes() for name, value in module.state_dict().items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
