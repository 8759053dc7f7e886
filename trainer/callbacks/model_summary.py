"""`ModelSummary`: a table of a module's layers and their parameters."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Layer", "ModelSummary", "layers_of", "table_of"]

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


def table_of(layers: list[Layer]) -> str:
    """The layers as lines of text with aligned columns."""
    rows = [_HEADER, *map(_cells, layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for name, kind, *numbers in rows:
        texts = [name.ljust(widths[0]), kind.ljust(widths[1])]
        texts += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


class ModelSummary(Callback):
    """Says before the first epoch which layers there are, and what of them that epoch trains.

    Args:
        max_depth: 0 for the totals alone, 1 for the module's children too, and so on; -1 for everything.

    Raises:
        UsageError: another depth.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if not is_whole(max_depth, -1):
            raise UsageError(f"ModelSummary(max_depth={max_depth!r}): a whole number of at least -1 is needed")
        self.max_depth = max_depth
        self._is_said = False

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Each fit is told once."""
        self._is_said = False

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Say it in the first epoch: before that, nothing has been frozen."""
        if self._is_said:
            return
        self._is_said = True
        layers = layers_of(module, self.max_depth)
        trainer.say(_drawn_table(layers) if sys.stderr.isatty() else table_of(layers))


def _drawn_table(layers: list[Layer]) -> str:
    """The same for a terminal, as wide as that is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADER[:2])
    for title in _HEADER[2:]:
        table.add_column(title, justify="right")
    for layer in layers[:-1]:
        table.add_row(*_cells(layer))
    table.add_section()
    table.add_row(*_cells(layers[-1]), style="bold")
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=Console(file=sys.stderr).width).print(table)
    return text.getvalue().rstrip("\n")


def _cells(layer: Layer) -> tuple[str, str, str, str]:
    return layer.name, layer.type, f"{layer.parameters:,}", f"{layer.trainable:,}"
