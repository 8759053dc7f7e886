"""`KeypointDetector`: any number of objects an image, each with a label, a box and keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_number, is_whole
from flashtask.data.boxes import BoxReader
from flashtask.data.decoding import Fitting
from flashtask.data.geometry import Geometry
from flashtask.data.inputs import Input
from flashtask.data.keypoint_data import KeypointDetectionData
from flashtask.data.keypoint_reader import KeypointReader
from flashtask.tasks.batches import StepOutput
from flashtask.tasks.box_loss import boxes_in_file
from flashtask.tasks.keypoint_loss import keypoint_loss, keypoints_of_outputs, sigmas_of, triples_of
from flashtask.tasks.keypoint_predictions import Keypoints
from flashtask.tasks.object_detection import ObjectDetector, whole_target
from flashtask.tasks.predictions import Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy

__all__ = ["KeypointDetector"]


class KeypointDetector(ObjectDetector):
    """A backbone with a dense head for boxes and keypoints, judged by COCO's mean average precision of keypoints.

    The head is that of `ObjectDetector` with a branch for keypoints: each place gives them as offsets from itself
    (YOLO-Pose), and the probability of each that it is there. The loss has two further parts, `point` (1 - OKS, and a
    smooth L1 distance) and `visible`. The threshold of each class is the one with the best F1 at an OKS of 0.5.
    `predict` gives `Keypoints`.

    Args:
        backbone: a registered name of a model that has maps at several scales, or a module.
        num_classes: learned from the data if not given; the background is not a class.
        head: `keypoints`, another registered name, or a module that has `strides` and the outputs of `KeypointHead`.
        num_keypoints: of each object; learned from the data if not given.
        sigmas: of each keypoint, how exactly it can be placed, as a share of the object's size: a keypoint that is off
            by 2 * sigma * sqrt(area) has a similarity of 0.61. Those of COCO for its keypoints of a person, else 0.05.
        options: those of `ObjectDetector`, such as `resize`, `score_threshold` and `nms_threshold`, and of `Task`.

    Raises:
        UsageError: an invalid value, or a backbone without maps.
    """

    name = "keypoint_detection"
    data_class = KeypointDetectionData
    prediction_class: ClassVar[type[Prediction]] = Keypoints
    pipeline_tag = "keypoint-detection"
    _reader_class: ClassVar[type[BoxReader]] = KeypointReader
    _reader: KeypointReader | None

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_classes: int | None = None,
        head: str | nn.Module = "keypoints",
        *,
        num_keypoints: int | None = None,
        sigmas: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        if num_keypoints is not None and not is_whole(num_keypoints):
            raise UsageError(f"num_keypoints must be a whole number of at least 1, not {num_keypoints!r}")
        if sigmas is not None and not all(is_number(sigma) and sigma > 0 for sigma in sigmas):
            raise UsageError(f"sigmas must be numbers above 0, not {sigmas!r}", fix="sigmas=[0.05, 0.05, 0.1]")
        self.num_keypoints, self._sigmas = num_keypoints, None if sigmas is None else tuple(sigmas)
        super().__init__(backbone, num_classes, head, **options)
        self.save_hyperparameters()

    def make_head(self, num_outputs: int) -> None:
        """Build the head once the number of keypoints is known too."""
        if self.num_keypoints is None:
            return
        if isinstance(self._head.kind, str):
            self._head.options["num_keypoints"] = self.num_keypoints
        super().make_head(num_outputs)

    @property
    def keypoints(self) -> tuple[str, ...]:
        """Names of the keypoints; numbers before the data is known."""
        return tuple(map(str, range(self.num_keypoints or 0))) if self._reader is None else self._reader.keypoints

    @property
    def sigmas(self) -> tuple[float, ...]:
        """How exactly each keypoint can be placed."""
        return self._sigmas or sigmas_of(self.keypoints)

    # ---- loss and metrics

    def loss(self, outputs: Any, targets: Any) -> Mapping[str, torch.Tensor]:
        """The parts `cls`, `box`, `point` and `visible`.

        Args:
            outputs: of the head.
            targets: of each image `boxes` (n, 4) in pixels of the input, `labels` (n,), -1 for a region in which
                nothing is learned, and `keypoints` (n, K, 3).
        """
        return keypoint_loss(outputs, targets, self._strides, self.sigmas)

    def postprocess(self, outputs: Any) -> list[torch.Tensor]:
        """Of each image (n, 6 + 3 * K), the best first: box, score, class; x, y, probability of each keypoint."""
        return keypoints_of_outputs(outputs, self._strides, self.nms_threshold)

    def metric_inputs(self, step: StepOutput) -> tuple[Any, Any]:
        """What was found and what is true, in pixels of the files; of batches that do not know them, of the input."""
        found = self.postprocess(step.outputs)
        true = [target.get("in_file") or _whole(target) for target in step.targets]
        fitting = Fitting(self.preprocessing)
        for row, one in enumerate(true):
            if "size" in one:
                width, height = one["size"].tolist()
                found[row] = _in_file(found[row], fitting.geometry((width, height)))
        return found, true

    def _to_judge(self, found: Any, true: Any) -> tuple[Any, Any, list[torch.Tensor] | None]:
        from flashtask.tasks.keypoint_metrics import keypoint_overlaps

        both = [keypoint_overlaps(rows, one, self.sigmas) for rows, one in zip(found, true, strict=True)]
        targets = [{**one, "is_crowd": ignored} for one, (_, ignored) in zip(true, both, strict=True)]
        return [rows[:, :6] for rows in found], targets, [overlaps for overlaps, _ in both]

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """COCO's ten numbers of keypoints, three of boxes, PCK, and F1, precision, recall of what `predict` gives."""
        from flashtask.tasks.keypoint_metrics import keypoint_metrics

        return keypoint_metrics(num_outputs, self.sigmas)

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Average precision and F1 of each class, by keypoints."""
        from flashtask.tasks.keypoint_metrics import KeypointClassScores

        thresholds = self._thresholds_of(num_outputs)
        numbers = {"average_precision": "average_precision", "f1": "f1_by_class"}
        return {
            name: KeypointClassScores(num_outputs, self.sigmas, thresholds, number) for name, number in numbers.items()
        }

    # ---- data

    def _read_classes(self) -> None:
        """Take the keypoints with the classes.

        Raises:
            UsageError: there are as many keypoints as neither `num_keypoints` nor `sigmas` says.
        """
        super()._read_classes()
        if self._reader is None:
            return
        count = len(self._reader.keypoints)
        for argument, number in (
            ("num_keypoints", self.num_keypoints),
            ("sigmas", None if self._sigmas is None else len(self._sigmas)),
        ):
            if number not in (None, count):
                raise UsageError(f"{argument} is for {number} keypoints, but the data has {count}", fix="leave it out")
        self.num_keypoints = count
        self.hparams.update(num_keypoints=count)

    # ---- prediction

    def to_predictions(self, outputs: Sequence[torch.Tensor], samples: Sequence[Input]) -> Sequence[Keypoints]:
        """`Keypoints` an image, those that reach the threshold of their class, in pixels of its file."""
        found = []
        skeleton = () if self._reader is None else self._reader.skeleton
        for rows, sample in zip(outputs, samples, strict=True):
            rows = _in_file(rows[self._is_predicted(rows)].cpu(), sample.placed(self.preprocessing))
            points = triples_of(rows[:, 6:]).tolist()
            keypoints = tuple(tuple((x, y, chance) for x, y, chance in own) for own in points)
            columns = self._columns_of(rows[:, :6])
            found.append(
                Keypoints(sample.path, **columns, keypoints=keypoints, names=self.keypoints, skeleton=skeleton)
            )
        return found

    def recipe(self) -> dict[str, Any]:
        """Without the numbers of classes and keypoints, which a recipe learns from its data."""
        recipe = super().recipe()
        recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "num_keypoints"}
        return recipe


def _in_file(found: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Rows (n, 6 + 3 * K) in pixels of the file; boxes are cut off at its edges, keypoints may lie beyond."""
    points = triples_of(found[:, 6:])
    moved = torch.cat([geometry.points_in_file(points[..., :2]), points[..., 2:]], dim=-1)
    return torch.cat([boxes_in_file(found[:, :6], geometry), moved.flatten(1)], dim=1)


def _whole(target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What metrics compare with where a batch of the user's own loader has `boxes`, `labels` and `keypoints`."""
    return {**whole_target(target), "keypoints": target["keypoints"]}
