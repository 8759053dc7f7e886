"""`RunningAverage`: the average of tensors that change, kept beside them and put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_swa_multi_avg_fn

from flashtask.core.errors import UsageError
from flashtask.trainer.distribution.shards import as_held
from flashtask.trainer.wrapping import own_name

__all__ = ["AverageFunction", "RunningAverage", "copy_tensors", "replace_in_state", "trained_parameters"]

#: (average, value, number of values in the average) -> the new average, as in `torch.optim.swa_utils`
AverageFunction = Callable[[Tensor, Tensor, int], Tensor]


class RunningAverage:
    """Averages of named tensors, and how many values each of them holds; half precisions are averaged in float32.

    Args:
        avg_fn: computes one average from (average, value, number of values so far); None means equal weights.
        multi_avg_fn: the same in place for lists of averages and values, which is faster on an accelerator.
    """

    def __init__(self, avg_fn: AverageFunction | None = None, multi_avg_fn: Callable[..., None] | None = None) -> None:
        self._avg_fn = avg_fn
        self._multi_avg_fn = multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tensors: dict[str, Tensor] = {}
        self.count = 0

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value of each tensor; the first ones decide which tensors there are."""
        with torch.no_grad():
            if not self.count:
                self.tensors = {n: value.detach().to(_wide(value.dtype), copy=True) for n, value in values.items()}
            elif self._avg_fn is not None:
                for name, average in self.tensors.items():
                    average.copy_(self._avg_fn(average, values[name].detach().to(average.dtype), self.count))
            else:
                for averages, news in self._alike(values):
                    self._multi_avg_fn(averages, news, self.count)
        self.count += 1

    def _alike(self, values: Mapping[str, Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Averages and values in lists that one kernel can work on: of one device and dtype."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, average in self.tensors.items():
            averages, news = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            news.append(values[name].detach().to(average.dtype))
        yield from groups.values()

    def put_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the tensors the averages; they stay the same objects, so optimizers keep their parameters."""
        copy_tensors(self.tensors, tensors)

    def join(self, values: Mapping[str, Tensor]) -> None:
        """Move averages that came from a file to where their tensors are.

        Raises:
            UsageError: one of them is not there.
        """
        for name in self.tensors:
            if name not in values:
                raise UsageError(
                    f"the run that is resumed averaged {name}, which no optimizer holds now",
                    fix="resume with the finetuning strategy and optimizer of the first run",
                )
        self.tensors = {
            name: as_held(average.to(values[name].device), values[name]) for name, average in self.tensors.items()
        }


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A half precision is too coarse for an average: what one update adds to it would be rounded away."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


def trained_parameters(module: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The parameters that an optimizer holds, by their own names; the others never change and need no average.

    One that is shared stands there once, under the first of its names.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {own_name(name): p for name, p in module.named_parameters() if id(p) in held}


def replace_in_state(state: dict[str, Any], tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Put tensors into a state dict of the module, under each of the names that a shared one has there."""
    names: dict[int, list[str]] = {}
    own = module.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in tensors.items():
        for alias in names[id(own[name])] if name in own else ():
            if alias in state:
                state[alias] = tensor
