"""`ImageClassifier`: one label an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from flashtask.core.accuracy import Accuracy
from flashtask.core.checks import is_number
from flashtask.core.errors import UsageError
from flashtask.tasks.batches import classes_stated, in_a_line
from flashtask.tasks.prediction import Prediction
from flashtask.tasks.relabelling import LabelChange, keep_rows
from flashtask.tasks.task import Task
from flashtask.trainer.datamodule import GivenLoaders

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
        label_smoothing: how much of each target is spread evenly over all classes in training, from 0 to below 1.
            Validation and test measure the plain cross-entropy.
        options: those of `Task`: `learning_rate`, `optimizer`, `pretrained`, ...

    Raises:
        UsageError: `labels` and `num_classes` contradict each other, a label stands twice, or `label_smoothing` is out
            of its range.
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
        *,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        if not is_number(label_smoothing) or not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing must be from 0 to below 1, not {label_smoothing!r}")
        if labels is not None and len(set(labels)) != len(labels):
            raise UsageError("a label stands twice", fix="labels must all be different")
        if labels is not None and num_classes not in (None, len(labels)):
            raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
        num_classes = len(labels) if labels is not None else num_classes
        super().__init__(backbone, head, num_classes, **options)
        self.save_hyperparameters()
        self.labels: tuple[str, ...] | None = tuple(labels) if labels is not None else None
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        #: The user's own words, which data that has other classes contradicts; a loaded model's are not.
        self._classes_are_given = num_classes is not None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of logits (B, classes) and class indices (B,), smoothed in train mode."""
        smoothing = self.label_smoothing if self.training else 0.0
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """Accuracy: the share of images whose most probable class is the right one."""
        return {"accuracy": Accuracy(num_outputs)}

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the labels, by name: the data's if the model has none yet, else the model's."""
        super().connect(datamodule)
        found = tuple(getattr(datamodule, "labels", ()) or ())
        change = None
        if not found and self.labels is None and isinstance(datamodule, GivenLoaders):
            stated = classes_stated(datamodule.given("train"))
            found = stated if self.num_classes in (None, len(stated)) else ()
        if self._takes_classes_of(datamodule, found):
            change = self._change_labels(found)
        elif self.labels is None and found:
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
        if self._begins_a_fit():
            self._say_classes(change)

    def _say_classes(self, change: LabelChange | None) -> None:
        """Tell the classes of a fit, and what became of a trained model's.

        Raises:
            UsageError: nobody has said how many there are.
        """
        if self.head is None and self._head.kind is not None:
            raise UsageError(
                "the number of classes is not known",
                why="neither the model nor the data says it: there are no labels, and no `classes` of a dataset",
                fix=f"{type(self).__name__}(num_classes=2), or labels=[...] with the names in the order of the targets",
            )
        if self.trainer.enable_model_summary:
            if change is not None:
                self.trainer.say(str(change))
            if self.labels is not None:
                self.trainer.say(f"{len(self.labels)} classes: {in_a_line(self.labels)}")

    def _takes_classes_of(self, datamodule: Any, found: tuple[str, ...]) -> bool:
        """Whether a new fit goes on with the data's classes: they are others, and the user has not named the model's.

        The same classes in another order stay in the model's order where the data can take it.
        """
        fit = None if self.trainer is None else self.trainer.fit_run
        begins = fit is not None and self.trainer.active_run is fit and fit.resume_from is None
        if not (begins and found) or self._classes_are_given or self.head is None:
            return False
        if self.labels is None:
            return len(found) != self.num_classes
        is_other = set(found) != set(self.labels)
        return is_other or (found != self.labels and not hasattr(datamodule, "set_labels"))

    def change_labels(self, labels: Sequence[str]) -> LabelChange:
        """Give the model other classes: the head keeps what it knows of those that remain, by name.

        Rows of new classes are drawn from the seed. A fit on data with other classes does this by itself, unless the
        labels were given to the constructor or here.

        Args:
            labels: all classes, in the order of the outputs.

        Returns:
            What was kept, what is new, and what was dropped; as text it is one line.

        Raises:
            UsageError: a label stands twice, or the head is a module of the user's, of which only one size is known.
        """
        change = self._change_labels(_checked(labels))
        self._classes_are_given = True
        return change

    def change_classes(self, labels: Sequence[str] | None = None, num_classes: int | None = None) -> LabelChange:
        """As `change_labels`; a number of classes without names means a head that is drawn anew.

        Raises:
            UsageError: `labels` and `num_classes` contradict each other, or neither is given.
        """
        if labels is not None:
            if num_classes not in (None, len(labels)):
                raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
            return self.change_labels(labels)
        if num_classes is None:
            raise UsageError("no classes are given", fix='model.change_labels(["cat", "dog"])')
        self._require_head_by_name(num_classes)
        before, had = self.labels or (), self.num_classes or 0
        self.labels, self._classes_are_given = None, True
        self._take_head(num_classes)
        return LabelChange((), (), before, had, "the head is drawn anew")

    def _change_labels(self, labels: tuple[str, ...]) -> LabelChange:
        before, had, old = self.labels or (), self.num_classes or 0, self.head
        if labels == before:
            return LabelChange.between(before, labels, had)
        self._require_head_by_name(len(labels))
        self.labels = labels
        if old is None:
            self._take_head(len(labels))
            return LabelChange.between(before, labels, had)
        rows, known = self._head.rows_of_classes(), old.state_dict()
        self._take_head(len(labels))
        assert self.head is not None
        remark = ""
        if rows is not None and before:
            keep_rows(self.head, known, rows, before, labels)
        else:
            why = "the old classes had no names" if rows else "it has no rows by class"
            remark = f"the head is drawn anew: {why}"
        if getattr(self.head, "requires_solving", False):
            remark = "the head is to be solved anew"
        return LabelChange.between(before, labels, had, remark)

    def _require_head_by_name(self, num_classes: int) -> None:
        if isinstance(self._head.kind, nn.Module) and self.head is not None:
            raise UsageError(
                f"the head is a module of your own for {self.num_classes} classes, and cannot be changed to others",
                why="only a head that is built by its name can be built anew",
                fix=f'HEADS.register("mine", MyHead), head="mine"; or a new model for {num_classes} classes',
            )

    def _take_head(self, num_classes: int) -> None:
        """A new head for so many classes, where the old one was and in its mode."""
        old = self.head
        self.make_head(num_classes)
        assert self.head is not None
        if old is not None:
            self.head.train(old.training)
        self.to(self.device)
        self.num_classes = num_classes
        self.hparams.update(num_classes=num_classes, labels=self.labels)

    @classmethod
    def rebuild(cls, arguments: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> Self:
        """The labels of a checkpoint are what the model knows, not what the user demands of the data."""
        model = super().rebuild(arguments, weights)
        model._classes_are_given = False
        return model

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

    def recipe(self) -> dict[str, Any]:
        """Without the labels where a recipe learns them from its data: unless they were given, or stand otherwise."""
        recipe = super().recipe()
        recipe["model"] = {k: v for k, v in recipe["model"].items() if k not in ("labels", "num_classes")}
        labels = list(self.labels or ())
        if labels and (self._classes_are_given or (self.pretrained_from is None and labels != sorted(labels))):
            recipe["model"] |= {"num_classes": len(labels), "labels": labels}
        return recipe


def _checked(labels: Sequence[str]) -> tuple[str, ...]:
    """Names that are all different.

    Raises:
        UsageError: they are not.
    """
    if isinstance(labels, str) or not labels or not all(isinstance(name, str) for name in labels):
        raise UsageError(f"labels must be a list of names, not {labels!r}", fix='labels=["cat", "dog"]')
    if len(set(labels)) != len(labels):
        raise UsageError("a label stands twice", fix="labels must all be different")
    return tuple(labels)


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
