"""What the linear heads that are solved share: one layer that begins at zero, and checked features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from flashtask.heads.linear import LinearHead
from flashtask.heads.solving import check_features

__all__ = ["SolvedLinearHead"]


class SolvedLinearHead(LinearHead):
    """Base of `ridge` and `logistic`: every class is equally likely until it is solved.

    Args:
        num_features: features a sample.
        num_outputs: classes.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    requires_solving: ClassVar[bool] = True

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__(num_features, num_outputs)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def layer(self) -> nn.Linear:
        """The linear layer, which holds what was solved."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features in float64 and targets, as `check_features` gives them for this head."""
        return check_features(features, targets, self.layer.in_features, self.layer.out_features)
