"""`ImageClassifier`: one label an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.tasks.prediction import Prediction
from flashtask.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["ImageClassifier"]


class ImageClassifier(Task):
    """A backbone with a head for classes, trained by cross-entropy and judged by accuracy.

    Args:
        backbone: a registered name, or a module.
        num_classes: learned from the data if not given.
        labels: names of the classes, in the order of the outputs; learned from the data if not given.
        head: `linear`, `mlp`, another registered name, or a module.
        options: those of `Task`: `learning_rate`, `optimizer`, `pretrained`, ...

    Raises:
        UsageError: `labels` and `num_classes` contradict each other, or a label stands twice.
    """

    name = "image_classification"
    monitor = "val_accuracy"
    monitor_mode = "max"

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        num_classes: int | None = None,
        labels: Sequence[str] | None = None,
        head: str | nn.Module = "linear",
        **options: Any,
    ) -> None:
        if labels is not None and len(set(labels)) != len(labels):
            raise UsageError("a label stands twice", fix="labels must all be different")
        if labels is not None and num_classes not in (None, len(labels)):
            raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
        num_classes = len(labels) if labels is not None else num_classes
        super().__init__(backbone, head, num_classes, **options)
        self.save_hyperparameters()
        self.labels: tuple[str, ...] | None = tuple(labels) if labels is not None else None
        self.num_classes = num_classes

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of logits (B, classes) and class indices (B,)."""
        return nn.functional.cross_entropy(outputs, targets)

    def make_metrics(self, num_outputs: int) -> dict[str, Metric]:
        """Accuracy: the share of images whose most probable class is the right one."""
        from torchmetrics.classification import MulticlassAccuracy  # two seconds that the import of this file saves

        return {"accuracy": MulticlassAccuracy(num_classes=max(2, num_outputs), average="micro")}

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the labels, by name: the data's if the model has none yet, else the model's."""
        super().connect(datamodule)
        found = tuple(getattr(datamodule, "labels", ()) or ())
        if self.labels is None and found:
            if self.num_classes not in (None, len(found)):
                raise UsageError(
                    f"num_classes={self.num_classes}, but the data has {len(found)} classes: {', '.join(found[:8])}",
                    fix="leave num_classes out: it is learned from the data",
                )
            self.labels = found
        elif found and found != self.labels:
            self._give_labels(datamodule, found)
        if self.labels is not None:
            self.num_classes = len(self.labels)
        if self.head is None and self.num_classes is not None:
            self.make_head(self.num_classes)
            self._add_metrics()
        self.hparams.update(num_classes=self.num_classes, labels=self.labels)

    def _give_labels(self, datamodule: Any, found: tuple[str, ...]) -> None:
        if not hasattr(datamodule, "set_labels"):
            raise UsageError(
                f"the labels of {type(datamodule).__name__} are not the model's, in the model's order",
                why=f"the data has {_shown(found)}; the model has {_shown(self.labels or ())}",
                fix="give the data the model's order, or a method set_labels(labels) that takes it",
            )
        datamodule.set_labels(self.labels)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Probabilities (B, classes), float32."""
        return super().predict_step(batch, batch_idx, dataloader_idx).softmax(dim=1)

    def to_predictions(self, outputs: torch.Tensor, paths: Sequence[str | None]) -> list[Prediction]:
        """A prediction an image, its labels with the most probable first."""
        labels = self.labels or tuple(str(index) for index in range(outputs.shape[1]))
        scores, order = outputs.cpu().sort(dim=1, descending=True, stable=True)
        return [
            Prediction(path, tuple(labels[i] for i in row), tuple(values))
            for path, row, values in zip(paths, order.tolist(), scores.tolist(), strict=True)
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the labels that the weights were trained with, if the model has none yet.

        Raises:
            UsageError: the model's labels are other ones, or stand in another order.
        """
        super().on_load_checkpoint(checkpoint)
        stored = tuple(checkpoint.get("labels") or ())
        if not stored:
            return
        if self.labels is None and self.num_classes in (None, len(stored)):
            self.labels, self.num_classes = stored, len(stored)
            self.hparams.update(num_classes=self.num_classes, labels=self.labels)
            if self.head is None:
                self.make_head(len(stored))
        elif self.labels is not None and stored != self.labels:
            raise UsageError(
                "the labels of the checkpoint are not the model's, in the model's order",
                why=f"the checkpoint has {_shown(stored)}; the model has {_shown(self.labels)}",
                fix="load the whole model: flashtask.load(path)",
            )

    def describe(self) -> dict[str, Any]:
        """The labels too."""
        return {**super().describe(), "labels": None if self.labels is None else list(self.labels)}

    def recipe(self) -> dict[str, Any] | None:
        """Without the labels: a recipe learns them from its data."""
        recipe = super().recipe()
        if recipe is not None:
            recipe["model"] = {k: v for k, v in recipe["model"].items() if k not in ("labels", "num_classes")}
        return recipe


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
