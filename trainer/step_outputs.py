"""What hooks are given of the outputs of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["LossOutput", "as_seen_by_hooks"]


class LossOutput(torch.Tensor):
    """A loss that a step returned by itself: a detached tensor, which also reads like `{"loss": tensor}`."""

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key != "loss":
                raise KeyError(key)
            return self.as_subclass(torch.Tensor)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == "loss" if isinstance(key, str) else super().__contains__(key)  # type: ignore[arg-type]

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
