"""Metrics by name. Importing this imports torchmetrics, which takes two seconds: tasks do so when they measure."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score, SpearmanCorrCoef
from torchmetrics import classification as of_classes

from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["LabelsF1", "MeanAveragePrecision", "label_metrics", "named_metrics", "number_metrics", "regression_metrics"]
__all__ += ["label_metrics_by_class", "labels_metrics_by_class", "number_metrics_by_target"]

Maker = Callable[[int], Metric]

#: Of probabilities (B, classes) and class indices (B,).
label_metrics: Mapping[str, Maker] = {
    "balanced_accuracy": lambda n: of_classes.MulticlassAccuracy(n, average="macro"),
    "f1": lambda n: of_classes.MulticlassF1Score(n, average="macro"),
    "precision": lambda n: of_classes.MulticlassPrecision(n, average="macro"),
    "recall": lambda n: of_classes.MulticlassRecall(n, average="macro"),
    "auroc": lambda n: of_classes.MulticlassAUROC(n, average="macro"),
    "average_precision": lambda n: of_classes.MulticlassAveragePrecision(n, average="macro"),
    "cohen_kappa": lambda n: of_classes.MulticlassCohenKappa(n),
    "mcc": lambda n: of_classes.MulticlassMatthewsCorrCoef(n),
    "calibration_error": lambda n: of_classes.MulticlassCalibrationError(n),
}

#: Of numbers and targets, both (B,), or (B, numbers).
number_metrics: Mapping[str, Maker] = {
    "mae": lambda n: MeanAbsoluteError(),
    "rmse": lambda n: MeanSquaredError(squared=False),
    "mse": lambda n: MeanSquaredError(),
    "r2": lambda n: _R2(),
    "spearman": lambda n: _Spearman(num_outputs=n),
}


def named_metrics(given: Iterable[Any] | None, known: Mapping[str, Maker], num_outputs: int) -> dict[str, Metric]:
    """Metrics that are given by name, or as objects of torchmetrics, which are named after their class.

    Raises:
        UnknownNameError: with the nearest names.
        UsageError: something that is neither.
    """
    found: dict[str, Metric] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all targets")
        for one in [given] if isinstance(given, (str, Metric)) else given or ():
            if isinstance(one, Metric):
                found[re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(one).__name__).lower()] = one.clone()
            elif isinstance(one, str):
                if one not in known:
                    raise UnknownNameError("metric", one, sorted(known))
                found[one] = known[one](num_outputs)
            else:
                raise UsageError(
                    f"a metric is one of {', '.join(known)}, or a metric of torchmetrics, not {one!r}",
                    fix=f'metrics=["{next(iter(known))}"]',
                )
    return found


def label_metrics_by_class(num_classes: int) -> dict[str, Metric]:
    """Of probabilities (B, classes) and class indices: a number for each class."""
    return {
        "precision": of_classes.MulticlassPrecision(num_classes, average=None),
        "recall": of_classes.MulticlassRecall(num_classes, average=None),
        "f1": of_classes.MulticlassF1Score(num_classes, average=None),
    }


def labels_metrics_by_class(num_labels: int) -> dict[str, Metric]:
    """Of probabilities and zeros and ones (B, labels): a number for each label."""
    return {
        "average_precision": MeanAveragePrecision(num_labels, average=None),
        "f1": LabelsF1(num_labels, average=None),
    }


def number_metrics_by_target(num_targets: int) -> dict[str, Metric]:
    """Of numbers and targets (B, numbers): a value for each number."""
    return {
        "mae": MeanAbsoluteError(num_outputs=num_targets),
        "rmse": MeanSquaredError(squared=False, num_outputs=num_targets),
    }


def regression_metrics(given: Iterable[Any] | None, num_outputs: int) -> dict[str, Metric]:
    """Those that every regression has, and those that are given."""
    return named_metrics([*("mae", "rmse", "r2", "spearman"), *(given or ())], number_metrics, num_outputs)


class _R2(R2Score):
    """NaN for fewer than two samples, where torchmetrics raises."""

    def compute(self) -> Tensor:
        return torch.tensor(math.nan) if int(self.total) < 2 else super().compute()


class _Spearman(SpearmanCorrCoef):
    """The mean over several numbers."""

    def compute(self) -> Tensor:
        return super().compute().mean()


class MeanAveragePrecision(of_classes.MultilabelAveragePrecision):
    """The mean over labels of the area under the precision-recall curve; labels without a positive do not count.

    Args:
        num_labels: how many there are.
        average: `macro`, the mean; or None for the area of each label, NaN for one without a positive.
    """

    def __init__(self, num_labels: int, average: str | None = "macro") -> None:
        super().__init__(num_labels, average="none")
        self.is_mean = average is not None

    def compute(self) -> Tensor:  # type: ignore[override]  # its parent's own parent gives curves
        """The mean; NaN if there is no positive at all. Without `average` the area of each label."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")
            of_each = super().compute()
        targets = torch.cat(list(self.target)) if isinstance(self.target, list) else self.target
        counted = targets.sum(dim=0) > 0
        found: Tensor = of_each[counted].mean() if self.is_mean else of_each.where(counted, math.nan)
        return found


class LabelsF1(Metric):
    """F1 of each label at its threshold, averaged over the labels that occur or are predicted.

    The thresholds are chosen from 0.01 to 0.99 in hundredths, so counts of a fixed size are enough: no output is kept.

    Args:
        num_labels: how many there are.
        thresholds: of each label; None chooses, in `compute`, those with the highest F1, of equal ones the nearest to
            0.5.
        average: `macro`, the mean; or None for the F1 of each label, NaN for one that neither occurs nor is predicted.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(
        self, num_labels: int, thresholds: tuple[float, ...] | None = None, average: str | None = "macro"
    ) -> None:
        super().__init__()
        self.thresholds, self.average = thresholds, average
        #: The thresholds of the last `compute`.
        self.chosen: tuple[float, ...] | None = None
        self._grid = torch.arange(1, 100, dtype=torch.float64) / 100
        # True positives, false positives and false negatives of each label at each threshold.
        self.add_state("counts", torch.zeros(3, num_labels, len(self._grid), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: probabilities (B, labels).
            target: zeros and ones (B, labels).
        """
        says = preds.double().unsqueeze(-1) >= self._grid.to(preds.device)
        holds = target.bool().unsqueeze(-1)
        self.counts += torch.stack([(says & holds).sum(0), (says & ~holds).sum(0), (~says & holds).sum(0)])

    def compute(self) -> Tensor:
        """The mean F1; 0 if no label occurs or is predicted. Without `average` that of each label."""
        hits, wrong, missed = self.counts.double()
        f1 = 2 * hits / (2 * hits + wrong + missed).clamp(min=1)
        if self.thresholds is None:
            away = (self._grid.to(f1.device) - 0.5).abs()
            best = (f1 - 1e-9 * away).argmax(dim=1)
        else:
            given = torch.tensor(self.thresholds, dtype=torch.float64)
            best = ((given * 100).round().long() - 1).clamp(0, len(self._grid) - 1).to(f1.device)
        self.chosen = tuple(self._grid[index].item() for index in best.tolist())
        at = f1.gather(1, best[:, None])[:, 0]
        counted = (hits + wrong + missed).gather(1, best[:, None])[:, 0] > 0
        if self.average is None:
            of_each: Tensor = at.where(counted, math.nan)
            return of_each
        mean: Tensor = at[counted].mean() if bool(counted.any()) else at.new_zeros(())
        return mean
