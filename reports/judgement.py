"""What a task says about its prediction for one sample: what the report counts, orders and shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Judged", "Judgement", "Pair", "Scoring"]

Array = np.ndarray[Any, Any]
#: Left, top, right, bottom in pixels of the upright file.
Box = tuple[float, float, float, float]


class Pair(NamedTuple):
    """A true class and the one that was predicted in its place: of an image, an object, or some pixels.

    Args:
        truth: the label; empty where there is nothing.
        predicted: the label; empty where nothing was predicted.
        weight: how much it counts: 1, or a number of pixels.
        score: of the prediction, from 0 to 1; NaN if it has none.
        box: where it is in the picture; None for the whole picture.
        kind: of an error about an object: `class`, `localisation`, `duplicate`, `missed` or `background`.
    """

    truth: str
    predicted: str
    weight: float = 1.0
    score: float = math.nan
    box: Box | None = None
    kind: str = ""


class Judgement(NamedTuple):
    """How good a prediction is.

    Args:
        error: the larger, the worse; what it is `Scoring.error` says.
        certainty: of the model, the larger, the more certain; None if it does not say.
        pairs: of classes, of which the confusion matrix is made; empty without classes.
        scores: by label, the scores that were given and whether each was right, for curves and calibration.
        numbers: by name, the true and the predicted number.
    """

    error: float
    certainty: float | None = None
    pairs: Sequence[Pair] = ()
    scores: Mapping[str, Sequence[tuple[float, bool]]] = {}
    numbers: Mapping[str, tuple[float, float]] = {}


@dataclass(frozen=True)
class Scoring:
    """How a task judges: what its numbers are called, and which metric gets an interval.

    Args:
        error: what `Judgement.error` is, in words: `absolute error`.
        metric: the metric with an interval, as validation logs it without `val_`: `accuracy`.
        value: the metric, from what is right, what there is and what was predicted of each class, (K, ...) each; None
            if the metric is the mean of the errors.
        nothing: what a missing class is called in the confusion matrix; empty if there is always something.
        classes_exclude: whether the scores of the classes of a sample sum to 1.
        unit: of the weights of pairs: `images`, `objects`, `pixels`.
        title: what people call the metric; empty for its name.
    """

    error: str = "loss"
    metric: str = "loss"
    value: Callable[[Array, Array, Array], Array] | None = None
    nothing: str = ""
    classes_exclude: bool = False
    unit: str = "images"
    title: str = ""


@dataclass(frozen=True)
class Judged:
    """A sample with its prediction.

    Args:
        name: the path relative to the folder of its part, with forward slashes.
        input: the absolute path, the address, or the name of a picture in memory.
        target: in words.
        said: the prediction in words.
        row: the prediction, as `predict` writes it in a table.
        judgement: of it.
        columns: what samples are sliced by: names of columns with their values.
    """

    name: str
    input: str
    target: str
    said: str
    row: Mapping[str, Any]
    judgement: Judgement
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_wrong(self) -> bool:
        """Whether a class was taken for another, in the sample or in any object of it."""
        return any(pair.truth != pair.predicted for pair in self.judgement.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `prediction` is the row."""
        one = self.judgement
        found = {"name": self.name, "path": self.input, "target": self.target, "prediction": dict(self.row)}
        certainty = {} if one.certainty is None else {"certainty": _number(one.certainty)}
        return {**found, "error": _number(one.error), **certainty}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
