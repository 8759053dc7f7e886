"""What a task says about one sample: small frozen records, one kind a task.

Files, tables and pages show predictions by four things alone: `to_dict`, `as_row`, `draw`, and the picture in a
notebook. So a task of another kind needs no change in them.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from flashtask.core.errors import FlashtaskError
from flashtask.core.plain_json import number_or_null
from flashtask.data.box_drawing import draw_boxes
from flashtask.tasks.prediction_files import write_results

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Boxes", "Label", "Labels", "Number", "Prediction"]

#: Rows of text under a picture, at the most.
_MOST_LINES = 3


@dataclass(frozen=True)
class Prediction:
    """Base of predictions.

    Args:
        path: the path or address of the sample, None if it has neither.
    """

    #: Which of the arguments of `to_dict` and `as_row` mean something for such predictions.
    options: ClassVar[frozenset[str]] = frozenset()
    #: Which of `FILE_FORMATS` such predictions can be written in.
    formats: ClassVar[tuple[str, ...]] = ()

    path: str | None

    @classmethod
    def write(
        cls, form: str, predictions: Iterable[Self], output: str | os.PathLike[str], names: Mapping[str, str]
    ) -> None:
        """Write predictions, as they are known, in a format of `formats`.

        Args:
            form: the format.
            predictions: of images that have a `path`.
            output: a folder, which is made, or a file, as the format needs.
            names: by path, what files that belong to one image are called, without an ending.

        Raises:
            OutputError, StorageError: the output cannot be written.
        """
        raise NotImplementedError

    def to_dict(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain values for JSON; a number that JSON does not have is None. The arguments are those of `as_row`."""
        return {name: _for_json(value) for name, value in self.as_row(top_k=top_k, all_scores=all_scores).items()}

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """Cells of a table by the names of its columns: text, numbers, or lists and dictionaries. `path` comes first.

        Args:
            top_k: also lists of so many `labels` and `scores`, best first.
            all_scores: labels, each of which gets a column `score_LABEL`, in this order.
        """
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The prediction in words, a line each, the most important first."""
        return [f"{name}: {value}" for name, value in self.as_row().items() if name != "path"]

    def draw(self, image: Image) -> Image:
        """A copy of a picture with the prediction; the words stand below it."""
        import PIL.Image
        from PIL import ImageDraw, ImageFont

        size = max(12, image.height // 16)
        font, lines = ImageFont.load_default(size), self.lines()[:_MOST_LINES]
        made = PIL.Image.new("RGB", (image.width, image.height + round(1.3 * size * len(lines)) + 4), "white")
        made.paste(image.convert("RGB"))
        pen = ImageDraw.Draw(made)
        for number, line in enumerate(lines):
            pen.text((4, image.height + 1.3 * size * number), line, "black", font)
        return made

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows; None where the image cannot be read any more."""
        from flashtask.data.images import load_image

        if self.path is None:
            return None
        try:
            picture = load_image(self.path, value_range="format")
        except (FlashtaskError, OSError):
            return None
        picture.thumbnail((512, 512))
        held = io.BytesIO()
        self.draw(picture).save(held, "PNG")
        return held.getvalue()


