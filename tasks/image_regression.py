"""`ImageRegressor`: one number an image, or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.core.accuracy import Accuracy
from flashtask.core.errors import UsageError
from flashtask.core.named_choice import Choice
from flashtask.data.image_regression import ImageRegressionData
from flashtask.data.inputs import Input
from flashtask.data.targets import NumberReader
from flashtask.reports.judgement import Judgement, Scoring
from flashtask.tasks.batches import StepOutput
from flashtask.tasks.losses import NUMBER_LOSSES, chosen_loss
from flashtask.tasks.predictions import Number
from flashtask.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.tasks.export.outputs import Outputs
__all__ = ["ImageRegressor"]


class ImageRegressor(Task):
    """A backbone with a head for numbers, trained by the Huber loss and judged by the mean absolute error.

    The head's outputs are in units of the training targets' standard deviation, counted from their mean; both are
    stored. Predictions and metrics are in the unit of the targets.

    Args:
        backbone: a registered name, or a module.
        num_targets: how many numbers an image has; learned from the data if not given.
        head: `linear`, `mlp`, `ridge` (least squares in closed form), another registered name, or a module.
        loss_fn: `huber` (quadratic up to `delta`, 1 standard deviation, then linear), `mse`, `l1` or `smooth_l1`
            (`beta`), also with arguments: `("huber", {"delta": 0.5})`; or a callable of outputs and targets
            (B, num_targets), both in units of the standard deviation, that gives a scalar.
        metrics: further ones than `mae`, `rmse`, `r2` and `spearman` (the rank correlation), as for `ImageClassifier`.
        options: those of `Task`: `learning_rate`, `optimizer`, `pretrained`, ...

    Raises:
        UnknownNameError: a loss or a metric that does not exist.
        UsageError: a closed-form head that is for classes alone.
    """

    name = "image_regression"
    monitor, monitor_mode = "val_mae", "min"
    data_class = ImageRegressionData
    prediction_class = Number
    heads_take = ("pooled", "tokens")

    def __init__(
        self,
        backbone: str | nn.Module = AUTO,
        num_targets: int | None = None,
        head: str | nn.Module = "linear",
        *,
        loss_fn: Choice | Callable[..., torch.Tensor] = "huber",
        metrics: Any = None,
        **options: Any,
    ) -> None:
        named = chosen_loss(loss_fn, NUMBER_LOSSES)
        super().__init__(backbone, head, num_targets, **options)
        self.save_hyperparameters()
        self.num_targets, self._more_metrics = num_targets, metrics
        self._loss_fn, self._named_loss = loss_fn, named
        self._reader: NumberReader | None = None
        builder = self._head.builder
        if getattr(builder, "requires_solving", False) and not getattr(builder, "solves_numbers", False):
            raise UsageError(
                f"the head {head!r} is for classes, but {type(self).__name__} predicts numbers",
                fix='head="ridge", or a head that is trained: head="linear"',
            )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The chosen loss of outputs and targets (B, num_targets), in units of the standard deviation."""
        chosen: Any = self._named_loss or self._loss_fn
        found: torch.Tensor = chosen(outputs, targets)
        return found

    def weighted_loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The chosen loss with weights of samples (B,)."""
        if self._named_loss is None:
            return super().weighted_loss(outputs, targets, weights)
        each = self._named_loss(outputs, targets, reduction="none").mean(dim=1)
        return (each * weights).mean()

    def to_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """The data's numbers (B, num_targets) in units of the standard deviation, counted from the mean."""
        numbers = targets.float()
        mean, std = self._scale(numbers)
        return ((numbers[:, None] if numbers.ndim == 1 else numbers) - mean) / std

    def postprocess(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (B, num_targets) in the unit of the targets."""
        mean, std = self._scale(outputs)
        return outputs * std + mean

    def _scale(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the training targets; 0 and 1 if the data does not tell them."""
        if self._reader is None:
            return like.new_zeros(()), like.new_ones(())
        return like.new_tensor(self._reader.mean), like.new_tensor(self._reader.std)

    def metric_inputs(self, step: StepOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted numbers and targets in their own unit, (B,) if there is one number an image."""
        found = self.postprocess(step.outputs), self.postprocess(step.targets)
        return (found[0][:, 0], found[1][:, 0]) if found[0].shape[1] == 1 else found

    @property
    def scoring(self) -> Scoring:
        """The mean absolute error."""
        return Scoring("absolute error", "mae", title="The mean absolute error")

    def judge(self, step: StepOutput, inputs: tuple[Any, Any]) -> list[Judgement]:
        """By the absolute error, in the unit of the targets."""
        from flashtask.tasks.judging import judged_numbers

        found, targets = inputs
        return judged_numbers(found, targets, self.output_names(step.outputs.shape[1]))

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """Mean absolute error, root mean squared error, R2 and rank correlation; of several numbers their means."""
        from flashtask.tasks.metrics import regression_metrics

        return regression_metrics(self._more_metrics, num_outputs)

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Mean absolute error and root mean squared error of each number, where there are several."""
        from flashtask.tasks.metrics import number_metrics_by_target

        return number_metrics_by_target(num_outputs) if num_outputs > 1 else {}

    def output_names(self, num_outputs: int) -> Sequence[str]:
        """The columns that the model was trained on."""
        names = self._reader.names if self._reader is not None else ("number",)
        return names if len(names) == num_outputs else tuple(f"number_{index}" for index in range(num_outputs))

    def agree_on_targets(self, datamodule: Any) -> None:
        """Take the scale of the data in a first fit; a trained model keeps its own, so its head keeps its meaning.

        Raises:
            UsageError: the data has another number of targets, or the number is not known.
        """
        super().agree_on_targets(datamodule)
        self._read_scale()
        found = len(self._reader.mean) if self._reader is not None else self.num_targets
        if self.num_targets not in (None, found):
            raise UsageError(
                f"the model predicts {self.num_targets} number(s) per image, but the data has {found}",
                fix="leave out num_targets: it is taken from the data",
            )
        self.num_targets = found
        if self.head is None and found is not None:
            self.make_head(found)
            self.to(self.device)
        self.hparams.update(num_targets=self.num_targets)
        if self._begins_a_fit():
            self._say_targets()

    def _say_targets(self) -> None:
        if self.num_targets is None:
            raise UsageError(
                "the number of targets is not known: neither the model nor the data defines it",
                fix=f"{type(self).__name__}(num_targets=1)",
            )
        if self.trainer.enable_model_summary and self._reader is not None:
            self.trainer.say(self._reader.describe())

    def _read_scale(self) -> None:
        self._reader = None if self.target_description is None else NumberReader.from_dict(self.target_description)

    def to_predictions(self, outputs: torch.Tensor, samples: Sequence[Input]) -> Sequence[Number]:
        """A `Number` an image, with the names of the columns that the model was trained on."""
        names = self.output_names(outputs.shape[1])
        rows = outputs.cpu().tolist()
        return [Number(one.path, dict(zip(names, row, strict=True))) for one, row in zip(samples, rows, strict=True)]

    def export_outputs(self) -> Outputs:
        """`values` (N, targets), in their own unit."""
        from flashtask.tasks.export.outputs import NumberOutputs

        return NumberOutputs(self._scale(torch.zeros(()))[1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the scale that the weights were trained with."""
        super().on_load_checkpoint(checkpoint)
        self._read_scale()

    def recipe(self) -> dict[str, Any]:
        """Without the number of targets, which a recipe learns from its data."""
        recipe = super().recipe()
        recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "num_targets"}
        return recipe
