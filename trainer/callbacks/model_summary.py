"""`ModelSummary`: a table of a module's layers and their parameters."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.text_table import text_table

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Layer", "ModelSummary", "layers_of"]

_HEADER = ("name", "type", "parameters", "trainable")


@dataclass(frozen=True)
class Layer:
    """A part of a module: its name and class, and how many parameters it has and trains."""

    name: str
    type: str
    parameters: int
    trainable: int


def layers_of(module: nn.Module, max_depth: int = 1) -> list[Layer]:
    """The parts of a module down to a depth, in the order in which they were made, and the whole at the end.

    Args:
        module: to look at.
        max_depth: 0 for the whole alone, 1 for its children too, and so on; -1 for everything.
    """
    parts = [
        _layer(name, part)
        for name, part in module.named_modules()
        if name and (max_depth < 0 or name.count(".") < max_depth)
    ]
    return [*parts, _layer("all", module)]


def _layer(name: str, part: nn.Module) -> Layer:
    parameters = list(part.parameters())  # each once, however often it is used
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Layer(name, type(part).__name__, sum(p.numel() for p in parameters), trained)


class ModelSummary(Callback):
    """Prints before the first epoch which layers there are, and what of them that epoch trains.

    Args:
        max_depth: 0 for the totals alone, 1 for the module's children too, and so on; -1 for everything.

    Raises:
        UsageError: another depth.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if not is_whole(max_depth, -1):
            raise UsageError(f"ModelSummary(max_depth={max_depth!r}): a whole number of at least -1 is needed")
        self.max_depth = max_depth
        self._is_printed = False

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Print it once in each fit."""
        self._is_printed = False

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Print it in the first epoch: before that, nothing has been frozen."""
        if self._is_printed:
            return
        self._is_printed = True
        rows = [
            (layer.name, layer.type, f"{layer.parameters:,}", f"{layer.trainable:,}")
            for layer in layers_of(module, self.max_depth)
        ]
        is_terminal = sys.stderr.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else None
        trainer.say(text_table(_HEADER, rows, width, num_left=2, is_drawn=is_terminal))
