"""`ModelSummary`: a table of a module's layers and their parameters."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import generator_states, set_generator_states
from flashtask.trainer.batch_transfer import move_to_device
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.text_table import text_table

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run
    from flashtask.trainer.trainer import Trainer

__all__ = ["Layer", "ModelSummary", "layers_of"]

_HEADER = ("name", "type", "parameters", "trainable")
_SIZES = ("in", "out")


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


def sizes_of(module: Module, run: Run) -> dict[str, tuple[str, str]]:
    """The sizes of what each part of a module takes and gives for `module.example_input_array`: name -> (in, out).

    Parts that the forward pass does not call are left out; nothing but time passes: modes, generators and statistics
    are as before.

    Args:
        module: whose parts they are; nothing is computed if it has no example.
        run: whose device and number format the example is brought to.
    """
    example = module.example_input_array
    if example is None:
        return {}
    found: dict[str, tuple[str, str]] = {}
    modes, states = [(part, part.training) for part in module.modules()], generator_states()
    with ExitStack() as stack:
        for name, part in module.named_modules():
            watch = partial(_note_sizes, found, name or "all")
            stack.callback(part.register_forward_hook(watch, with_kwargs=True).remove)
        stack.callback(set_generator_states, states)
        module.eval()
        example = run.precision.convert_batch(move_to_device(example, run.device))
        with run.precision.inference(), run.strategy.whole_weights(module):
            if isinstance(example, dict):
                module(**example)
            else:
                module(*(example if isinstance(example, tuple) else (example,)))
    for part, mode in modes:
        part.training = mode
    return found


def _note_sizes(
    found: dict[str, tuple[str, str]],
    name: str,
    part: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    outputs: Any,
) -> None:
    given = [*inputs, *named.values()]
    found[name] = (_size(given[0] if len(given) == 1 else given), _size(outputs))


def _size(value: Any) -> str:
    """`2 x 3` of a tensor, those of its parts of a list or dictionary; `?` of anything else."""
    if isinstance(value, torch.Tensor):
        return " x ".join(map(str, value.shape))
    if isinstance(value, dict):
        value = list(value.values())
    return ", ".join(map(_size, value)) if isinstance(value, (list, tuple)) else "?"


def _layer(name: str, part: nn.Module) -> Layer:
    parameters = list(part.parameters())  # each once, however often it is used
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Layer(name, type(part).__name__, sum(p.numel() for p in parameters), trained)


class ModelSummary(Callback):
    """Prints before the first epoch which layers there are, and what of them that epoch trains.

    If the module has an `example_input_array`, it also prints the sizes of what each layer takes and gives.

    Args:
        max_depth: 0 for the totals alone, 1 for the module's children too, and so on; -1 for everything.

    Raises:
        UsageError: another depth.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if not is_whole(max_depth, -1):
            raise UsageError(
                f"ModelSummary(max_depth={'a module' if isinstance(max_depth, nn.Module) else repr(max_depth)}): "
                "a whole number of at least -1 is needed",
                fix="Trainer(callbacks=[ModelSummary(max_depth=1)]), which prints the table in a fit",
            )
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
        sizes = sizes_of(module, trainer.current_run)
        rows = [
            (
                layer.name,
                layer.type,
                f"{layer.parameters:,}",
                f"{layer.trainable:,}",
                *(sizes.get(layer.name, ("", "")) if sizes else ()),
            )
            for layer in layers_of(module, self.max_depth)
        ]
        is_terminal = sys.stderr.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else None
        trainer.say(text_table((*_HEADER, *(_SIZES if sizes else ())), rows, width, num_left=2, is_drawn=is_terminal))
