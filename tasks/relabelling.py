"""Head surgery by label name: what a trained head knows of the classes that remain stays, the rest is drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LabelChange", "keep_rows", "rows_of_classes"]


@dataclass(frozen=True)
class LabelChange:
    """What became of a model's classes.

    Args:
        kept: the classes that remain, in the new order.
        new: those that were not there.
        dropped: those that are no longer there.
        had: how many classes there were.
        remark: what became of the head, where rows of weights were not simply kept.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    had: int
    remark: str = ""

    @classmethod
    def between(cls, before: Sequence[str], after: Sequence[str], had: int, remark: str = "") -> LabelChange:
        """The change from labels to others; `before` is empty where the classes had no names."""
        return cls(
            kept=tuple(name for name in after if name in before),
            new=tuple(name for name in after if name not in before),
            dropped=tuple(name for name in before if name not in after),
            had=had,
            remark=remark,
        )

    def __str__(self) -> str:
        kept = f"kept {len(self.kept)} of {self.had} classes" + (f" ({_few(self.kept)})" if self.kept else "")
        parts = [kept]
        parts += [f"new: {_few(self.new)}"] if self.new else []
        parts += [f"dropped: {_few(self.dropped)}"] if self.dropped else []
        return "; ".join([*parts, self.remark] if self.remark else parts)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def rows_of_classes(head: nn.Module, wider: nn.Module, num_outputs: int) -> set[str] | None:
    """Names of a head's weights that have a row for each class; None where classes are not rows alone.

    Args:
        head: with outputs for `num_outputs` classes.
        wider: the same kind of head with one class more: what differs is what depends on the classes.
        num_outputs: of `head`.
    """
    shapes = {name: value.shape for name, value in head.state_dict().items()}
    others = {name: value.shape for name, value in wider.state_dict().items()}
    if shapes.keys() != others.keys():
        return None
    rows = {name for name in shapes if shapes[name] != others[name]}
    for name in rows:
        own, other = shapes[name], others[name]
        if own[:1] != (num_outputs,) or other[:1] != (num_outputs + 1,) or own[1:] != other[1:]:
            return None
    return rows or None


@torch.no_grad()
def keep_rows(
    head: nn.Module, before: Mapping[str, Any], rows: set[str], old_labels: Sequence[str], new_labels: Sequence[str]
) -> None:
    """Put what was known into a new head: rows by the name of their class, all that is no row as it was.

    Args:
        head: for the new labels, freshly drawn.
        before: the state of the old head.
        rows: names of the weights with a row for each class.
        old_labels: in the order of the old rows.
        new_labels: in the order of the new ones.
    """
    here = [index for index, label in enumerate(new_labels) if label in old_labels]
    there = [old_labels.index(new_labels[index]) for index in here]
    state: dict[str, Tensor] = head.state_dict()
    for name, value in state.items():
        old = before[name].to(value.device)
        if name not in rows:
            value.copy_(old)
        elif here:
            value[here] = old[there].to(value.dtype)
