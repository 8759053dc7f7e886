"""Who takes part: flashtask, the loop by hand, and every peer that is installed."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

__all__ = ["PLAYERS", "Player", "installed"]


class Player(NamedTuple):
    """A peer, or one of its settings.

    Args:
        module: the file here that adapts it.
        package: whose version the table names.
        needs: the modules that must be there.
        start: the line whose time is the start-up.
        can_tune: it documents bfloat16 on a CPU.
    """

    module: str
    package: str
    needs: tuple[str, ...]
    start: str
    can_tune: bool = False


PLAYERS = {
    "flashtask": Player("with_flashtask", "flashtask", ("flashtask",), "from flashtask import ImageClassifier"),
    "by hand": Player("by_hand", "torch", ("torch",), "import torch", can_tune=True),
    "lightning": Player("with_lightning", "lightning", ("lightning",), "import lightning", can_tune=True),
    "fastai": Player("with_fastai", "fastai", ("fastai",), "from fastai.vision.all import *"),
    "transformers": Player(
        "with_transformers", "transformers", ("transformers", "accelerate"), "from transformers import Trainer", True
    ),
    "ignite": Player("with_ignite", "pytorch-ignite", ("ignite",), "from ignite.engine import Engine"),
    "skorch": Player("with_skorch", "skorch", ("skorch",), "from skorch import NeuralNetClassifier"),
}


def installed() -> dict[str, str]:
    """The players that can take part, with their versions."""
    found = {}
    for name, player in PLAYERS.items():
        if all(importlib.util.find_spec(module) is not None for module in player.needs):
            try:
                found[name] = version(player.package)
            except PackageNotFoundError:
                found[name] = "from a checkout"
    return found
