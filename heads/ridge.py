"""A linear head in closed form: ridge regression on the classes, with the penalty that leave-one-out likes best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.heads.closed_form import (
    ClosedFormLinearHead,
    best_scale,
    check_positive,
    class_counts,
    finite_features,
    sample_weights,
)

__all__ = ["RidgeHead"]

#: The penalties that are tried, as shares of the mean squared length of a centred feature's column.
_GRID: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 7))


class RidgeHead(ClosedFormLinearHead):
    """Least squares on one-hot targets, or on numbers, with a penalty on the squared weights, solved in float64.

    Features and targets are centred, so the bias is not penalised. The values that are fitted to classes, which are
    shares of about 0 to 1, are divided by a temperature to be logits; bias and weights hold the result, so the head is
    one linear layer. A class without a sample has the value 0 everywhere and is never the best.

    Args:
        num_features: features a sample.
        num_outputs: classes.
        penalty: lambda in |y - xw - b|^2 + lambda |w|^2 summed over samples, above 0; None takes the one of a grid with
            the least squared error of samples that are left out, each once (exact, from one decomposition).
        temperature: above 0; None takes the one with the least cross-entropy of left-out samples.
        balanced: let each class weigh the same, however many samples it has.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    #: Targets may be numbers, (N, num_outputs) floats.
    solves_numbers = True

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        *,
        penalty: float | None = None,
        temperature: float | None = None,
        balanced: bool = False,
    ) -> None:
        super().__init__(num_features, num_outputs)
        check_positive("ridge", "penalty", penalty)
        check_positive("ridge", "temperature", temperature)
        self.penalty, self.temperature, self.balanced = penalty, temperature, balanced

    @torch.no_grad()
    def solve(self, features: Tensor, targets: Tensor) -> str:
        """Solve the regression; see `ClosedFormHead`.

        Raises:
            BadDataError: features that are NaN or infinite.
            UsageError: shapes or classes that are not the head's.
        """
        if targets.is_floating_point() and targets.ndim == 2:
            return self._solve_numbers(features, targets)
        layer = self.layer
        features, targets = self.checked(features, targets)
        weights = sample_weights(targets, layer.out_features, balanced=self.balanced)
        onehot = nn.functional.one_hot(targets, layer.out_features).double()
        problem = _Ridge(features, onehot, weights)
        counts = class_counts(targets, layer.out_features)
        # A sample that is alone in its class says nothing when it is left out: nobody else knows the class.
        known = counts[targets] > 1
        penalty = problem.best_penalty(known) if self.penalty is None else float(self.penalty)
        slopes, bias = problem.solution(penalty)
        if self.temperature is None:
            scale = best_scale(problem.left_out(penalty)[known], targets[known], weights[known])
        else:
            scale = 1 / self.temperature
        layer.weight.copy_(slopes.T * scale)
        layer.bias.copy_(bias * scale)
        chosen = "given" if self.penalty else "by leave-one-out" if known.any() else "too few samples to choose"
        empty = int((counts == 0).sum())
        without = f"; {empty} of {layer.out_features} classes have no sample and are not predicted" if empty else ""
        return f"ridge: {len(features)} samples, penalty {penalty:.3g} ({chosen}), temperature {1 / scale:.3g}{without}"

    def _solve_numbers(self, features: Tensor, targets: Tensor) -> str:
        """The same on numbers (N, num_outputs), which are fitted as they are: no temperature, no classes."""
        layer = self.layer
        if targets.shape != (len(features), layer.out_features):
            raise UsageError(f"targets must be ({len(features)}, {layer.out_features}), not {tuple(targets.shape)}")
        features = finite_features(features, layer.in_features)
        problem = _Ridge(features, targets.cpu().double(), torch.ones(len(features), dtype=torch.float64))
        everyone = torch.ones(len(features), dtype=torch.bool)
        penalty = problem.best_penalty(everyone) if self.penalty is None else float(self.penalty)
        slopes, bias = problem.solution(penalty)
        layer.weight.copy_(slopes.T)
        layer.bias.copy_(bias)
        chosen = "given" if self.penalty else "by leave-one-out"
        return f"ridge: {len(features)} samples, penalty {penalty:.3g} ({chosen})"


class _Ridge:
    """A ridge regression with weighted samples and a free intercept, for any number of penalties.

    One eigendecomposition of the smaller of the two Gram matrices (features, or samples where they are fewer) serves
    all. Rows are multiplied by the roots of their weights, after centring at the weighted mean.

    Args:
        features: (N, F) float64.
        values: (N, K) float64.
        weights: (N,), 1 on average.
    """

    def __init__(self, features: Tensor, values: Tensor, weights: Tensor) -> None:
        count = len(features)
        self.values, self.weights, self.roots = values, weights, weights.sqrt()[:, None]
        self.feature_mean = weights @ features / count
        self.value_mean = weights @ values / count
        self.rows = (features - self.feature_mean) * self.roots
        centred = (values - self.value_mean) * self.roots
        self.is_dual = count < features.shape[1]
        gram = self.rows @ self.rows.T if self.is_dual else self.rows.T @ self.rows
        eigenvalues, vectors = torch.linalg.eigh(gram)
        self.eigenvalues: Tensor = eigenvalues.clamp(min=0)
        self.vectors: Tensor = vectors
        # Coordinates of the samples in which the fit is diagonal; the columns are orthogonal.
        self.basis = self.vectors if self.is_dual else self.rows @ self.vectors
        self.projected = self.basis.T @ centred

    @property
    def unit(self) -> float:
        """The mean squared length of a column of centred features, 1 if they are all constant."""
        mean = float(self.eigenvalues.sum()) / self.rows.shape[1]
        return mean if mean > 0 else 1.0

    def _shrinkage(self, penalty: float) -> Tensor:
        """The diagonal of the fit in the coordinates of `basis`."""
        above = self.eigenvalues if self.is_dual else torch.ones_like(self.eigenvalues)
        return above / (self.eigenvalues + penalty)

    def left_out(self, penalty: float) -> Tensor:
        """What each sample's values (N, K) are predicted to be by the fit to all others; exact."""
        shrinkage = self._shrinkage(penalty)
        fitted = self.value_mean + self.basis @ (shrinkage[:, None] * self.projected) / self.roots
        influence = self.weights / len(self.weights) + self.basis.square() @ shrinkage
        rest = (1 - influence).clamp(min=1e-10)[:, None]
        left_out: Tensor = self.values - (self.values - fitted) / rest
        return left_out

    def best_penalty(self, known: Tensor) -> float:
        """The penalty of the grid with the least squared error of left-out samples, the largest of equal ones.

        Args:
            known: (N,) the samples that are left out, one at a time; of none, the middle of the grid is taken.
        """
        grid = [share * self.unit for share in _GRID]
        if not known.any():
            return grid[len(grid) // 2]
        errors = [float(((self.left_out(p) - self.values) * self.roots)[known].square().sum()) for p in grid]
        least = min(errors)
        return max(penalty for penalty, error in zip(grid, errors, strict=True) if error <= least * (1 + 1e-9))

    def solution(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Slopes (F, K) and intercepts (K,)."""
        inner = self.projected / (self.eigenvalues + penalty)[:, None]
        slopes = self.rows.T @ (self.vectors @ inner) if self.is_dual else self.vectors @ inner
        return slopes, self.value_mean - self.feature_mean @ slopes
