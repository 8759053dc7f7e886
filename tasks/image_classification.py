"""`ImageClassifier`: one label an image, or any number of labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.core.accuracy import Accuracy
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.named_choice import Choice
from flashtask.core.number_checks import is_number
from flashtask.data.inputs import Input
from flashtask.reports.judgement import Judgement, Scoring
from flashtask.reports.statistics import mean_f1, share_right
from flashtask.tasks.batches import StepOutput, classes_stated, in_a_line
from flashtask.tasks.losses import LABEL_LOSSES, LABELS_LOSSES, check_weights, chosen_loss, class_weights
from flashtask.tasks.operating import OperatingPoints, operated, stored_operating
from flashtask.tasks.predictions import Label, Labels, Prediction
from flashtask.tasks.relabelling import LabelChange, keep_rows
from flashtask.tasks.task import Task
from flashtask.trainer.datamodule import GivenLoaders
from flashtask.trainer.run import EvaluationRun
from flashtask.trainer.run_record import data_counts

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.tasks.export.outputs import Outputs
    from flashtask.tasks.metrics import NamedMetrics
    from flashtask.trainer.trainer import Trainer

__all__ = ["ImageClassifier"]


class ImageClassifier(Task):
    """A backbone with a head for classes.

    With one label an image it is trained by cross-entropy and judged by accuracy, and `predict` gives a `Label`. With
    any number of labels (`multi_label=True`) it is trained by binary cross-entropy and judged by mean average precision
    and F1; the threshold of each label is the one with the best F1 on the validation data, and is stored. `predict`
    gives `Labels`.

    Args:
        backbone: a registered name, or a module.
        num_classes: learned from the data if not given.
        labels: names of the classes, in the order of the outputs; learned from the data if not given.
        head: `linear`, `mlp`, another registered name, or a module.
        multi_label: an image has any number of the labels.
        loss_fn: `cross_entropy`, `focal` (gamma 2) or `bce`; for several labels `bce`, `focal` or `asymmetric`
            (gamma_neg 4, gamma_pos 1, clip 0.05), also with arguments: `("focal", {"gamma": 3})`; or a callable that
            takes logits (B, classes) and targets, and gives a scalar. None means `cross_entropy`, or `bce`.
        class_weights: in the training loss, of each class: `balanced` or `effective_number` (beta 0.9999; Cui et al.,
            2019), both from the training data; by label; or in the order of the classes. With several labels, the
            weight of the images that have the label.
        label_smoothing: how much of each target is spread evenly over all classes in training, from 0 to below 1.
            Validation and test measure the loss without smoothing and weights.
        metrics: further ones: names of torchmetrics in lower case (`f1_score` or `f1`, `auroc`, `mcc`,
            `balanced_accuracy`, ...), averaged over classes as the end of the name says (`f1_macro`, `f1_micro`,
            `f1_weighted`; `f1_per_class` logs `val_f1_CLASS`), with arguments (`("fbeta", {"beta": 2.0})`), or objects
            of torchmetrics. They are logged as `val_f1`, ...
        options: those of `Task`: `learning_rate`, `optimizer`, `pretrained`, ...

    Raises:
        UsageError: `labels` and `num_classes` contradict each other, a label occurs twice, or an argument is invalid.
        UnknownNameError: a loss or a metric that does not exist.
    """

    name = "image_classification"
    monitor = "val_accuracy"
    monitor_mode = "max"
    prediction_class = Label
    heads_take = ("pooled", "tokens")
    pipeline_tag = "image-classification"

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_classes: int | None = None,
        labels: Sequence[str] | None = None,
        head: str | nn.Module = "linear",
        *,
        multi_label: bool = False,
        loss_fn: Choice | Callable[..., torch.Tensor] | None = None,
        class_weights: Choice | Mapping[str, float] | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        metrics: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(multi_label, bool):
            raise UsageError(f"multi_label must be True or False, not {multi_label!r}")
        known = LABELS_LOSSES if multi_label else LABEL_LOSSES
        loss_fn = next(iter(known)) if loss_fn is None else loss_fn
        named = chosen_loss(loss_fn, known)
        check_weights(class_weights)
        for option, is_given in (("class_weights", class_weights is not None), ("label_smoothing", label_smoothing)):
            if is_given and named is None:
                raise UsageError(
                    f"{option} applies only to losses given by name, but loss_fn is a callable",
                    fix=f"implement it in loss_fn, or leave out {option}",
                )
        if not is_number(label_smoothing) or not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing must be from 0 to below 1, not {label_smoothing!r}")
        if labels is not None and len(set(labels)) != len(labels):
            raise UsageError("a label appears twice", fix="labels must all be different")
        if labels is not None and num_classes not in (None, len(labels)):
            raise UsageError(f"num_classes={num_classes} contradicts {len(labels)} labels", fix="give only labels")
        num_classes = len(labels) if labels is not None else num_classes
        super().__init__(backbone, head, num_classes, **options)
        self.save_hyperparameters()
        self.labels: tuple[str, ...] | None = tuple(labels) if labels is not None else None
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.multi_label, self._class_weights = multi_label, class_weights
        self._loss_fn, self._named_loss = loss_fn, named
        self._more_metrics = metrics
        self._weight: torch.Tensor | None = None
        #: With several labels: from which probability on each label applies, in the order of the labels.
        self.thresholds: tuple[float, ...] | None = None
        #: The temperature of the scores, and when a prediction is accepted; `operate` finds them, training drops them.
        self.operating: OperatingPoints | None = None
        if multi_label:
            self._set_by_arguments = {"monitor": "val_map", "prediction_class": Labels, **self._set_by_arguments}
            vars(self).update(self._set_by_arguments)
        self._refuse_closed_form()
        #: The user's own words, which data that has other classes contradicts; a loaded model's are not.
        self._classes_are_given = num_classes is not None

    def _refuse_closed_form(self) -> None:
        builder = self._head.builder
        if not getattr(builder, "requires_solving", False):
            return
        chosen = {"multi_label": self.multi_label, "class_weights": self._class_weights is not None}
        for name, is_chosen in chosen.items():
            if is_chosen:
                fix = 'head_options={"balanced": True}' if name == "class_weights" else 'head="linear"'
                raise UsageError(
                    f"{name} needs a head that is trained by gradient descent, not {self._head.kind!r}", fix=fix
                )

    def unused_by_solving(self) -> list[str]:
        """As for every task; the loss has a default that depends on `multi_label`."""
        is_default = self._loss_fn == next(iter(LABELS_LOSSES if self.multi_label else LABEL_LOSSES))
        return [name for name in super().unused_by_solving() if not (name == "loss_fn" and is_default)]

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The chosen loss of logits (B, classes) and class indices (B,), or zeros and ones (B, classes).

        Of soft labels (B, classes) it is the sum over the classes of their share times the loss with this class.

        In train mode with smoothing and class weights.
        """
        if self._named_loss is None:
            own: torch.Tensor = self._loss_fn(outputs, targets)  # type: ignore[operator]  # a callable, if it has no name
            return own
        return self._loss_by_name(self._named_loss, outputs, targets)

    def weighted_loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The chosen loss with weights of samples (B,), which multiply those of classes."""
        if self._named_loss is None:
            return super().weighted_loss(outputs, targets, weights)
        return self._loss_by_name(self._named_loss, outputs, targets, weights)

    def _loss_by_name(
        self,
        named: Callable[..., torch.Tensor],
        outputs: torch.Tensor,
        targets: torch.Tensor,
        samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight = None if self._weight is None or not self.training else self._weight.to(outputs.device)
        smoothing = self.label_smoothing if self.training else 0.0
        if self.multi_label or targets.ndim == 1:
            return named(outputs, targets, weight, smoothing, samples)
        found = []
        for place, shares in enumerate(targets.unbind(1)):
            counts = shares if samples is None else shares * samples
            loss = named(outputs, torch.full_like(shares, place, dtype=torch.long), None, smoothing, counts)
            found.append(loss if weight is None else loss * weight[place])
        return torch.stack(found).sum()

    def postprocess(self, outputs: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, classes): they sum to 1, or with several labels each is from 0 to 1."""
        return self.scores(outputs, self.temperature)

    @property
    def temperature(self) -> float | None:
        """What outputs are divided by before they become probabilities; None for nothing. No loss depends on it."""
        return None if self.operating is None else self.operating.temperature

    def scores(self, outputs: torch.Tensor, temperature: float | None) -> torch.Tensor:
        """Probabilities (B, classes) of outputs of the head, with a temperature or without."""
        outputs = outputs if temperature is None else outputs / temperature
        return outputs.sigmoid() if self.multi_label else outputs.softmax(dim=1)

    def score_thresholds(self, temperature: float | None) -> tuple[float, ...]:
        """With several labels: the score that each must reach to apply, for scores with a temperature."""
        own = self.thresholds or (0.5,) * (self.num_classes or 0)
        return own if temperature is None else tuple(_tempered(bound, temperature) for bound in own)

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """Accuracy, or mean average precision and F1 of several labels; and those that were asked for."""
        own: dict[str, Metric | Accuracy] = {}
        if self.multi_label:
            from flashtask.tasks.metrics import LabelsF1, MeanAveragePrecision

            own = {"map": MeanAveragePrecision(num_outputs), "f1": LabelsF1(num_outputs)}
        else:
            own = {"accuracy": Accuracy(num_outputs)}
        return {**self._asked_metrics(num_outputs).whole, **own} if self._more_metrics else own

    def _asked_metrics(self, num_outputs: int) -> NamedMetrics:
        from flashtask.tasks.metrics import label_metrics, labels_metrics, named_metrics

        return named_metrics(self._more_metrics, labels_metrics if self.multi_label else label_metrics, num_outputs)

    def asked_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Metrics such as `f1_per_class`."""
        return self._asked_metrics(num_outputs).by_class if self._more_metrics else {}

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Precision, recall and F1 of each class; of several labels average precision and F1 at their thresholds."""
        from flashtask.tasks.metrics import label_metrics_by_class, labels_metrics_by_class

        return (labels_metrics_by_class if self.multi_label else label_metrics_by_class)(num_outputs)

    def output_names(self, num_outputs: int) -> Sequence[str]:
        """The labels."""
        return self.labels or super().output_names(num_outputs)

    def metric_inputs(self, step: StepOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, with class indices (of soft labels the largest) or with zeros and ones as whole numbers."""
        scores, targets = super().metric_inputs(step)
        if self.multi_label:
            return scores, targets.long()
        return scores, targets.argmax(dim=1) if targets.ndim == 2 else targets

    @property
    def scoring(self) -> Scoring:
        """Accuracy, or the mean F1 of several labels at their thresholds."""
        if self.multi_label:
            return Scoring("mean cross-entropy", "f1", mean_f1, nothing="no such label", unit="labels", title="F1")
        return Scoring("cross-entropy", "accuracy", share_right, classes_exclude=True, title="Accuracy")

    def judge(self, step: StepOutput, inputs: tuple[Any, Any]) -> list[Judgement]:
        """By the probability of the right class, or of every label."""
        from flashtask.tasks.judging import judged_labels, judged_multi_labels

        scores, targets = inputs
        labels = self.output_names(scores.shape[1])
        if self.multi_label:
            return judged_multi_labels(scores, targets, labels, self.score_thresholds(self.temperature))
        return judged_labels(scores, targets, labels)

    def agree_on_targets(self, datamodule: Any) -> None:
        """Labels are agreed upon by name in `connect`; here only that there are any, and whether an image has several.

        Raises:
            UsageError: the data and the model differ in that.
        """
        targets = getattr(datamodule, "targets", None)
        kind = targets.get("kind") if isinstance(targets, Mapping) else None
        if kind == "shares" and getattr(self._head.builder, "requires_solving", False):
            raise UsageError(f"the head {self._head.kind!r} takes one label per image, not shares", fix='head="linear"')
        if kind not in (None, "label", "labels", "shares"):
            raise UsageError(
                f"{type(datamodule).__name__} has targets of the kind {kind!r}, not labels",
                fix="use ImageClassificationData, or the task for this kind of data",
            )
        is_multi_label = getattr(datamodule, "is_multi_label", None)
        if is_multi_label is None or not datamodule.labels or is_multi_label == self.multi_label:
            return
        raise UsageError(
            f"the data has {'several labels' if is_multi_label else 'one label'} per image, but the model predicts "
            f"{'several' if self.multi_label else 'one'}",
            why=datamodule.describe_targets(),
            fix=f"{type(self).__name__}(multi_label={is_multi_label})",
        )

    def _settle_training(self, datamodule: Any) -> None:
        """At the start of a fit: how the targets are read, for the checkpoint, and the class weights."""
        described = getattr(datamodule, "targets", None)
        if isinstance(described, Mapping) and described.get("fields"):
            self._target_description = {name: value for name, value in described.items() if name != "labels"}
        if self._class_weights is None:
            return
        counts: Any = data_counts(datamodule).get("train")
        labels = self.labels or tuple(map(str, range(self.num_classes or 0)))
        num_samples = datamodule.sizes()["train"] if self.multi_label and counts else None
        self._weight = class_weights(self._class_weights, labels, counts, num_samples)

    def _give_thresholds(self) -> None:
        """A fit chooses thresholds in each validation; every other stage measures with those that are stored."""
        if self.multi_label:
            for part, metrics in self.metrics.items():
                if part.endswith("_asked_by_class"):
                    continue
                is_chosen = part == "val" and self._begins_a_fit()
                metrics["f1"].thresholds = None if is_chosen else self.score_thresholds(self.temperature)  # type: ignore[index]

    def on_validation_end(self) -> None:
        """In a fit, take the thresholds that were best on the validation data."""
        run = self.trainer.active_run
        if not self.multi_label or not isinstance(run, EvaluationRun):
            return
        if run.parent is not None and not run.is_sanity_check:
            self.thresholds = self.metrics["val"]["f1"].chosen  # type: ignore[index]
            self.metrics["test"]["f1"].thresholds = self.thresholds  # type: ignore[index]

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the labels, by name: the data's if the model has none yet, else the model's."""
        super().connect(datamodule)
        if self._begins_a_fit() and self.operating is not None:
            self._drop_operating_points()
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
                    fix="leave out num_classes: it is taken from the data",
                )
            self.labels = found
        elif found and found != self.labels:
            self._give_labels(datamodule, found)
        if self.labels is not None:
            self.num_classes = len(self.labels)
        if self.head is None and self.num_classes is not None:
            self.make_head(self.num_classes)
        self._add_metrics()
        self._check_monitor()
        self._give_thresholds()
        self.hparams.update(num_classes=self.num_classes, labels=self.labels)
        if self._begins_a_fit():
            self._settle_training(datamodule)
            self._say_classes(change, getattr(datamodule, "describe_targets", str)())

    def _say_classes(self, change: LabelChange | None, targets: str) -> None:
        """Print the classes of a fit, where they come from, and what became of a trained model's.

        Raises:
            UsageError: nobody has said how many there are.
        """
        if self.head is None and self._head.kind is not None:
            raise UsageError(
                "the number of classes is not known",
                why="neither the model nor the data defines it: there are no labels, and the dataset has no `classes`",
                fix=f"{type(self).__name__}(num_classes=2), or labels=[...] with the names in the order of the targets",
            )
        if self.trainer.enable_model_summary:
            if change is not None:
                self.trainer.say(str(change))
            if self.labels is not None:
                self.trainer.say(f"{targets or f'{len(self.labels)} classes'}: {in_a_line(self.labels)}")

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
            UsageError: a label appears twice, or the head is a module of the user's, of which only one size is known.
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
        self.labels, self.thresholds, self.operating, self._classes_are_given = None, None, None, True
        self._take_head(num_classes)
        return LabelChange((), (), before, had, "the head is initialised again")

    def _change_labels(self, labels: tuple[str, ...]) -> LabelChange:
        before, had, old = self.labels or (), self.num_classes or 0, self.head
        if labels == before:
            return LabelChange.between(before, labels, had)
        self._require_head_by_name(len(labels))
        self.labels, self.thresholds, self.operating = labels, None, None
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
            why = "the old classes had no names" if rows else "it has no rows for each class"
            remark = f"the head is initialised again: {why}"
        if getattr(self.head, "requires_solving", False):
            remark = "the head is solved again"
        return LabelChange.between(before, labels, had, remark)

    def _require_head_by_name(self, num_classes: int) -> None:
        if isinstance(self._head.kind, nn.Module) and self.head is not None:
            raise UsageError(
                f"the head is your own module for {self.num_classes} classes, which cannot be changed to others",
                why="only a head that was built by name can be built again",
                fix=f'HEADS.register("mine", MyHead) and head="mine", or a new model for {num_classes} classes',
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
                fix="put the data's labels in the model's order, or give the data a method set_labels(labels)",
            )
        datamodule.set_labels(self.labels)

    def to_predictions(self, outputs: torch.Tensor, samples: Sequence[Input]) -> Sequence[Prediction]:
        """A `Label` an image, its labels with the most probable first; or `Labels`, those above their thresholds."""
        labels = tuple(self.output_names(outputs.shape[1]))
        paths = [sample.path for sample in samples]
        scores, order = outputs.cpu().sort(dim=1, descending=True, stable=True)
        points = self.operating or OperatingPoints()
        bounds = self.score_thresholds(self.temperature) if self.multi_label else ()
        found: list[Prediction] = []
        for path, row, values in zip(paths, order.tolist(), scores.tolist(), strict=True):
            names = tuple(labels[place] for place in row)
            ranked = dict(zip(names, values, strict=True))
            if not self.multi_label:
                found.append(Label(path, names, tuple(values), points.decision(ranked, names[:1])))
                continue
            said = tuple(labels[place] for place, value in zip(row, values, strict=True) if value >= bounds[place])
            in_order = {label: ranked[label] for label in labels}
            thresholds = dict(zip(labels, bounds, strict=True))
            found.append(Labels(path, said, in_order, thresholds, points.decision(ranked, said)))
        return found

    def export_outputs(self) -> Outputs:
        """`scores` (N, classes)."""
        from flashtask.tasks.export.outputs import LabelOutputs

        if not self.multi_label:
            return LabelOutputs(None)
        return LabelOutputs(self.score_thresholds(self.temperature))

    def _drop_operating_points(self) -> None:
        """Forget what is about the scores of other weights, and say so."""
        self.operating = None
        self.trainer.say("training drops temperature and thresholds of the model; flashtask operate finds new ones")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the labels that the weights were trained with, if the model has none yet.

        Raises:
            UsageError: the model's labels are other ones, or stand in another order.
        """
        super().on_load_checkpoint(checkpoint)
        self.thresholds = _stored_thresholds(checkpoint.get("thresholds"), checkpoint.get("labels"))
        known = checkpoint.get("labels") or self.output_names(self.num_classes or 0)
        self.operating = stored_operating(checkpoint.get("operating"), known)
        if self.operating is not None and self._begins_a_fit() and not self.trainer.current_fit.done:
            self._drop_operating_points()  # training goes on from here, else it is the best checkpoint of a fit
        self._give_thresholds()
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
        """The labels too, and the thresholds and operating points, if there are any."""
        found = {**super().describe(), "labels": None if self.labels is None else list(self.labels)}
        if self.thresholds is not None:
            found["thresholds"] = list(self.thresholds)
        return {**found, **self.describe_use()}

    def describe_use(self) -> dict[str, Any]:
        """The operating points, if there are any."""
        return {} if self.operating is None else {"operating": self.operating.to_dict()}

    def operate(
        self,
        datamodule: Any,
        part: str = "val",
        *,
        recall: Mapping[str, float] | None = None,
        precision: Mapping[str, float] | None = None,
        coverage: float | None = None,
        abstain_below: float | None = None,
        trainer: Trainer | None = None,
    ) -> OperatingPoints:
        """Fit the temperature of the scores, and choose thresholds by which predictions are `accepted` or `unknown`.

        Labels, outputs and losses stay as they are. `save_checkpoint` and `save_pretrained` store the result, and what
        was there before is replaced. Source of the temperature: Guo et al., ICML 2017; of the thresholds for a recall:
        split-conformal prediction (Vovk et al., 2005).

        Args:
            datamodule: with images that the model was not trained on.
            part: `val` or `test`.
            recall: by label, the share of its images that are to reach the threshold of the label.
            precision: by label, the share of the images that reach its threshold that are to be of it.
            coverage: the share of the images that are accepted if they reach a score, which is chosen.
            abstain_below: that score itself.
            trainer: whose devices are used; None means one with the defaults.

        Raises:
            UnknownNameError: there is no such label.
            UsageError: a target that cannot be reached, with the best one that can.
            BadDataError: the part has no image of a label, or images that cannot be read.
        """
        self.operating = operated(
            self,
            datamodule,
            part,
            trainer=trainer,
            recall=recall,
            precision=precision,
            coverage=coverage,
            abstain_below=abstain_below,
        )
        self._give_thresholds()
        return self.operating

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
        raise UsageError("a label appears twice", fix="labels must all be different")
    return tuple(labels)


def _tempered(score: float, temperature: float) -> float:
    """What a probability becomes if its logit is divided by a temperature."""
    if not 0 < score < 1:
        return score
    return 1 / (1 + math.exp(-math.log(score / (1 - score)) / temperature))


def _stored_thresholds(stored: Any, labels: Any) -> tuple[float, ...] | None:
    """The thresholds in a file, which need not be one of ours.

    Raises:
        IntegrityError: they are not a share for each label.
    """
    if stored is None:
        return None
    if not isinstance(stored, list) or not all(is_number(value) and 0 <= value <= 1 for value in stored):
        raise IntegrityError("its thresholds are not numbers from 0 to 1")
    if isinstance(labels, list) and len(labels) != len(stored):
        raise IntegrityError(f"it has {len(stored)} thresholds for {len(labels)} labels")
    return tuple(float(value) for value in stored)


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
