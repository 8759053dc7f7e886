"""transformers: its Trainer, which takes any module that returns a loss."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from setup import Setup
from torch import nn
from transformers import Trainer, TrainingArguments

PACKAGE = "transformers"
warnings.filterwarnings("ignore")


class _Net(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {
        "images": torch.stack([image for image, _ in samples]),
        "labels": torch.tensor([int(label) for _, label in samples]),
    }


def _trainer(module: nn.Module, train: Any, val: Any, setup: Setup, place: str) -> Trainer:
    arguments = TrainingArguments(
        output_dir=place,
        num_train_epochs=setup.epochs,
        per_device_train_batch_size=setup.batch_size,
        per_device_eval_batch_size=setup.batch_size,
        learning_rate=setup.rate,
        weight_decay=0.01,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        eval_strategy="no" if val is None else "epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=setup.tuned,
        dataloader_num_workers=setup.workers,
        seed=setup.seed,
    )
    return Trainer(_Net(module), arguments, data_collator=_collate, train_dataset=train, eval_dataset=val)


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    with tempfile.TemporaryDirectory() as place:
        _trainer(module, train, val, setup, place).train()


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    with tempfile.TemporaryDirectory() as place:
        found = _trainer(module, None, data, setup, place).predict(data)
    return np.argmax(found.predictions, axis=1).tolist()
