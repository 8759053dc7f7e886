"""flashtask, in its own words and with its own defaults."""

from __future__ import annotations

import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from setup import Outcome, Setup, accuracy_of, loader
from torch import nn

from flashtask import ImageClassificationData, ImageClassifier, Module, Trainer
from flashtask.cli import run

PACKAGE = "flashtask"
_QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def finetune(setup: Setup, *, frozen: bool) -> Outcome:
    """The work as a user of flashtask writes it, with the backbone frozen or trained."""
    start = time.perf_counter()
    data = ImageClassificationData.from_folders(
        setup.path("elpv", "train"), setup.path("elpv", "val"), batch_size=setup.batch_size, augment="none"
    )
    model = ImageClassifier(
        setup.backbone,
        pretrained=setup.pretrained,
        learning_rate=setup.rate,
        backbone_learning_rate=setup.rate,
        lr_scheduler="constant",
    )
    trainer = Trainer(max_epochs=setup.epochs, seed=setup.seed, enable_model_summary=False, **_QUIET)
    trainer.finetune(model, datamodule=data, strategy="freeze" if frozen else "no_freeze", restore_best=False)
    seconds = time.perf_counter() - start
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    return Outcome(seconds, len(data.train_dataloader().dataset) * setup.epochs, accuracy)


class _Net(Module):
    def __init__(self, layers: nn.Module, rate: float) -> None:
        super().__init__()
        self.layers, self.rate = layers, rate

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    trainer = Trainer(max_epochs=1, seed=setup.seed, enable_model_summary=False, **_QUIET)
    trainer.fit(_Net(module, setup.rate), loader(train, setup, shuffle=True))


def predict_folder(setup: Setup, folder: str) -> Outcome:
    """As a user does: `flashtask predict CKPT FOLDER`, the check of all files and the output included."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "predictions.csv")
        source = str(setup.path(folder))
        start = time.perf_counter()
        code = run(["predict", str(setup.path("model.ckpt")), source, "--format", "csv", "--output", str(output)])
        seconds = time.perf_counter() - start
        assert code == 0, f"flashtask predict ended with {code}"
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    wanted = [Path(row["path"]).parent.name for row in rows]
    return Outcome(seconds, len(rows), accuracy_of([row["label"] for row in rows], wanted))  # type: ignore[arg-type]
