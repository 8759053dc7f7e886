"""Lightning: a LightningModule and a Trainer, as its documentation begins."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from setup import Setup, loader
from torch import nn

PACKAGE = "lightning"
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class _Net(lightning.LightningModule):
    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate = network, rate

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self.network(batch[0])
        self.log("val_accuracy", (outputs.argmax(dim=1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.network(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.rate)


def _trainer(setup: Setup) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=setup.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        precision="bf16-mixed" if setup.tuned else "32-true",
    )


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    val_loader = None if val is None else loader(val, setup, shuffle=False)
    _trainer(setup).fit(_Net(module, setup.rate), loader(train, setup, shuffle=True), val_loader)


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    batches = _trainer(setup).predict(_Net(module, setup.rate), loader(data, setup, shuffle=False))
    return [int(label) for batch in batches or [] for label in batch]
