"""Closed-form heads, which are solved on features instead of trained by gradient steps: the contract and common parts.

Some are found in closed form, some by a solver of their own; all need the features of every sample at once.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.number_checks import is_number
from flashtask.heads.linear import LinearHead

__all__ = ["ClosedFormHead", "ClosedFormLinearHead"]
__all__ += ["best_scale", "check_features", "check_positive", "class_counts", "finite_features"]
__all__ += ["sample_weights"]

#: Least and most that `best_scale` multiplies scores by; separated classes would ask for ever more.
_SCALES = (0.1, 100.0)


@runtime_checkable
class ClosedFormHead(Protocol):
    """A head that `freeze` solves after one pass over the frozen part, without epochs."""

    #: Whether every other strategy is an error, because gradient steps make no sense for it.
    requires_solving: ClassVar[bool]

    def solve(self, features: Tensor, targets: Tensor) -> str | None:
        """Find the head's weights.

        Args:
            features: (N, num_features) float32 on the CPU, N at least 1, in any order.
            targets: (N,) class indices.

        Returns:
            A line about it for the user, or None.
        """


def check_features(features: Tensor, targets: Tensor, num_features: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Features in float64 and targets, both on the CPU.

    Raises:
        BadDataError: features that are NaN or infinite.
        UsageError: shapes or classes that do not fit the head.
    """
    features = finite_features(features, num_features)
    if targets.shape != features.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise UsageError(f"targets must be a class index for each of {len(features)} samples, not {targets!r}")
    targets = targets.cpu().long()
    if int(targets.min()) < 0 or int(targets.max()) >= num_outputs:
        raise UsageError(
            f"class indices are {int(targets.min())} to {int(targets.max())}, but the head has {num_outputs} classes"
        )
    return features, targets


def finite_features(features: Tensor, num_features: int) -> Tensor:
    """Features (N, num_features) in float64 on the CPU.

    Raises:
        BadDataError: some are NaN or infinite.
        UsageError: another shape.
    """
    if features.ndim != 2 or not len(features) or features.shape[1] != num_features:
        raise UsageError(f"features must be (samples, {num_features}), not {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    bad = int((~features.isfinite()).any(dim=1).sum())
    if bad:
        raise BadDataError(
            f"the features of {bad} of {len(features)} samples are NaN or infinite",
            why="the cause is in the backbone's weights, its inputs or its number format",
            fix="try precision=32, and check the images",
        )
    return features


def check_positive(head: str, option: str, value: Any) -> None:
    """Refuse an option that is neither None nor a finite number above 0.

    Raises:
        UsageError: it is not one.
    """
    if value is not None and not (is_number(value) and value > 0):
        raise UsageError(f"{option} of the head {head!r} must be a number above 0, not {value!r}")


def class_counts(targets: Tensor, num_outputs: int) -> Tensor:
    """How many samples each class has: (num_outputs,) whole numbers."""
    return torch.bincount(targets, minlength=num_outputs)


def sample_weights(targets: Tensor, num_outputs: int, *, balanced: bool) -> Tensor:
    """The weight of each sample, 1 on average; balanced: each class that has samples weighs the same."""
    if not balanced:
        return torch.ones(len(targets), dtype=torch.float64)
    counts = class_counts(targets, num_outputs).double()
    return (len(targets) / (counts > 0).sum() / counts)[targets]


def best_scale(scores: Tensor, targets: Tensor, weights: Tensor | None = None, *, otherwise: float = 10.0) -> float:
    """The factor that makes scores the best logits: it has the least cross-entropy, within [0.1, 100].

    Args:
        scores: (N, classes) float64; of samples that the head has not seen, so that it is not made too sure.
        targets: (N,) class indices.
        weights: of samples, (N,).
        otherwise: the answer if there are no scores.
    """
    if not len(scores):
        return otherwise
    own = scores.gather(1, targets[:, None])[:, 0]
    weights = torch.ones(len(scores), dtype=scores.dtype) if weights is None else weights

    def loss(exponent: float) -> float:
        scale = 10.0**exponent
        return float((((scores * scale).logsumexp(dim=1) - scale * own) * weights).sum())

    low, high = (float(torch.tensor(end, dtype=torch.float64).log10()) for end in _SCALES)
    share = (5**0.5 - 1) / 2  # golden section: cross-entropy has one valley along the scale
    for _ in range(40):
        left, right = high - share * (high - low), low + share * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(10.0 ** ((low + high) / 2))


class ClosedFormLinearHead(LinearHead):
    """Base of `ridge` and `logistic`: a layer that starts at zero, so that every class is equally likely at first.

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
        """The linear layer, which holds the solution."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features in float64 and targets, as `check_features` gives them for this head."""
        return check_features(features, targets, self.layer.in_features, self.layer.out_features)
