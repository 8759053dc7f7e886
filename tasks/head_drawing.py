"""How the parts of a task are built: a head drawn from a seed, a backbone whose weights a checkpoint brings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from flashtask.core.errors import IntegrityError
from flashtask.core.feature_info import FeatureInfo
from flashtask.core.seeding import derive_seed, seeded_generators
from flashtask.heads import HEADS, build_head
from flashtask.tasks.relabelling import rows_of_classes

__all__ = ["DrawnHead", "building_without_weights", "check_weights", "fetches_weights"]

_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def building_without_weights() -> Iterator[None]:
    """Tasks made inside fetch no pretrained weights, whatever `pretrained` says: theirs come from a checkpoint."""
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


def fetches_weights(pretrained: bool) -> bool:
    """Whether a task made here and now fetches weights."""
    return pretrained and not _without_weights.get()


def check_weights(state: Mapping[str, Any], path: Any) -> None:
    """Look at the weights of a file before a model takes them; NaN is a warning, because it can be computed with.

    Raises:
        IntegrityError: a variance is below 0, or a layer's weight and bias have two formats.
    """
    floats = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    for name, value in floats.items():
        layer, _, last = name.rpartition(".")
        weight = floats.get(f"{layer}.weight")
        if last == "bias" and weight is not None and weight.dtype != value.dtype:
            kinds = f"{weight.dtype} and {value.dtype}".replace("torch.", "")
            raise IntegrityError(f"{path}: weight and bias of {layer} are stored as {kinds}")
        if last == "running_var" and bool((value < 0).any()):
            raise IntegrityError(f"{path}: its weights cannot be used: {name} holds a variance below 0")
    bad = next((name for name, value in floats.items() if bool(value.isnan().any())), None)
    if bad is not None:
        warnings.warn(f"{path}: {bad} holds NaN, and so will what is predicted with it", stacklevel=2)


class DrawnHead:
    """A head whose first weights depend on a seed alone, not on what the process has drawn before.

    Args:
        kind: a registered name, a module that is taken as it is, or None for no head.
        options: the head's own arguments.
    """

    def __init__(self, kind: str | nn.Module | None, options: Mapping[str, Any]) -> None:
        self.kind, self.options = kind, dict(options)
        self.sizes: tuple[int | FeatureInfo, int] = (0, 0)
        self.seed: int | None = None

    @property
    def builder(self) -> Any:
        """What builds the head: the registered class or function, or the module itself; None for no head."""
        if not isinstance(self.kind, str):
            return self.kind
        found = HEADS.get(self.kind)
        return found.func if isinstance(found, partial) else found

    def draw(self, features: int | FeatureInfo, num_outputs: int, seed: int) -> nn.Module | None:
        """A new head for these features and outputs; the seed is remembered."""
        if self.kind is None:
            return None
        self.sizes, self.seed = (features, num_outputs), seed
        with seeded_generators(derive_seed("head", seed)):
            return build_head(self.kind, *self.sizes, **self.options)

    def rows_of_classes(self) -> set[str] | None:
        """Names of the drawn head's weights that have a row for each output; None where there are none such."""
        if not isinstance(self.kind, str):
            return None
        features, num_outputs = self.sizes
        with seeded_generators(derive_seed("head", 0)):
            heads = [build_head(self.kind, features, num_outputs + more, **self.options) for more in (0, 1)]
        return rows_of_classes(heads[0], heads[1], num_outputs)

    def redraw(self, head: nn.Module | None, seed: int) -> None:
        """Give a head that is still as it was drawn the weights of another seed; one that has changed stays."""
        if head is None or not isinstance(self.kind, str) or self.seed in (None, seed):
            return
        before, fresh = (self.draw(*self.sizes, each) for each in (self.seed, seed))
        assert before is not None
        assert fresh is not None
        drawn, own = before.state_dict(), head.state_dict()
        if drawn.keys() == own.keys() and all(torch.equal(drawn[name], own[name].cpu()) for name in drawn):
            head.load_state_dict(fresh.state_dict())
