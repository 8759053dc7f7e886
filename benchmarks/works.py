"""The works: what is done, by whoever can fit a module and predict with it. flashtask does them in its own way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from setup import Outcome, Setup, accuracy_of, image_set, network, perceptron, random_vectors

__all__ = ["WORKS"]


def frozen(player: Any, setup: Setup) -> Outcome:
    """Train a linear head on a frozen backbone."""
    return player.finetune(setup, frozen=True) if hasattr(player, "finetune") else _finetune(player, setup, frozen=True)


def full(player: Any, setup: Setup) -> Outcome:
    """Train everything."""
    return (
        player.finetune(setup, frozen=False) if hasattr(player, "finetune") else _finetune(player, setup, frozen=False)
    )


def _finetune(player: Any, setup: Setup, *, frozen: bool) -> Outcome:
    start = time.perf_counter()
    train, val = image_set(setup, "elpv", "train"), image_set(setup, "elpv", "val")
    made = network(setup, len(train.classes), frozen=frozen)
    player.fit(made, train, val, setup)
    seconds = time.perf_counter() - start
    # Measured outside the clock and by the same code for everybody.
    import by_hand

    accuracy = accuracy_of(by_hand.predict(made, val, setup), val.targets)
    return Outcome(seconds, len(train) * setup.epochs, accuracy)


def overhead(player: Any, setup: Setup) -> Outcome:
    """Many steps of a very small network: what is left is the engine."""
    made = perceptron()
    # What is imported and set up when it is first needed is no part of a step.
    player.fit(made, random_vectors(replace(setup, steps=10)), None, setup)
    data = random_vectors(setup)
    start = time.perf_counter()
    player.fit(made, data, None, setup)
    return Outcome(time.perf_counter() - start, setup.steps)


def predict(player: Any, setup: Setup) -> Outcome:
    """Labels for a folder of images from a checkpoint."""
    return _predict(player, setup, "elpv/all")


def photos(player: Any, setup: Setup) -> Outcome:
    """The same for large photographs, where decoding is most of the work."""
    return _predict(player, setup, "photos")


def _predict(player: Any, setup: Setup, folder: str) -> Outcome:
    if hasattr(player, "predict_folder"):
        return player.predict_folder(setup, folder)
    import torch

    import flashtask

    start = time.perf_counter()
    model = flashtask.load(setup.path("model.ckpt"))
    if setup.tuned:
        model.to(memory_format=torch.channels_last)
    data = image_set(setup, folder)
    found = player.predict(model, data, setup)
    seconds = time.perf_counter() - start
    names = [model.labels[index] for index in found]
    return Outcome(seconds, len(data), accuracy_of(names, [data.classes[target] for target in data.targets]))


#: name -> the work, and how its number is called
WORKS: dict[str, tuple[Callable[[Any, Setup], Outcome], str]] = {
    "frozen": (frozen, "seconds"),
    "full": (full, "images/s"),
    "overhead": (overhead, "us a step"),
    "predict": (predict, "seconds"),
    "photos": (photos, "seconds"),
}
