"""`ObjectDetector`: any number of objects an image, each with a box and a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.number_checks import is_number
from flashtask.data.boxes import BoxReader
from flashtask.data.decoding import Fitting
from flashtask.data.inputs import Input
from flashtask.data.object_detection import ObjectDetectionData
from flashtask.reports.judgement import Judgement, Scoring
from flashtask.reports.statistics import mean_f1
from flashtask.tasks.batches import StepOutput, in_a_line
from flashtask.tasks.box_loss import boxes_in_file, boxes_of_outputs, detection_loss
from flashtask.tasks.predictions import Boxes, Prediction
from flashtask.tasks.relabelling import LabelChange, keep_rows
from flashtask.tasks.task import Task
from flashtask.trainer.run import EvaluationRun

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy
    from flashtask.tasks.export.outputs import Outputs

__all__ = ["ObjectDetector", "whole_target"]

#: The threshold of a class while no validation has found a better one.
_THRESHOLD = 0.3


class ObjectDetector(Task):
    """A backbone with a dense head for boxes, judged by COCO's mean average precision.

    The head has no anchors (FCOS); places are assigned to boxes by ATSS; the loss has two parts, `cls` (quality focal
    loss) and `box` (generalized IoU). The threshold of each class is the one with the best F1 on the validation data.
    It is stored, and `predict` gives the boxes whose score reaches it, as `Boxes`.

    Args:
        backbone: a registered name of a model that has maps at several scales, or a module.
        num_classes: learned from the data if not given; the background is not a class.
        head: `detection`, another registered name, or a module that has `strides` and the outputs of `DetectionHead`.
        resize: `pad` keeps the shape of a picture and fills the rest; also `squash` or `crop`, as in `Task`.
        score_threshold: from which score on `predict` gives a box of any class, from 0 to 1; None means the thresholds
            of the classes. `model.score_threshold = 0` gives every box that average precision is computed of.
        nms_threshold: a box that overlaps with a better one of its class by more (intersection over union) is left out.
        options: those of `Task`: `image_size`, `learning_rate`, `optimizer`, `pretrained`, `head_options` (`width`,
            `depth`, `least_stride`), ...

    Raises:
        UsageError: an invalid value, or a backbone without maps.
    """

    name = "object_detection"
    monitor, monitor_mode = "val_map", "max"
    data_class = ObjectDetectionData
    prediction_class: ClassVar[type[Prediction]] = Boxes
    heads_take = ("maps",)
    default_strategy = "no_freeze"
    pipeline_tag = "object-detection"
    _reader_class: ClassVar[type[BoxReader]] = BoxReader

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_classes: int | None = None,
        head: str | nn.Module = "detection",
        *,
        resize: str | None = "pad",
        score_threshold: float | None = None,
        nms_threshold: float = 0.5,
        **options: Any,
    ) -> None:
        for argument, value in (("score_threshold", score_threshold), ("nms_threshold", nms_threshold)):
            is_missing = value is None and argument == "score_threshold"
            if not is_missing and (not is_number(value) or not 0 <= value <= 1):
                raise UsageError(f"{argument} must be from 0 to 1, not {value!r}")
        options.setdefault("learning_rate", 1e-3)
        super().__init__(backbone, head, num_classes, resize=resize, **options)
        self.save_hyperparameters()
        self.num_classes, self.score_threshold, self.nms_threshold = num_classes, score_threshold, nms_threshold
        #: From which score on an object of each class is predicted, in the order of the labels.
        self.thresholds: tuple[float, ...] | None = None
        self._reader: BoxReader | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes in the order of the outputs; None before the data is known."""
        return self._reader.labels if self._reader is not None else None

    @property
    def category_ids(self) -> tuple[int, ...]:
        """What the training annotations call the classes, in the order of the outputs; else 1, 2, ..."""
        if self._reader is not None:
            return self._reader.category_ids
        return tuple(range(1, (self.num_classes or 0) + 1))

    # ---- loss and metrics

    def loss(self, outputs: Any, targets: Any) -> Mapping[str, torch.Tensor]:
        """The parts `cls` and `box`.

        Args:
            outputs: maps of the head.
            targets: of each image `boxes` (n, 4) in pixels of the input, and `labels` (n,); -1 marks a region in which
                nothing is learned.
        """
        return detection_loss(outputs, targets, self._strides)

    @property
    def _strides(self) -> tuple[int, ...]:
        strides: Any = getattr(self.head, "strides", None)
        if not strides:
            raise UsageError(
                f"the head {type(self.head).__name__} has no `strides`",
                fix="give it the pixels of the image in a pixel of each of its maps: self.strides = (8, 16, 32)",
            )
        return tuple(strides)

    def postprocess(self, outputs: Any) -> list[torch.Tensor]:
        """Of each image (n, 6), the best first: left, top, right, bottom in pixels of the input, score, class."""
        return boxes_of_outputs(outputs, self._strides, self.nms_threshold)

    def metric_inputs(self, step: StepOutput) -> tuple[Any, Any]:
        """What was found and what is true, in pixels of the files; of batches that do not know them, of the input."""
        found = self.postprocess(step.outputs)
        true = [target.get("in_file") or whole_target(target) for target in step.targets]
        fitting = Fitting(self.preprocessing)
        for row, one in enumerate(true):
            if "size" in one:
                width, height = one["size"].tolist()
                found[row] = boxes_in_file(found[row], fitting.geometry((width, height)))
        return found, true

    @property
    def scoring(self) -> Scoring:
        """The mean F1 of the classes at their thresholds."""
        return Scoring("1 - F1 of the image", "f1", mean_f1, nothing="nothing", unit="objects", title="F1")

    def judge(self, step: StepOutput, inputs: tuple[Any, Any]) -> list[Judgement]:
        """By the objects that were found at the thresholds, and what went wrong with the others."""
        from flashtask.tasks.judging import judged_boxes

        labels = self.output_names(self.num_classes or 0)
        found, true, overlaps = self._to_judge(*inputs)
        return judged_boxes(found, true, labels, self._thresholds_of(len(labels)), overlaps)

    def _to_judge(self, found: Any, true: Any) -> tuple[Any, Any, list[torch.Tensor] | None]:
        """Boxes (n, 6) and targets of each image, and how found and true objects overlap if not by their boxes."""
        return found, true, None

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """COCO's twelve numbers, and F1, precision and recall of the boxes that `predict` gives."""
        from flashtask.tasks.detection_metrics import detection_metrics

        return detection_metrics(num_outputs)

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Average precision and F1 of each class."""
        from flashtask.tasks.detection_metrics import ClassScores

        thresholds = self._thresholds_of(num_outputs)
        numbers = {"average_precision": "average_precision", "f1": "f1_by_class"}
        return {name: ClassScores(num_outputs, thresholds, number) for name, number in numbers.items()}

    def output_names(self, num_outputs: int) -> Sequence[str]:
        """The labels."""
        return self.labels or super().output_names(num_outputs)

    def _thresholds_of(self, num_classes: int) -> tuple[float, ...]:
        return self.thresholds or (_THRESHOLD,) * num_classes

    def _give_thresholds(self) -> None:
        """A fit chooses thresholds in each validation; every other stage measures with those that are stored."""
        for part, metrics in self.metrics.items():
            if part in ("val", "test") and self.num_classes:
                is_chosen = part == "val" and self._begins_a_fit()
                metrics["map"].thresholds = None if is_chosen else self._thresholds_of(self.num_classes)  # type: ignore[index]

    def on_validation_end(self) -> None:
        """In a fit, take the thresholds that were best on the validation data."""
        run = self.trainer.active_run
        if isinstance(run, EvaluationRun) and run.parent is not None and not run.is_sanity_check:
            self.thresholds = self.metrics["val"]["map"].chosen  # type: ignore[index]
            self.metrics["test"]["map"].thresholds = self.thresholds  # type: ignore[index]

    # ---- data

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the classes: the data's in a first fit, else the model's."""
        super().connect(datamodule)
        self._add_metrics()
        self._give_thresholds()

    def agree_on_targets(self, datamodule: Any) -> None:
        """Take the classes of the data: in a first fit all, in another fit on other classes those that are new.

        Raises:
            UsageError: the data has another number of classes, or no classes are known.
            BadDataError: the data has a class that the model does not know.
        """
        change = self._take_classes_of(datamodule)
        super().agree_on_targets(datamodule)
        self._read_classes()
        found = len(self._reader.labels) if self._reader is not None else self.num_classes
        if self.num_classes not in (None, found):
            raise UsageError(
                f"num_classes={self.num_classes}, but the data has {found} classes: {in_a_line(self.labels or ())}",
                why="the background is not counted",
                fix="leave out num_classes: it is taken from the data",
            )
        self.num_classes = found
        if self.head is None and found:
            self.make_head(found)
            self.to(self.device)
        self.hparams.update(num_classes=found)
        if not self._begins_a_fit():
            return
        if not found:
            raise UsageError(
                "the number of classes is not known: neither the model nor the data defines it",
                fix=f"{type(self).__name__}(num_classes=2), without the background",
            )
        if self.trainer.enable_model_summary and self._reader is not None:
            if change is not None:
                self.trainer.say(str(change))
            self.trainer.say(f"{self._reader.describe()}: {in_a_line(self._reader.labels)}")

    def _take_classes_of(self, datamodule: Any) -> LabelChange | None:
        """In a new fit on other classes, change to those of the data; None if they are the same, or not to be taken."""
        fit = None if self.trainer is None else self.trainer.fit_run
        described = getattr(datamodule, "targets", None)
        if not self._begins_a_fit() or fit is None or fit.resume_from is not None or self._reader is None:
            return None
        if not isinstance(described, Mapping) or described.get("kind") != self._reader.kind:
            return None
        data = type(self._reader).from_dict(described)
        if set(data.labels) == set(self._reader.labels):
            return None
        change = self._change_labels(data.labels)
        self._target_description = None  # that of the data, once they agree
        return change

    def change_labels(self, labels: Sequence[str]) -> LabelChange:
        """Give the detector other classes: the head keeps what it knows of those that remain, by name.

        A fit on data with other classes does this by itself. New classes get the ids 1, 2, ... until then.

        Args:
            labels: all classes, in the order of the outputs.

        Returns:
            What was kept, what is new, and what was dropped; as text it is one line.

        Raises:
            UsageError: a label appears twice, or the head is a module of the user's.
        """
        if isinstance(labels, str) or not labels or not all(isinstance(name, str) for name in labels):
            raise UsageError(f"labels must be a list of names, not {labels!r}", fix='["cat", "dog"]')
        if len(set(labels)) != len(labels):
            raise UsageError("a label appears twice", fix="labels must all be different")
        change = self._change_labels(tuple(labels))
        ids = dict(zip(self._reader.labels, self._reader.category_ids, strict=True)) if self._reader else {}
        free = iter(set(range(1, len(labels) + len(ids) + 1)) - set(ids.values()))
        numbers = tuple(ids[name] if name in ids else next(free) for name in labels)
        self._reader = replace(self._reader or self._reader_class(), labels=tuple(labels), category_ids=numbers)
        self._target_description = self._reader.to_dict()
        return change

    def change_classes(self, labels: Sequence[str] | None = None, num_classes: int | None = None) -> LabelChange:
        """As `change_labels`.

        Raises:
            UsageError: there are no labels, or `num_classes` contradicts them.
        """
        if labels is None:
            raise UsageError("the classes need names", fix='labels=["cat", "dog"], or data with other classes')
        if num_classes not in (None, len(labels)):
            raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
        return self.change_labels(labels)

    def _change_labels(self, labels: tuple[str, ...]) -> LabelChange:
        before, old = self.labels or (), self.head
        if isinstance(self._head.kind, nn.Module) and old is not None:
            raise UsageError(
                "the head is your own module, which cannot be changed to other classes",
                why="only a head that was built by name can be built again",
                fix='HEADS.register("mine", MyHead) and head="mine"',
            )
        rows = self._head.rows_of_classes() if old is not None else None
        self.make_head(len(labels))
        if old is not None and rows is not None and self.head is not None:
            keep_rows(self.head, old.state_dict(), rows, before, labels)
            self.head.train(old.training)
        self.to(self.device)
        self.num_classes, self.thresholds = len(labels), None
        self.hparams.update(num_classes=len(labels))
        remark = (
            "" if rows is not None or old is None else "the head is initialised again: it has no rows for each class"
        )
        return LabelChange.between(before, labels, len(before), remark)

    def _read_classes(self) -> None:
        described = self.target_description
        self._reader = self._reader_class.from_dict(described) if described is not None else None

    # ---- prediction

    def to_predictions(self, outputs: Sequence[torch.Tensor], samples: Sequence[Input]) -> Sequence[Boxes]:
        """`Boxes` an image, those that reach the threshold of their class, in pixels of its file."""
        found = []
        for rows, sample in zip(outputs, samples, strict=True):
            rows = boxes_in_file(rows[self._is_predicted(rows)].cpu(), sample.placed(self.preprocessing))
            found.append(Boxes(sample.path, **self._columns_of(rows)))
        return found

    def export_outputs(self) -> Outputs:
        """`boxes` (N, 100, 4) in pixels of the picture, `scores` and `labels` (N, 100)."""
        from flashtask.tasks.export.outputs import BoxOutputs

        count = len(self.output_names(self.num_classes or 0))
        thresholds = self._thresholds_of(count) if self.score_threshold is None else (self.score_threshold,) * count
        return BoxOutputs(thresholds, self._strides, self.nms_threshold)

    def _is_predicted(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether each box (n, 6) reaches the threshold of its class."""
        least = self._thresholds_of(self.num_classes or 0)
        if self.score_threshold is not None:
            least = (self.score_threshold,) * len(least)
        return rows[:, 4].double() >= torch.tensor(least, dtype=torch.float64, device=rows.device)[rows[:, 5].long()]

    def _columns_of(self, rows: torch.Tensor) -> dict[str, Any]:
        """What `Boxes` has of rows (n, 6) in pixels of the file."""
        *corners, scores, numbers = (tuple(column) for column in rows.T.tolist())
        labels, classes = self.output_names(self.num_classes or 0), [int(number) for number in numbers]
        names, ids = (tuple(known[n] for n in classes) for known in (labels, self.category_ids))
        return {"labels": names, "scores": scores, "boxes": tuple(zip(*corners, strict=True)), "category_ids": ids}

    def to_coco(
        self, predictions: Sequence[Boxes], image_ids: Mapping[str, int] | Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO's list of results, as `json.dump` writes it: `image_id`, `file_name`, `category_id`, `bbox`, `score`.

        Args:
            predictions: of `predict`, for several images.
            image_ids: of each image, or by the paths of the images; None numbers them from 0.
        """
        found: list[dict[str, Any]] = []
        for place, one in enumerate(predictions):
            number = place if image_ids is None else image_ids[one.path if isinstance(image_ids, Mapping) else place]  # type: ignore[index]
            found += one.to_coco(number)
        return found

    # ---- what files hold

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the classes and thresholds that the weights were trained with."""
        super().on_load_checkpoint(checkpoint)
        self._read_classes()
        self.thresholds = _stored_thresholds(checkpoint.get("thresholds"), self.labels)
        self._give_thresholds()

    def describe(self) -> dict[str, Any]:
        """The thresholds too."""
        found = super().describe()
        return found if self.thresholds is None else {**found, "thresholds": list(self.thresholds)}

    def recipe(self) -> dict[str, Any]:
        """Without the number of classes, which a recipe learns from its data."""
        recipe = super().recipe()
        recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "num_classes"}
        return recipe


def whole_target(target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What metrics compare with where a batch of the user's own loader has only `boxes` and `labels`."""
    boxes, labels = target["boxes"], target["labels"]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return {"boxes": boxes, "labels": labels.clamp(min=0), "is_crowd": labels < 0, "areas": areas}


def _stored_thresholds(stored: Any, labels: Sequence[str] | None) -> tuple[float, ...] | None:
    """The thresholds in a file, which need not be one of ours.

    Raises:
        IntegrityError: they are not a share for each label.
    """
    if stored is None:
        return None
    if not isinstance(stored, list) or not all(is_number(value) and 0 <= value <= 1 for value in stored):
        raise IntegrityError("its thresholds are not numbers from 0 to 1")
    if labels is not None and len(labels) != len(stored):
        raise IntegrityError(f"it has {len(stored)} thresholds for {len(labels)} labels")
    return tuple(float(value) for value in stored)
