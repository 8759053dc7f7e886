"""A head with hidden layers, for features that one affine map cannot separate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.number_checks import is_whole

__all__ = ["MLPHead"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class MLPHead(nn.Sequential):
    """Hidden linear layers, each followed by an activation and dropout, and a linear output layer.

    Args:
        num_features: features a sample.
        num_outputs: outputs a sample.
        hidden_sizes: width of each hidden layer, at least one, each at least 1.
        dropout: share of hidden values set to 0 in training, in [0, 1).
        activation: `relu` or `gelu`.
        layer_norm: normalise each hidden layer's values before the activation.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        *,
        hidden_sizes: Sequence[int] = (512,),
        dropout: float = 0.0,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        _check(hidden_sizes, dropout, activation)
        layers: list[nn.Module] = []
        width = num_features
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), *([nn.LayerNorm(size)] if layer_norm else [])]
            layers += [_ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = size
        super().__init__(*layers, nn.Linear(width, num_outputs))


def _check(hidden_sizes: object, dropout: float, activation: str) -> None:
    if not isinstance(hidden_sizes, (list, tuple)) or not hidden_sizes:
        raise UsageError(f"hidden_sizes must be a list of widths, not {hidden_sizes!r}", fix="hidden_sizes=[512]")
    if any(not is_whole(size) for size in hidden_sizes):
        raise UsageError(f"hidden_sizes must be whole numbers of at least 1, not {hidden_sizes!r}")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}")
    if activation not in _ACTIVATIONS:
        raise UnknownNameError("activation", str(activation), _ACTIVATIONS)
