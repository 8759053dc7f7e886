"""`SemanticSegmentation`: a class for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashtask.backbones.default import AUTO
from flashtask.core.accuracy import Accuracy
from flashtask.core.errors import UsageError
from flashtask.core.named_choice import Choice
from flashtask.data.decoding import Fitting
from flashtask.data.inputs import Input
from flashtask.data.masks import default_colours
from flashtask.data.semantic_segmentation import MaskReader, SemanticSegmentationData
from flashtask.reports.judgement import Judgement, Scoring
from flashtask.reports.statistics import mean_iou
from flashtask.tasks.batches import StepOutput
from flashtask.tasks.losses import check_weights, chosen_loss, class_weights
from flashtask.tasks.mask_losses import MASK_LOSSES
from flashtask.tasks.masks import Mask, classes_of_tiles
from flashtask.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.tasks.export.outputs import Outputs
    from flashtask.tasks.metrics import NamedMetrics

__all__ = ["SemanticSegmentation"]

#: Tiles of an image that go through the network at once, unless it trains.
_MOST_TILES = 8


class SemanticSegmentation(Task):
    """A backbone's maps with a decoder, trained by cross-entropy and Dice and judged by the mean IoU.

    Images of any size are resized to the model's input without a change of their shape, and padded. Masks, metrics and
    predictions are in the pixels of the file: the probabilities are brought back to its size before a class is chosen,
    in validation as in prediction. The loss is taken in the pixels of the input. `resize="tile"` cuts images into tiles
    of `image_size`, in their own pixels; where tiles overlap, their probabilities are blended.

    Args:
        backbone: a registered name of a model that gives maps, or a module.
        num_classes: learned from the data if not given.
        labels: names of the classes, in the order of the outputs; learned from the data if not given.
        head: `fpn`, `unet`, a decoder of segmentation_models_pytorch such as `smp/unetplusplus`, another registered
            name, or a module from maps to (B, classes, H, W).
        loss_fn: `cross_entropy_dice`, `cross_entropy`, `dice`, `focal` (gamma 2) or `lovasz`, also with arguments:
            `("focal", {"gamma": 3})`; or a callable of logits (B, classes, H, W) and class numbers (B, H, W), in which
            255 does not count.
        class_weights: in the training loss, of each class: `balanced` or `effective_number`, both from the pixels of
            the training data; by label; or in the order of the classes.
        metrics: further ones than `miou`, `dice`, `pixel_accuracy` and `boundary_f`, by name: `mcc`, `f1_per_class`.
        options: those of `Task`: `image_size`, `resize` (`pad` by default), `tile_overlap`, `learning_rate`, ...

    Raises:
        UsageError: `labels` and `num_classes` contradict each other, or an argument is invalid.
        UnknownNameError: a loss or a metric that does not exist.
    """

    name = "semantic_segmentation"
    monitor, monitor_mode = "val_miou", "max"
    data_class = SemanticSegmentationData
    prediction_class = Mask
    heads_take = ("maps",)
    pipeline_tag = "image-segmentation"
    default_resize = "pad"
    takes_tiles = True

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_classes: int | None = None,
        labels: Sequence[str] | None = None,
        head: str | nn.Module = "fpn",
        *,
        loss_fn: Choice | Callable[..., Tensor] = "cross_entropy_dice",
        class_weights: Choice | Mapping[str, float] | Sequence[float] | None = None,
        metrics: Any = None,
        **options: Any,
    ) -> None:
        named: Any = chosen_loss(loss_fn, MASK_LOSSES)
        check_weights(class_weights)
        if class_weights is not None and named is None:
            raise UsageError("class_weights applies only to losses given by name", fix="implement it in loss_fn")
        if labels is not None and len(set(labels)) != len(labels):
            raise UsageError("a label appears twice", fix="labels must all be different")
        if labels is not None and num_classes not in (None, len(labels)):
            raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
        num_classes = len(labels) if labels is not None else num_classes
        super().__init__(backbone, head, num_classes, **options)
        self.save_hyperparameters()
        self.labels: tuple[str, ...] | None = tuple(labels) if labels is not None else None
        self.num_classes = num_classes
        self._class_weights, self._more_metrics = class_weights, metrics
        self._loss_fn, self._named_loss = loss_fn, named
        self._weight: Tensor | None = None
        self._reader: MaskReader | None = None

    # ---- steps

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, h, w) of images; of the tiles of a large image a few at a time."""
        is_whole = self.training or self.preprocessing.crop_mode != "tile" or torch.compiler.is_compiling()
        parts = (images,) if is_whole else torch.split(images, _MOST_TILES)
        logits: list[Tensor] = [super(SemanticSegmentation, self).forward(part) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def to_targets(self, targets: Any) -> Any:
        """Masks (B, H, W) as int64; where data of this package gives them, in a dictionary with where they are from."""
        if isinstance(targets, Mapping):
            return {**targets, "mask": targets["mask"].long()}
        return targets.long()

    def loss(self, outputs: Tensor, targets: Any) -> Tensor | Mapping[str, Tensor]:
        """The chosen loss in the pixels of the masks; in train mode with class weights."""
        mask = targets["mask"] if isinstance(targets, Mapping) else targets
        outputs = _in_size(outputs, mask.shape[-2:])
        if self._named_loss is None:
            own: Tensor = self._loss_fn(outputs, mask)  # type: ignore[operator]  # a callable, if it has no name
            return own
        weight = None if self._weight is None or not self.training else self._weight.to(outputs.device)
        found: Tensor | Mapping[str, Tensor] = self._named_loss(outputs, mask, weight)
        return found

    def postprocess(self, outputs: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) in the pixels of the input."""
        return _in_size(outputs, self.preprocessing.input_size[1:]).softmax(dim=1)

    def metric_inputs(self, step: StepOutput) -> tuple[list[Tensor], list[Tensor]]:
        """Predicted and true classes, a map (H, W) for each image, in the pixels of its file where they are known."""
        targets = step.targets
        if not isinstance(targets, Mapping) or self._reader is None:
            mask = targets["mask"] if isinstance(targets, Mapping) else targets
            return list(_in_size(step.outputs, mask.shape[-2:]).argmax(dim=1)), list(mask)
        fitting = Fitting(self.preprocessing)
        chances, device = self.postprocess(step.outputs), step.outputs.device
        predicted, true, row = [], [], 0
        while row < len(chances):
            width, height = targets["whole"][row].tolist()
            places = fitting.tiles((width, height))
            predicted.append(classes_of_tiles(chances[row : row + len(places)], places))
            true.append(torch.from_numpy(self._reader.class_map(targets["source"][row])).to(device))
            row += len(places)
        return predicted, true

    @property
    def scoring(self) -> Scoring:
        """The mean intersection over union of all pixels."""
        return Scoring("1 - mean IoU of the image", "miou", mean_iou, unit="pixels", title="Mean IoU")

    def judge(self, step: StepOutput, inputs: tuple[Any, Any]) -> list[Judgement]:
        """By the classes of the pixels of its file."""
        from flashtask.tasks.judging import judged_masks

        found, targets = inputs
        return judged_masks(found, targets, self.output_names(self.num_classes or 0))

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """Mean IoU, Dice, accuracy of pixels, F1 of borders; and those that were asked for."""
        from flashtask.tasks.mask_metrics import mask_metrics

        return {**self._asked_metrics(num_outputs).whole, **mask_metrics(num_outputs)}

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """IoU, Dice, precision and recall of each class."""
        from flashtask.tasks.mask_metrics import mask_metrics_by_class

        return mask_metrics_by_class(num_outputs)

    def asked_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Metrics such as `f1_per_class`."""
        return self._asked_metrics(num_outputs).by_class

    def _asked_metrics(self, num_outputs: int) -> NamedMetrics:
        from flashtask.tasks.mask_metrics import named_mask_metrics

        return named_mask_metrics(self._more_metrics, num_outputs)

    def output_names(self, num_outputs: int) -> Sequence[str]:
        """The labels."""
        return self.labels or super().output_names(num_outputs)

    # ---- the data

    def agree_on_targets(self, datamodule: Any) -> None:
        """Take the classes of the data in a first fit; a trained model reads masks as those were read.

        Raises:
            UsageError: the data has other classes than the arguments say, or their number is not known.
            BadDataError: masks with values that the model does not know.
        """
        super().agree_on_targets(datamodule)
        self._read_classes()
        if self._reader is not None:
            self._take_classes(self._reader.labels)
        if self.head is None and self.num_classes is not None:
            self.make_head(self.num_classes)
            self.to(self.device)
        self.hparams.update(num_classes=self.num_classes, labels=self.labels)
        if not self._begins_a_fit():
            return
        if self.num_classes is None:
            raise UsageError(
                "the number of classes is not known: neither the model nor the data defines it",
                fix=f"{type(self).__name__}(num_classes=2)",
            )
        if self._class_weights is not None:
            counts = datamodule.pixel_counts() if hasattr(datamodule, "pixel_counts") else None
            self._weight = class_weights(self._class_weights, self.output_names(self.num_classes), counts)
        if self.trainer.enable_model_summary and self._reader is not None:
            self.trainer.say(self._reader.describe())

    def _take_classes(self, found: tuple[str, ...]) -> None:
        if self.num_classes not in (None, len(found)):
            raise UsageError(
                f"the model has {self.num_classes} classes, but the data has {len(found)}: {', '.join(found[:8])}",
                fix="leave out num_classes and labels: they are taken from the data",
            )
        if self.labels is not None and self.labels != found:
            raise UsageError(
                f"the model has the classes {', '.join(self.labels[:8])}, but the data has {', '.join(found[:8])}",
                fix="give labels to the data, or to none of the two",
            )
        self.labels, self.num_classes = found, len(found)

    def _read_classes(self) -> None:
        self._reader = None if self.target_description is None else MaskReader.from_dict(self.target_description)

    def to_predictions(self, outputs: Tensor, samples: Sequence[Input]) -> Sequence[Mask]:
        """A `Mask` an image, in the pixels of its file."""
        count = outputs.shape[1]
        labels = tuple(self.output_names(count))
        reader = self._reader
        colours = default_colours(count) if reader is None else reader.colours
        is_numbers = reader is not None and not reader.is_colour and max(reader.values) < 256
        values = reader.values if reader is not None and is_numbers else tuple(range(count))
        found, row, chances = [], 0, outputs.cpu()
        for sample in samples:
            places = sample.tiles(self.preprocessing)
            classes = classes_of_tiles(chances[row : row + len(places)], places).to(torch.uint8)
            row += len(places)
            found.append(Mask(sample.path, classes.numpy(), labels, colours, values))
        return found

    def export_outputs(self) -> Outputs:
        """`classes` (N, H, W), in pixels of the picture."""
        from flashtask.tasks.export.outputs import MaskOutputs

        return MaskOutputs()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the classes that the weights were trained with."""
        super().on_load_checkpoint(checkpoint)
        self._read_classes()
        if self._reader is not None:
            self.labels, self.num_classes = self._reader.labels, len(self._reader.labels)

    def recipe(self) -> dict[str, Any]:
        """Without the classes, which a recipe learns from its data."""
        recipe = super().recipe()
        learned = ("num_classes", "labels")
        recipe["model"] = {name: value for name, value in recipe["model"].items() if name not in learned}
        return recipe


def _in_size(outputs: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) as (B, C, H, W); a head gives whole steps of its stride, which may be a little more."""
    if tuple(outputs.shape[-2:]) == tuple(size):
        return outputs
    return functional.interpolate(outputs, tuple(size), mode="bilinear", align_corners=False)
