"""skorch: a NeuralNetClassifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from setup import Setup
from skorch import NeuralNetClassifier
from skorch.helper import predefined_split
from torch import nn

PACKAGE = "skorch"


def _net(module: nn.Module, val: Any, setup: Setup) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=setup.rate,
        max_epochs=setup.epochs,
        batch_size=setup.batch_size,
        iterator_train__shuffle=True,
        train_split=None if val is None else predefined_split(val),
        classes=range(len(getattr(val, "classes", range(10)))),
        verbose=0,
    )


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    _net(module, val, setup).fit(train, y=None)


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    net = _net(module, data, setup).initialize()
    return np.argmax(net.forward(data).numpy(), axis=1).tolist()
