"""A head that looks at directions alone: the cosine between features and a learned direction of each class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashtask.heads.closed_form import check_positive

__all__ = ["CosineHead"]


class CosineHead(nn.Module):
    """Logits are cosines in [-1, 1], times a scale: the length of the features does not count.

    Args:
        num_features: features a sample.
        num_outputs: outputs a sample.
        scale: of the cosines, above 0; what it begins with if it is learned.
        learn_scale: train the scale too; it stays above 0.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    def __init__(self, num_features: int, num_outputs: int, *, scale: float = 20.0, learn_scale: bool = True) -> None:
        super().__init__()
        check_positive("cosine", "scale", scale)
        self.weight = nn.Parameter(torch.randn(num_outputs, num_features) / math.sqrt(num_features))
        # Its logarithm is what is trained: steps are relative, and the scale cannot turn negative.
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale: Tensor = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_outputs)."""
        directions = nn.functional.normalize(features, dim=1)
        return nn.functional.linear(directions, nn.functional.normalize(self.weight, dim=1)) * self.log_scale.exp()
