"""How a metric changes with the number of labels, and which images to label next, from features computed once."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtask.core.errors import UsageError
from flashtask.core.files import PathLike, atomic_write
from flashtask.heads import build_head
from flashtask.reports.evaluation import plain
from flashtask.reports.label_curve import CurvePoint, Measured, curve_page, measured
from flashtask.tasks.label_errors import features_of
from flashtask.trainer.text_table import WIDTH, text_table, wrapped
from flashtask.trainer.tuning.learning_rate_curve import check_picture

if TYPE_CHECKING:
    from flashtask.data.image_datamodule import ImageDataModule
    from flashtask.tasks.task import Task

__all__ = ["LearningCurve", "learning_curve"]

Array = np.ndarray[Any, Any]

_MOST_POINTS = 8
#: Ranges of numbers of which each draw has its share.
_RANGES = 10


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy, or mean absolute error, of a ridge head on the features of a frozen backbone, by the number of labels.

    Args:
        metric: `accuracy`, or `mae` for numbers.
        measured: points, gain and forecast.
        classes: names; empty for numbers.
        validated_on: images of the validation set.
        model: whose features they are.
        features: of the training images, (N, F).
        targets: class indices of the training images, (N,), or standardised numbers, (N, K).
    """

    metric: str
    measured: Measured
    classes: tuple[str, ...]
    validated_on: int
    model: Task = field(repr=False)
    features: Array = field(repr=False)
    targets: Array = field(repr=False)

    @property
    def points(self) -> tuple[CurvePoint, ...]:
        """The metric at each number of labels, from few to all."""
        return self.measured.points

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("labels", self.metric, "95 % interval", "draws", "deviation")

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{p.labels:,}",
                f"{p.mean:.4f}",
                f"{p.low:.4f} to {p.high:.4f}",
                str(len(p.draws)),
                "" if math.isnan(p.deviation) else f"{p.deviation:.4f}",
            )
            for p in self.points
        ]

    def sentences(self) -> Iterator[str]:
        """What the last labels brought, and what more of them may bring."""
        _, gain, forecast, why = self.measured
        if gain is not None:
            ends = f"95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
            yield f"from {gain.before:,} to {gain.after:,} labels: {gain.value:+.4f}, {ends}"
        if forecast is not None:
            last = self.points[-1]
            yield (
                f"{forecast.labels:,} labels: {forecast.value:.4f}, {forecast.low:.4f} to {forecast.high:.4f}, if a "
                f"power law goes on; fitted without the last point it says {forecast.said:.4f} for {last.labels:,} "
                f"labels, which have {last.mean:.4f}"
            )
        elif why:
            yield f"no forecast for more labels: {why}"

    def __str__(self) -> str:
        table = text_table(self._columns, self._rows()).rstrip()
        return "\n".join([table, *(line for one in self.sentences() for line in wrapped(one, WIDTH))])

    def to_dict(self) -> dict[str, Any]:
        """The points, the gain and the forecast as plain values."""
        points = [plain({**point._asdict(), "draws": list(point.draws)}) for point in self.points]
        _, gain, forecast, _ = self.measured
        about = {"metric": self.metric, "classes": list(self.classes), "validated_on": self.validated_on}
        more = {
            "gain": None if gain is None else plain(gain._asdict()),
            "forecast": None if forecast is None else plain(forecast._asdict()),
        }
        return {**about, "points": points, **more}

    def to_html(self, title: str = "Learning curve") -> str:
        """One page without scripts and network: the curve, the table and the sentences.

        Args:
            title: of the page.
        """
        about = f"{self.metric} of a ridge head on frozen features, on {self.validated_on:,} validation images"
        said = [about, *self.sentences()]
        return curve_page(title, self.metric, self.measured, self._columns, self._rows(), said)

    def plot(self, path: PathLike) -> None:
        """Draw the metric with its interval over the number of labels.

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
        axes.set_ylabel(f"{self.metric} on {self.validated_on:,} images")
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

        Raises:
            UsageError: the targets are numbers.
        """
        if not self.classes:
            raise UsageError(
                "images to label next are chosen only for data with one label per image, not for numbers",
                fix="leave out --unlabelled",
            )
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

    The backbone sees each image once, or never if a run has left its features in the cache. Classes, or ranges of
    numbers, keep their shares in each draw, with one image of each class at least; larger draws hold the smaller ones.

    Args:
        model: a task such as `ImageEmbedder("efficientnet_lite0")`, or a trained one.
        data: with one label or numbers an image, and validation images.
        sizes: numbers of labels; by default all, a half, a quarter, ..., eight at the most.
        draws: of the images of each size; all of them are drawn once.
        seed: of the draws.

    Raises:
        UsageError: the data has other targets or no validation images, or sizes that it does not have.
    """
    data.use_preprocessing(model.preprocessing)
    data.setup("fit")
    if data.targets.get("kind") not in ("label", "number"):
        raise UsageError("a learning curve is drawn for one label or numbers an image", fix="flashtask sweep RECIPE")
    if "val" not in data.sizes():
        raise UsageError("a learning curve needs validation images", fix="val_split=0.2")
    classes = tuple(getattr(data, "labels", ())) if data.targets["kind"] == "label" else ()
    features, targets = zip(*(_of_part(model, data, part, classes) for part in ("train", "val")), strict=True)
    chosen = _checked_sizes(sizes, len(targets[0]), max(1, len(classes)))
    own: Array = targets[0]
    mean: Any = None
    spread: Any = None
    if not classes:
        mean, spread = own.mean(axis=0), own.std(axis=0)
        spread[spread == 0] = 1
        own = (own - mean) / spread
    strata = own if classes else _ranges(own[:, 0], min(_RANGES, chosen[0]))
    values = {}
    for labels in chosen:
        is_all, of_draws = labels == len(own), []
        for draw in range(1 if is_all else draws):
            rows = slice(None) if is_all else _stratified(strata, labels, np.random.default_rng((seed, draw)))
            head = _solved(features[0][rows], own[rows], len(classes))
            with torch.no_grad():
                said = head(torch.from_numpy(features[1])).double().numpy()
            if spread is None:
                of_draws.append((said.argmax(axis=1) == targets[1]).astype(float))
            else:
                of_draws.append(np.abs(said * spread + mean - targets[1]).mean(axis=1))
        values[labels] = np.stack(of_draws)
    metric, groups = "accuracy" if classes else "mae", data.samples("val").groups
    found = measured(values, metric, None if groups is None else groups.tolist())
    return LearningCurve(metric, found, classes, len(targets[1]), model, features[0], own)


def _of_part(model: Task, data: ImageDataModule, part: str, classes: Sequence[str]) -> tuple[Array, Array]:
    """Features (N, F), and class indices (N,) or numbers (N, K)."""
    features = _flat(features_of(model, data.samples(part).inputs.tolist(), data.images))
    if not classes:
        loader: Any = data.train_dataloader() if part == "train" else data.val_dataloader()
        return features, np.asarray(loader.dataset.targets, dtype=np.float64).reshape(len(features), -1)
    places = {label: place for place, label in enumerate(classes)}
    return features, np.array([places[word] for word in data.target_words(part)])


def _ranges(values: Array, count: int) -> Array:
    """The range that each value is in, of `count` ranges with equally many values, (N,)."""
    ranks = values.argsort(kind="stable").argsort(kind="stable")
    found: Array = ranks * count // len(values)
    return found


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
    """Rows of `size` samples, in which each class has its share and at least one."""
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
    """A ridge head for class indices (N,), or for numbers (N, K)."""
    head: Any = build_head("ridge", features.shape[1], classes or targets.shape[1])
    head.solve(torch.from_numpy(features), torch.from_numpy(targets.astype(np.int64) if classes else targets))
    return head.eval()


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
