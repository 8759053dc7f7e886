"""A linear head by multinomial logistic regression: the same optimum every time, without epochs or a learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.heads.closed_form import ClosedFormLinearHead, check_positive, class_counts, sample_weights

__all__ = ["LogisticHead"]

#: A column that varies by less than this share of its largest value is rounding, not information (float32 has 6e-8).
_CONSTANT = 1e-7
#: The penalty that is taken if none is given, for each feature.
_SHARE = 0.1
#: How far below the lowest training logit a class without samples lies.
_UNSEEN = 10.0


class LogisticHead(ClosedFormLinearHead):
    """Cross-entropy plus a penalty on the squared weights, minimised by L-BFGS in float64.

    Features are standardised for the fit, and mean and deviation are folded into weights and bias afterwards, so the
    head is one linear layer. The objective is strictly convex: the start does not matter. The bias is not penalised. A
    constant feature has the weight 0; a class without a sample is never predicted.

    Args:
        num_features: features a sample.
        num_outputs: classes.
        penalty: of the sum of cross-entropies plus penalty / 2 times the squared weights of standardised features;
            above 0. It is the inverse of scikit-learn's C. None takes a tenth of the number of features that vary:
            then a logit deviates by about 3 before anything is learned, however many there are.
        tolerance: the largest entry of the gradient of the mean objective at which the fit is done.
        max_iterations: L-BFGS iterations at the most; a fit that ends there is told.
        balanced: let each class weigh the same, however many samples it has.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        *,
        penalty: float | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        balanced: bool = False,
    ) -> None:
        super().__init__(num_features, num_outputs)
        if tolerance is None:
            raise UsageError("tolerance of the head 'logistic' must be a number above 0, not None")
        check_positive("logistic", "penalty", penalty)
        check_positive("logistic", "tolerance", tolerance)
        if not is_whole(max_iterations):
            raise UsageError(f"max_iterations must be a whole number of at least 1, not {max_iterations!r}")
        self.penalty, self.tolerance, self.max_iterations = penalty, float(tolerance), max_iterations
        self.balanced = balanced

    @torch.no_grad()
    def solve(self, features: Tensor, targets: Tensor) -> str:
        """Fit the regression; see `ClosedFormHead`.

        Raises:
            BadDataError: features that are NaN or infinite.
            UsageError: shapes or classes that are not the head's.
        """
        layer = self.layer
        features, targets = self.checked(features, targets)
        seen = class_counts(targets, layer.out_features) > 0
        mean, deviation = _standardisation(features)
        penalty = self.penalty or _SHARE * max(1, int(deviation.isfinite().sum()))
        fit = _Fit(
            (features - mean) / deviation,
            (torch.cumsum(seen, 0) - 1)[targets],  # the place of a class among those that are there
            sample_weights(targets, layer.out_features, balanced=self.balanced),
            float(penalty),
        )
        iterations, gradient = fit.minimise(self.tolerance, self.max_iterations)
        slopes = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        slopes[seen] = fit.weight / deviation
        bias = torch.full((layer.out_features,), float(fit.logits().min()) - _UNSEEN, dtype=torch.float64)
        bias[seen] = fit.bias - slopes[seen] @ mean
        layer.weight.copy_(slopes)
        layer.bias.copy_(bias)
        said = f"logistic: {len(features)} samples, penalty {penalty:.3g}, {iterations} iterations"
        return self._report(said, seen, gradient)

    def _report(self, said: str, seen: Tensor, gradient: float) -> str:
        said += f", largest gradient {gradient:.1e}"
        if gradient > self.tolerance:
            said += f", which is above the tolerance of {self.tolerance:.1e}: give a larger penalty or max_iterations"
        empty = int((~seen).sum())
        return said + (f"; {empty} of {len(seen)} classes have no sample and are never predicted" if empty else "")


def _standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and deviation (F,) of features (N, F); the deviation of a constant is infinite, so it becomes 0."""
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    largest = features.abs().amax(dim=0)
    return mean, torch.where(deviation <= _CONSTANT * largest, torch.inf, deviation)


class _Fit:
    """A penalised multinomial logistic regression on standardised features.

    Args:
        features: (N, F) float64.
        targets: (N,) class indices; every class has a sample.
        sample_weights: (N,).
        penalty: see `LogisticHead`.
    """

    def __init__(self, features: Tensor, targets: Tensor, sample_weights: Tensor, penalty: float) -> None:
        self.features, self.shares = features, sample_weights[:, None] / len(features)
        self.penalty = penalty / len(features)
        self.onehot = nn.functional.one_hot(targets).double()
        classes = self.onehot.shape[1]
        self.weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
        self.bias = torch.zeros(classes, dtype=torch.float64)

    def logits(self) -> Tensor:
        """(N, K), with the weights as they are now."""
        return torch.addmm(self.bias, self.features, self.weight.T)

    def objective(self) -> Tensor:
        """The mean objective as it is now; its gradient is left in the `grad` of weight and bias."""
        logs = self.logits().log_softmax(dim=1)
        errors = (logs.exp() - self.onehot) * self.shares
        self.weight.grad = torch.addmm(self.weight, errors.T, self.features, beta=self.penalty)
        self.bias.grad = errors.sum(dim=0)
        loss: Tensor = -(logs * self.onehot * self.shares).sum() + self.penalty / 2 * self.weight.square().sum()
        return loss

    def minimise(self, tolerance: float, max_iterations: int) -> tuple[int, float]:
        """Go to the minimum; gives the iterations it took and the largest entry of the gradient there."""
        iterations, largest = 0, self._largest_gradient()
        # A line search that ends on rounding is started again once or twice, without the history that led it there.
        for _ in range(3):
            if largest <= tolerance or iterations >= max_iterations:
                break
            iterations += self._descend(tolerance, max_iterations - iterations)
            largest = self._largest_gradient()
        return iterations, largest

    def _descend(self, tolerance: float, max_iterations: int) -> int:
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=max_iterations,
            max_eval=20 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(self.objective)  # type: ignore[no-untyped-call]
        state: dict[str, Any] = optimizer.state[self.weight]
        return int(state["n_iter"])

    def _largest_gradient(self) -> float:
        self.objective()
        assert self.weight.grad is not None
        assert self.bias.grad is not None
        return max(float(self.weight.grad.abs().max()), float(self.bias.grad.abs().max()))
