"""fastai: a Learner around plain PyTorch loaders, as its documentation shows for those who have them."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from setup import Setup, loader
from torch import nn

warnings.filterwarnings("ignore")

from fastai.vision.all import DataLoaders, Learner, OptimWrapper, accuracy  # noqa: E402

PACKAGE = "fastai"


def _learner(module: nn.Module, train: Any, val: Any, setup: Setup) -> Any:
    loaders = DataLoaders(loader(train, setup, shuffle=True), loader(val, setup, shuffle=False))
    return Learner(
        loaders,
        module,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        lr=setup.rate,
        metrics=accuracy,
        train_bn=False,
    )


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    # A Learner validates after each epoch; one without validation data is given a batch of the training data.
    few = torch.utils.data.Subset(train, range(setup.batch_size))
    learner = _learner(module, train, few if val is None else val, setup)
    with learner.no_bar(), learner.no_logging():
        learner.fit(setup.epochs)


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    learner = _learner(module, data, data, setup)
    with learner.no_bar(), learner.no_logging():
        outputs, _ = learner.get_preds(dl=loader(data, setup, shuffle=False))
    return outputs.argmax(dim=1).tolist()
