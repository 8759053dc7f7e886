"""Metrics by name. Importing this imports torchmetrics, which takes two seconds: tasks do so when they measure."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import (
    ExplainedVariance,
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    Metric,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)
from torchmetrics import classification as of_classes

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.named_choice import name_and_arguments

__all__ = ["LabelsF1", "MeanAveragePrecision", "NamedMetrics", "label_metrics", "labels_metrics", "named_metrics"]
__all__ += ["label_metrics_by_class", "labels_metrics_by_class", "number_metrics", "number_metrics_by_target"]
__all__ += ["regression_metrics"]

#: A metric by the number of outputs and its arguments.
Maker = Callable[..., Metric]

#: How a metric of classes is averaged, as the end of its name says; `per_class` gives a number for each class.
_AVERAGES = {"macro": "macro", "micro": "micro", "weighted": "weighted", "per_class": None}
#: Of the expected calibration error, as on the page of a run; torchmetrics would take 15.
_BINS = 10
#: What gives curves, matrices or pairs in place of a number.
_NOT_NUMBERS = ("roc", "precision_recall_curve", "confusion_matrix", "stat_scores", "exact_match", "eer")
#: Usual names of torchmetrics' classes.
_SHORT = {
    "f1": "f1_score",
    "fbeta": "fbeta_score",
    "iou": "jaccard_index",
    "kappa": "cohen_kappa",
    "mcc": "matthews_corr_coef",
}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class _OfClasses:
    """A metric of torchmetrics for classes or labels; averaged over them (`macro`) unless `average` says otherwise.

    Args:
        kind: the class of torchmetrics.
        counted: its argument for the number of outputs.
        fixed: arguments that the name implies.
    """

    def __init__(self, kind: type[Metric], counted: str, **fixed: Any) -> None:
        self.kind, self.counted, self.fixed = kind, counted, fixed
        self.arguments = [name for name in inspect.signature(kind).parameters if name not in (counted, "kwargs")]

    @property
    def is_averaged(self) -> bool:
        return "average" in self.arguments and "average" not in self.fixed

    def __call__(self, num_outputs: int, **arguments: Any) -> Metric:
        average = {"average": "macro"} if self.is_averaged else {}
        return self.kind(**{self.counted: num_outputs, **average, **self.fixed, **arguments})


def _of_classes(prefix: str, counted: str, **more: Maker) -> dict[str, Maker]:
    """The metrics of torchmetrics whose class begins with a prefix, by their names in lower case, and others."""
    found: dict[str, Maker] = {}
    for name in of_classes.__all__:
        short = _snake(name.removeprefix(prefix))
        if name.startswith(prefix) and short not in _NOT_NUMBERS and "_at_" not in short:
            found[short] = _OfClasses(getattr(of_classes, name), counted)
    return {**found, **{short: found[name] for short, name in _SHORT.items() if name in found}, **more}


#: Of probabilities (B, classes) and class indices (B,).
label_metrics: Mapping[str, Maker] = _of_classes(
    "Multiclass",
    "num_classes",
    balanced_accuracy=_OfClasses(of_classes.MulticlassAccuracy, "num_classes", average="macro"),
    ece=_OfClasses(of_classes.MulticlassCalibrationError, "num_classes", n_bins=_BINS),
)
#: Of probabilities (B, labels) and zeros and ones (B, labels).
labels_metrics: Mapping[str, Maker] = _of_classes(
    "Multilabel", "num_labels", ece=lambda n: _LabelsCalibrationError(n_bins=_BINS)
)

#: Of numbers and targets, both (B,), or (B, numbers).
number_metrics: Mapping[str, Maker] = {
    "mae": lambda n: MeanAbsoluteError(),
    "rmse": lambda n: MeanSquaredError(squared=False),
    "mse": lambda n: MeanSquaredError(),
    "mape": lambda n: MeanAbsolutePercentageError(),
    "r2": lambda n: _R2(),
    "spearman": lambda n: _Spearman(num_outputs=n),
    "pearson": lambda n: _Pearson(num_outputs=n),
    "explained_variance": lambda n: ExplainedVariance(),
}


class NamedMetrics(NamedTuple):
    """Metrics that were asked for.

    Args:
        whole: with one number, by name.
        by_class: with a number for each class, by name.
    """

    whole: dict[str, Metric]
    by_class: dict[str, Metric]


def named_metrics(given: Any, known: Mapping[str, Maker], num_outputs: int) -> NamedMetrics:
    """Metrics that are given by name, with or without arguments, or as objects of torchmetrics.

    Args:
        given: one or a list of: a name (`f1`, averaged as its end says: `f1_micro`, `f1_weighted`, `f1_per_class`);
            `(name, {arguments})` or `{name: {arguments}}`, where the argument `name` says what it is called in logs; an
            object, which is named after its class.
        known: by name.
        num_outputs: of the model.

    Raises:
        UnknownNameError: a metric or an argument that does not exist, with the nearest names.
        UsageError: something else, arguments that the metric refuses, or two metrics of one name.
    """
    found = NamedMetrics({}, {})
    is_one = isinstance(given, (str, Metric, Mapping)) or _is_pair(given) or not isinstance(given, Iterable | None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all targets")
        for one in [given] if is_one else given or ():
            if isinstance(one, Metric):
                name, metric, is_by_class = _snake(type(one).__name__), one.clone(), False
            else:
                name, metric, is_by_class = _made(one, known, num_outputs)
            taken = found.by_class if is_by_class else found.whole
            if name in taken:
                raise UsageError(
                    f"two metrics are named {name!r}", fix=f'("{name}", {{"name": "{name}_2", ...}}) gives one a name'
                )
            taken[name] = metric
    return found


def _is_pair(given: Any) -> bool:
    """Whether it is a name with arguments, and not a list of two metrics."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not isinstance(given[1], Mapping):
        return False
    # `["mcc", {"fbeta": {"beta": 2.0}}]` names two; `["fbeta", {"beta": 2.0}]` is one with its arguments.
    return isinstance(given, tuple) or not all(isinstance(value, Mapping) for value in given[1].values())


