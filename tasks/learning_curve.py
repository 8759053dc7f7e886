"""How accuracy grows with the number of labels, and which images to label next, from features computed once."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtask.core.errors import UsageError
from flashtask.core.files import PathLike, atomic_write
from flashtask.heads import build_head
from flashtask.tasks.label_errors import features_of
from flashtask.trainer.text_table import text_table
from flashtask.trainer.tuning.learning_rate_curve import check_picture

if TYPE_CHECKING:
    from flashtask.data.image_datamodule import ImageDataModule
    from flashtask.tasks.task import Task

__all__ = ["CurvePoint", "LearningCurve", "learning_curve"]

Array = np.ndarray[Any, Any]

#: Normal quantile of a two-sided interval of 95 %.
_Z = 1.96
_MOST_POINTS = 8


@dataclass(frozen=True)
class CurvePoint:
    """The accuracy with so many labels.

    Args:
        labels: training images.
        accuracies: of each draw of these images, 0 to 1.
        mean: of the draws.
        low: lower end of the interval of 95 % for one training on such a draw, measured on new data: the spread of the
            draws and the size of the validation set.
        high: its upper end.
    """

    labels: int
    accuracies: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy of a ridge head on the features of a frozen backbone, by the number of labels.

    Args:
        points: in the order of their numbers.
        classes: names.
        validated_on: images of the validation set.
        model: whose features they are.
        features: of the training images, (N, F).
        targets: class indices of the training images, (N,).
    """

    points: tuple[CurvePoint, ...]
    classes: tuple[str, ...]
    validated_on: int
    model: Task = field(repr=False)
    features: Array = field(repr=False)
    targets: Array = field(repr=False)

    def __str__(self) -> str:
        rows = [
            (f"{p.labels:,}", f"{p.mean:.4f}", f"{p.low:.4f} to {p.high:.4f}", str(len(p.accuracies)))
            for p in self.points
        ]
        return text_table(("labels", "accuracy", "95 % interval", "draws"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The points as plain values."""
        points = [{**vars(point), "accuracies": list(point.accuracies)} for point in self.points]
        return {"points": points, "classes": list(self.classes), "validated_on": self.validated_on}

    def plot(self, path: PathLike) -> None:
        """Draw the accuracies with their interval over the number of labels.

        Raises:
            UsageError: matplotlib is not installed, or writes no such kind of picture.
            OutputError: the file cannot be written.
        """
        kind = check_picture(path)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        labels = [point.labels for point in self.points]
        axes.fill_between(labels, [p.low for p in self.points], [p.high for p in self.points], alpha=0.2)
        axes.plot(labels, [point.mean for point in self.points], marker="o")
        axes.set_xscale("log")
        axes.set_xticks(labels, [f"{size:,}" for size in labels])
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylabel(f"accuracy on {self.validated_on:,} images")
        axes.grid(alpha=0.3)
        held = io.BytesIO()
        figure.savefig(held, format=kind)
        with atomic_write(path) as file:
            file.write(held.getvalue())

    def next_labels(self, paths: Sequence[str], count: int, seed: int = 0) -> list[str]:
        """The unlabelled images whose labels promise most: uncertain ones that differ from each other, the first first.

        They are drawn as k-means++ draws its centres, from the gradients that each image would have in the last layer
        if the head were right (BADGE; Ash et al., 2020, arXiv:1906.03671): long for uncertain images, and of another
        direction for other images.

        Args:
            paths: image files.
            count: how many to choose, at the most all.
            seed: of the draws.
        """
        features = _flat(features_of(self.model, list(paths)))
        head = _solved(self.features, self.targets, len(self.classes))
        with torch.no_grad():
            scores = head(torch.from_numpy(features)).double().softmax(dim=1).numpy()
        chosen = _diverse(scores, features, min(count, len(paths)), np.random.default_rng(seed))
        return [paths[row] for row in chosen]


def learning_curve(
    model: Task, data: ImageDataModule, *, sizes: Sequence[int] | None = None, draws: int = 10, seed: int = 0
) -> LearningCurve:
    """Fit a ridge head to more and more of the training images, and measure each on the validation images.

    The backbone sees each image once, or never if a run has left its features in the cache. Classes keep their shares
    in each draw, with one image at least; larger draws hold the smaller ones.

    Args:
        model: a task such as `ImageEmbedder("efficientnet_lite0")`, or a trained one.
        data: for classification, with validation images.
        sizes: numbers of labels; by default all, a half, a quarter, ..., eight at the most.
        draws: of the images of each size; all of them are drawn once.
        seed: of the draws.

    Raises:
        UsageError: the data has no classes or no validation images, or sizes that it does not have.
    """
    data.use_preprocessing(model.preprocessing)
    data.setup("fit")
    classes = tuple(getattr(data, "labels", None) or ())
    if not classes or getattr(data, "is_multi_label", False):
        raise UsageError("a learning curve is drawn for data with one label per image", fix="flashtask sweep RECIPE")
    if "val" not in data.sizes():
        raise UsageError("a learning curve needs validation images", fix="val_split=0.2")
    features, targets = zip(*(_of_part(model, data, part, classes) for part in ("train", "val")), strict=True)
    points = []
    for labels in _checked_sizes(sizes, len(targets[0]), len(classes)):
        is_all = labels == len(targets[0])
        accuracies = []
        for draw in range(1 if is_all else draws):
            rows = slice(None) if is_all else _stratified(targets[0], labels, np.random.default_rng((seed, draw)))
            head = _solved(features[0][rows], targets[0][rows], len(classes))
            with torch.no_grad():
                said = head(torch.from_numpy(features[1])).argmax(dim=1).numpy()
            accuracies.append(float((said == targets[1]).mean()))
        points.append(_point(labels, accuracies, len(targets[1])))
    return LearningCurve(tuple(points), classes, len(targets[1]), model, features[0], targets[0])


def _of_part(model: Task, data: ImageDataModule, part: str, classes: Sequence[str]) -> tuple[Array, Array]:
    places = {label: place for place, label in enumerate(classes)}
    targets = np.array([places[word] for word in data.target_words(part)])
    return _flat(features_of(model, data.samples(part).inputs.tolist(), data.images)), targets


def _flat(features: Array) -> Array:
    """(N, F) of what a backbone gives: the mean over tokens where it gives several."""
    return np.array(features if features.ndim == 2 else features.mean(axis=1), dtype=np.float32)


def _checked_sizes(sizes: Sequence[int] | None, most: int, classes: int) -> list[int]:
    if sizes is None:
        halves = [most >> power for power in range(_MOST_POINTS)]
        return sorted({size for size in halves if size >= 2 * classes} | {most})
    for size in sizes:
        if not classes <= size <= most:
            raise UsageError(
                f"a learning curve cannot have a point at {size} labels",
                why=f"there are {most:,} training images, and each of the {classes} classes needs one",
                fix=f"sizes from {classes} to {most}",
            )
    return sorted(set(sizes))


def _stratified(targets: Array, size: int, random: np.random.Generator) -> Array:
    """Rows of so many samples, in which each class has its share and one at least."""
    by_class = [random.permutation(np.flatnonzero(targets == label)) for label in np.unique(targets)]
    counts = [1] * len(by_class)
    for _ in range(size - len(by_class)):
        # The class that is furthest below its share is next, so a smaller draw is a part of a larger one.
        behind = [
            counts[place] / len(rows) if counts[place] < len(rows) else math.inf for place, rows in enumerate(by_class)
        ]
        counts[int(np.argmin(behind))] += 1
    return np.concatenate([rows[:count] for rows, count in zip(by_class, counts, strict=True)])


def _solved(features: Array, targets: Array, classes: int) -> Any:
    head: Any = build_head("ridge", features.shape[1], classes)
    head.solve(torch.from_numpy(features), torch.from_numpy(np.asarray(targets, dtype=np.int64)))
    return head.eval()


def _point(labels: int, accuracies: Sequence[float], validated_on: int) -> CurvePoint:
    mean = float(np.mean(accuracies))
    of_draws = float(np.var(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
    half = _Z * math.sqrt(of_draws + mean * (1 - mean) / validated_on)
    return CurvePoint(labels, tuple(accuracies), mean, max(0.0, mean - half), min(1.0, mean + half))


def _diverse(scores: Array, features: Array, count: int, random: np.random.Generator) -> list[int]:
    """Rows drawn as k-means++ does, from the products of the errors of the scores and the features.

    The products (C x F) are never made: their inner product is that of the errors times that of the features.
    """
    errors = scores.copy()
    errors[np.arange(len(scores)), scores.argmax(axis=1)] -= 1
    lengths = (errors**2).sum(axis=1) * (features.astype(np.float64) ** 2).sum(axis=1)
    chosen: list[int] = []
    apart = lengths.copy()
    for _ in range(count):
        total = apart.sum()
        if not chosen:
            row = int(lengths.argmax())
        elif total > 0:
            row = int(random.choice(len(apart), p=apart / total))
        else:  # copies of what was chosen are all that is left
            row = next(row for row in range(len(apart)) if row not in chosen)
        chosen.append(row)
        inner = (errors @ errors[row]) * (features @ features[row])
        apart = np.minimum(apart, np.maximum(lengths + lengths[row] - 2 * inner, 0))
        apart[chosen] = 0
    return chosen
