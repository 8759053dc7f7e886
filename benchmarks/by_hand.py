"""The loop that one would write oneself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from setup import Setup, loader
from torch import nn

PACKAGE = "torch"


def autocast(setup: Setup) -> Any:
    """bfloat16 where it was asked for."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if setup.tuned else nullcontext()


def fit(module: nn.Module, train: Any, val: Any, setup: Setup) -> None:
    """Train what requires gradients, and validate after each epoch."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=setup.rate)
    batches = loader(train, setup, shuffle=True)
    for _ in range(setup.epochs):
        module.train()
        for images, targets in batches:
            if setup.tuned and images.ndim == 4:
                images = images.to(memory_format=torch.channels_last)
            with autocast(setup):
                loss = nn.functional.cross_entropy(module(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if val is not None:
            predict(module, val, setup)


def predict(module: nn.Module, data: Any, setup: Setup) -> list[int]:
    module.eval()
    found: list[int] = []
    for images, _ in loader(data, setup, shuffle=False):
        if setup.tuned:
            images = images.to(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(setup):
            found += module(images).argmax(dim=1).tolist()
    return found