def _made(one: Any, known: Mapping[str, Maker], num_outputs: int) -> tuple[str, Metric, bool]:
    """The name of a metric in logs, the metric, and whether it has a number for each class."""
    choice = name_and_arguments(one)
    if choice is None:
        raise UsageError(
            f"a metric is one of {', '.join([*known][:4])}, ..., or an object of torchmetrics, not {one!r}",
            fix=f'metrics=["{next(iter(known))}"]',
        )
    name, arguments = choice
    make, average = _maker_of(name, known)
    arguments = {**average, **arguments}
    shown = arguments.pop("name", name.removesuffix("_per_class"))
    taken = make.arguments if isinstance(make, _OfClasses) else []
    for argument in arguments:
        if argument not in taken:
            raise UnknownNameError(f"argument of the metric {name!r}", argument, [*taken, "name"])
    try:
        metric = make(num_outputs, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the metric {name!r} cannot be made with {arguments}", why=str(error)) from None
    is_by_class = isinstance(make, _OfClasses) and make.is_averaged and arguments.get("average", "macro") in _EACH
    return shown, metric, is_by_class


#: Averages of torchmetrics that leave the numbers of the classes apart.
_EACH = (None, "none")


def _maker_of(name: str, known: Mapping[str, Maker]) -> tuple[Maker, dict[str, Any]]:
    """What makes a metric, and how the end of its name says that it is averaged."""
    if name in known:
        return known[name], {}
    for end, average in _AVERAGES.items():
        make = known.get(name.removesuffix(f"_{end}"))
        if name.endswith(f"_{end}") and isinstance(make, _OfClasses) and make.is_averaged:
            return make, {"average": average}
    averaged = [one for one, make in known.items() if isinstance(make, _OfClasses) and make.is_averaged]
    raise UnknownNameError("metric", name, sorted([*known, *(f"{one}_{end}" for one in averaged for end in _AVERAGES)]))


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


def regression_metrics(given: Any, num_outputs: int) -> dict[str, Metric]:
    """Those that every regression has, and those that are given."""
    own = named_metrics(["mae", "rmse", "r2", "spearman"], number_metrics, num_outputs).whole
    return {**named_metrics(given, number_metrics, num_outputs).whole, **own}


class _R2(R2Score):
    """NaN for fewer than two samples, where torchmetrics raises."""

    def compute(self) -> Tensor:
        return torch.tensor(math.nan) if int(self.total) < 2 else super().compute()


class _Spearman(SpearmanCorrCoef):
    """The mean over several numbers."""

    def compute(self) -> Tensor:
        return super().compute().mean()


class _Pearson(PearsonCorrCoef):
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


class _LabelsCalibrationError(of_classes.BinaryCalibrationError):
    """The calibration error of the scores of all labels together."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.flatten(), target.flatten())


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
        says = preds.double().unsqueeze(-1) >= self._bounds().to(preds.device)
        holds = target.bool().unsqueeze(-1)
        self.counts += torch.stack([(says & holds).sum(0), (says & ~holds).sum(0), (~says & holds).sum(0)])

    def _bounds(self) -> Tensor:
        """(1 or labels, 99) thresholds that are counted at; those that are given fill their row."""
        if self.thresholds is None:
            return self._grid[None]
        return torch.tensor(self.thresholds, dtype=torch.float64)[:, None].expand(-1, len(self._grid))

    def compute(self) -> Tensor:
        """The mean F1; 0 if no label occurs or is predicted. Without `average` that of each label."""
        hits, wrong, missed = self.counts.double()
        f1 = 2 * hits / (2 * hits + wrong + missed).clamp(min=1)
        if self.thresholds is None:
            away = (self._grid.to(f1.device) - 0.5).abs()
            best = (f1 - 1e-9 * away).argmax(dim=1)
            self.chosen = tuple(self._grid[index].item() for index in best.tolist())
        else:
            best = torch.zeros(f1.shape[0], dtype=torch.long, device=f1.device)
            self.chosen = tuple(self.thresholds)
        at = f1.gather(1, best[:, None])[:, 0]
        counted = (hits + wrong + missed).gather(1, best[:, None])[:, 0] > 0
        if self.average is None:
            of_each: Tensor = at.where(counted, math.nan)
            return of_each
        mean: Tensor = at[counted].mean() if bool(counted.any()) else at.new_zeros(())
        return mean
