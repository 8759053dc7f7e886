"""The head that most finetuning uses: one affine map, with dropout before it if wanted."""

from __future__ import annotations

from torch import nn

from flashtask.core.errors import UsageError

__all__ = ["LinearHead"]


class LinearHead(nn.Sequential):
    """One linear layer over the features.

    Args:
        num_features: features a sample.
        num_outputs: outputs a sample.
        bias: add a bias.
        dropout: share of features set to 0 in training, in [0, 1).

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    def __init__(self, num_features: int, num_outputs: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}")
        layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(num_features, num_outputs, bias=bias))
