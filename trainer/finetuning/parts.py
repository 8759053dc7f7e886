"""The parameters of a module by the parts that a phase names: head, layers of the backbone, biases, norms, factors."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.trainer.finetuning.lora import factor_names
from flashtask.trainer.finetuning.selection import Selection
from flashtask.trainer.wrapping import own_name, parameters_by_name

__all__ = ["Parts"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.CrossMapLRN2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


class Parts:
    """Names of a module's parameters, sorted by what a phase can train.

    Args:
        module: offers `modules_to_freeze()` (its backbone) and `layer_groups()` (names of the backbone's parameters,
            from the input to the output).

    Attributes:
        groups: the backbone's layers from the input to the output, each a list of names.
        head: names of everything else, factors aside.
        lora: names of the factors.
    """

    def __init__(self, module: Any) -> None:
        self.parameters = parameters_by_name(module)
        self.roots: list[nn.Module] = list(module.modules_to_freeze())
        self.lora = factor_names(module)
        groups = [[own_name(name) for name in group] for group in module.layer_groups()]
        self.groups = [[name for name in group if name not in self.lora] for group in groups]
        backbone = {id(self.parameters[name]) for group in self.groups for name in group}
        self.backbone = {name for name, p in self.parameters.items() if id(p) in backbone}
        self.head = [name for name in self.parameters if name not in self.backbone and name not in self.lora]
        self._norms = self._names_in_norms(module)

    def _names_in_norms(self, module: nn.Module) -> set[str]:
        found = set()
        for path, part in module.named_modules(remove_duplicate=False):
            # Libraries have norms of their own, which they call so.
            if isinstance(part, _NORMS) or "norm" in type(part).__name__.lower():
                prefix = f"{path}." if path else ""
                found |= {own_name(prefix + name) for name, _ in part.named_parameters(recurse=False)}
        return found & self.backbone

    def of_layers(self, count: int | None) -> set[str]:
        """Names in so many layers, counted from the output; None means all."""
        count = len(self.groups) if count is None else min(count, len(self.groups))
        return {name for group in self.groups[len(self.groups) - count :] for name in group}

    def layer_of(self) -> dict[int, int]:
        """The layer of each parameter of the backbone by its id; 1 is that nearest to the output."""
        return {id(self.parameters[n]): number for number, g in enumerate(reversed(self.groups), 1) for n in g}

    def names(self, selection: Selection) -> set[str]:
        """Every parameter that a phase trains.

        Raises:
            UsageError: a pattern that nothing matches, or a kind that the backbone has none of.
        """
        kinds = {
            "biases": {name for name in self.backbone if _is_bias(name)},
            "norms": self._norms,
            "lora": self.lora,
        }
        chosen = self.of_layers(selection.layers) | set(self.head if selection.head else ())
        for kind, names in kinds.items():
            if getattr(selection, kind):
                if not names:
                    raise UsageError(f"the backbone has no {kind} to train", fix='strategy="freeze"')
                chosen |= names
        for pattern in selection.patterns:
            chosen |= self._matching(pattern)
        return chosen

    def _matching(self, pattern: str) -> set[str]:
        names = [name for name in self.parameters if name not in self.lora]
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            close = did_you_mean(pattern, names) or f"names look like {names[0]!r}; a part ends with a star: 'head.*'"
            raise UsageError(f"train: no parameter is called {pattern!r}", fix=close)
        return found

    def ids(self, names: Iterable[str]) -> set[int]:
        """The parameters behind names: one that is shared has several, and trains if it does under any of them."""
        return {id(self.parameters[name]) for name in names}


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")
