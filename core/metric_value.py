"""`MetricValue`: the value of a metric, a number that also does what a scalar tensor does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["MetricValue", "metric_values"]


class MetricValue(float):
    """A float with the methods of a scalar tensor (`item()`, `cpu()`, `numpy()`, ...), which torch's functions take.

    Arithmetic with it gives plain floats.
    """

    __slots__ = ()

    def item(self) -> float:
        """The value as a plain Python number, as `Tensor.item` gives it."""
        return float(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of every object, such as how to copy it
            raise AttributeError(name)
        return getattr(torch.tensor(float(self)), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        return function(*_as_tensors(arguments), **_as_tensors(dict(options or {})))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, MetricValue):
        return torch.tensor(float(value))
    if type(value) in (list, tuple):
        return type(value)(_as_tensors(part) for part in value)
    return {key: _as_tensors(part) for key, part in value.items()} if type(value) is dict else value


def metric_values(metrics: Mapping[str, float]) -> dict[str, float]:
    """A copy in which each value is a `MetricValue`."""
    return {name: MetricValue(value) for name, value in metrics.items()}