@dataclass(frozen=True)
class Label(Prediction):
    """One label an image.

    Args:
        labels: of all classes, the most probable first.
        scores: their probabilities, in the same order.
        decision: `accepted` or `unknown`; None if the model has no threshold for that.
    """

    options = frozenset({"top_k", "all_scores"})

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    decision: str | None = None

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[0]

    @property
    def probabilities(self) -> dict[str, float]:
        """Every label with its probability, most probable first."""
        return dict(zip(self.labels, self.scores, strict=True))

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, `label`, `score`, `decision` if there is one, and what the arguments ask for."""
        row: dict[str, Any] = {"path": self.path, "label": self.label, "score": self.score, **_decided(self.decision)}
        if top_k:
            row |= {"labels": list(self.labels[:top_k]), "scores": list(self.scores[:top_k])}
        return row | _score_cells(self.probabilities, all_scores)

    def to_dict(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """As `as_row`; `all_scores` makes `scores` a mapping of labels."""
        return super().to_dict(top_k=top_k) | _scores_by_label(self.probabilities, all_scores)

    def lines(self) -> list[str]:
        """The best labels with their probabilities."""
        lines = [f"{label} {score:.3f}" for label, score in zip(self.labels, self.scores, strict=True)]
        return [f"{lines[0]} ({self.decision})", *lines[1:]] if self.decision else lines


@dataclass(frozen=True)
class Labels(Prediction):
    """Any number of labels an image.

    Args:
        labels: those whose probability reaches their threshold, the most probable first.
        probabilities: of every label, in the order of the model's outputs.
        thresholds: of every label, in the same order.
        decision: as of `Label`.
    """

    options = frozenset({"all_scores"})

    labels: tuple[str, ...]
    probabilities: Mapping[str, float]
    thresholds: Mapping[str, float]
    decision: str | None = None

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, lists `labels` and `scores` of the labels that apply, `decision`, and what `all_scores` asks for."""
        row = {"path": self.path, "labels": list(self.labels), "scores": [self.probabilities[n] for n in self.labels]}
        return row | _decided(self.decision) | _score_cells(self.probabilities, all_scores)

    def to_dict(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """As `as_row`; `all_scores` makes `scores` a mapping of all labels."""
        return super().to_dict() | _scores_by_label(self.probabilities, all_scores)

    def lines(self) -> list[str]:
        """The labels that apply with their probabilities; else that none does."""
        lines = [f"{label} {self.probabilities[label]:.3f}" for label in self.labels] or ["no label"]
        return [f"{lines[0]} ({self.decision})", *lines[1:]] if self.decision else lines


@dataclass(frozen=True)
class Number(Prediction):
    """One number an image, or several, in the unit of the targets.

    Args:
        values: by name.
    """

    values: Mapping[str, float]

    @property
    def value(self) -> float:
        """The number; of several the first."""
        return next(iter(self.values.values()))

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, and a column for each number."""
        return {"path": self.path, **self.values}

    def lines(self) -> list[str]:
        """Each number with its name."""
        return [f"{name} {value:.4g}" for name, value in self.values.items()]


@dataclass(frozen=True)
class Boxes(Prediction):
    """Any number of objects an image, the one with the highest score first.

    Args:
        labels: of each object.
        scores: from 0 to 1.
        boxes: left, top, right, bottom in pixels of the upright file, 0 at its left and upper edge.
        category_ids: what the training annotations call each label, for COCO's list of results.
    """

    formats: ClassVar[tuple[str, ...]] = ("coco",)

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    category_ids: tuple[int, ...]

    def as_row(self, *, top_k: int | None = None, all_scores: Sequence[str] | None = None) -> dict[str, Any]:
        """`path`, the number of objects as `count`, and lists of `labels`, `scores` and `boxes`."""
        lists = {"labels": list(self.labels), "scores": list(self.scores), "boxes": [list(box) for box in self.boxes]}
        return {"path": self.path, "count": len(self.boxes), **lists}

    def lines(self) -> list[str]:
        """How many objects there are of each label."""
        counts = Counter(self.labels).most_common()
        return [", ".join(f"{count} {label}" for label, count in counts) or "no objects"]

    def draw(self, image: Image) -> Image:
        """A copy of a picture with the boxes, their labels and scores.

        Args:
            image: the file's picture, upright, in its own size.
        """
        words = [f"{label} {score:.2f}" for label, score in zip(self.labels, self.scores, strict=True)]
        return draw_boxes(image, self.boxes, words, self.category_ids)

    @classmethod
    def write(
        cls, form: str, predictions: Iterable[Self], output: str | os.PathLike[str], names: Mapping[str, str]
    ) -> None:
        """COCO's list of results; `image_id` is the place of the image in the order of prediction, from 0."""
        results = (result for place, one in enumerate(predictions) for result in one.to_coco(place))
        write_results(results, output)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """The image's part of COCO's list of results; `bbox` is left, top, width, height."""
        name = None if self.path is None else os.path.basename(self.path)
        return [
            {
                "image_id": image_id,
                "file_name": name,
                "category_id": number,
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for number, score, (left, top, right, bottom) in zip(
                self.category_ids, self.scores, self.boxes, strict=True
            )
        ]

    def _repr_png_(self) -> bytes | None:
        """The file with its boxes; None where it cannot be read any more."""
        from flashtask.data.images import load_image

        if self.path is None:
            return None
        try:
            made = self.draw(load_image(self.path, value_range="format"))
        except (FlashtaskError, OSError):
            return None
        made.thumbnail((1024, 1024))
        held = io.BytesIO()
        made.save(held, "PNG")
        return held.getvalue()


def _decided(decision: str | None) -> dict[str, str]:
    return {} if decision is None else {"decision": decision}


def _score_cells(probabilities: Mapping[str, float], labels: Sequence[str] | None) -> dict[str, float]:
    return {f"score_{label}": probabilities[label] for label in labels or ()}


def _scores_by_label(probabilities: Mapping[str, float], labels: Sequence[str] | None) -> dict[str, Any]:
    return {"scores": {label: number_or_null(probabilities[label]) for label in labels}} if labels else {}


def _for_json(value: Any) -> Any:
    if isinstance(value, float):
        return number_or_null(value)
    if isinstance(value, Mapping):
        return {name: _for_json(each) for name, each in value.items()}
    return [_for_json(each) for each in value] if isinstance(value, (list, tuple)) else value
