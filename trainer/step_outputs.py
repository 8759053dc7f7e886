"""What hooks are given of the outputs of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["LossOutput", "as_seen_by_hooks"]


class LossOutput(torch.Tensor):
    """A loss that a step returned by itself: a detached tensor, which also reads like `{"loss": tensor}`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch.DisableTorchFunctionSubclass():  # what is computed from it is a plain tensor
            return func(*args, **(kwargs or {}))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key != "loss":
                raise KeyError(key)
            return self.as_subclass(torch.Tensor)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == "loss" if isinstance(key, str) else super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`."""
        return self[key] if key == "loss" else default

    def keys(self) -> list[str]:
        """As `dict.keys`."""
        return ["loss"]

    def items(self) -> Iterator[tuple[str, Any]]:
        """As `dict.items`."""
        yield "loss", self["loss"]


def as_seen_by_hooks(outputs: Any) -> Any:
    """The outputs of one step; a tensor becomes a `LossOutput`."""
    return outputs.detach().as_subclass(LossOutput) if isinstance(outputs, torch.Tensor) else outputs
