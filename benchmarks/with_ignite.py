"""PyTorch-Ignite: its supervised trainer and evaluator."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from setup import Setup, loader
from torch import nn

PACKAGE = "pytorch-ignite"


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=setup.rate)
    trainer = create_supervised_trainer(module, optimizer, nn.CrossEntropyLoss())
    if val is not None:
        evaluator = create_supervised_evaluator(module, metrics={"accuracy": Accuracy()})
        batches = loader(val, setup, shuffle=False)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(batches))
    trainer.run(loader(train, setup, shuffle=True), max_epochs=setup.epochs)


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    evaluator = create_supervised_evaluator(module)
    found: list[int] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: found.extend(engine.state.output[0].argmax(dim=1).tolist())
    )
    evaluator.run(loader(data, setup, shuffle=False))
    return found
