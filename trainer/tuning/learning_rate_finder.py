"""The learning-rate range test: train with growing rates, and take the one at which the loss falls fastest.

From Smith, "Cyclical learning rates for training neural networks" (2015, arXiv:1506.01186).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashtask.core.errors import DivergedError, UsageError
from flashtask.core.files import PathLike
from flashtask.core.number_checks import is_number, is_whole
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import read_optimizers
from flashtask.trainer.run import Run
from flashtask.trainer.run_extension import RunExtension
from flashtask.trainer.tuning.learning_rate_curve import (
    LearningRateCurve,
    beginning_of,
    falls_clearly,
    smoothed,
    steepest,
)
from flashtask.trainer.tuning.named_values import NamedValue
from flashtask.trainer.tuning.trials import Trial, batches_a_step

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["RangeTest", "find_learning_rate", "learning_rate_of"]


@dataclass(frozen=True)
class RangeTest:
    """How learning rates are tried.

    Args:
        num_training: optimizer steps, each at a rate of its own; at least 3.
        min_lr: the first rate.
        max_lr: the last.
        mode: `exponential`: each rate is the one before times a factor; `linear`: plus a constant.
        early_stop_threshold: the sweep ends where the smoothed loss is above this many times its lowest; None: never.
        smoothing: weight of the past in the mean of the losses, from 0 (none) to below 1.
        attribute: where the module keeps its rate; None means `learning_rate`, or else `lr`.
        picture: a file for a picture of the curve.

    Raises:
        UsageError: an invalid value.
    """

    num_training: int = 100
    min_lr: float = 1e-8
    max_lr: float = 1.0
    mode: str = "exponential"
    early_stop_threshold: float | None = 4.0
    smoothing: float = 0.9
    attribute: str | None = None
    picture: PathLike | None = None

    def __post_init__(self) -> None:
        limit = self.early_stop_threshold
        checks = {
            "num_training": (is_whole(self.num_training, 3), "a whole number of at least 3"),
            "min_lr": (is_number(self.min_lr) and self.min_lr > 0, "a number above 0"),
            "max_lr": (is_number(self.max_lr) and self.max_lr > self.min_lr, f"a number above min_lr={self.min_lr}"),
            "mode": (self.mode in ("exponential", "linear"), '"exponential" or "linear"'),
            "early_stop_threshold": (limit is None or (is_number(limit) and limit > 1), "a number above 1, or None"),
            "smoothing": (is_number(self.smoothing) and 0 <= self.smoothing < 1, "a number from 0 to below 1"),
            "attribute": (self.attribute is None or isinstance(self.attribute, str), "the name of an attribute"),
        }
        for name, (fits, needed) in checks.items():
            if not fits:
                raise UsageError(f"learning_rate: {name}={getattr(self, name)!r}: {needed} is needed")

    def rates(self) -> list[float]:
        """The rate of every step."""
        shares = [step / (self.num_training - 1) for step in range(self.num_training)]
        if self.mode == "linear":
            return [self.min_lr + (self.max_lr - self.min_lr) * share for share in shares]
        return [self.min_lr * (self.max_lr / self.min_lr) ** share for share in shares]


class _Sweep(Callback, RunExtension):
    """Gives every step its rate, and notes its loss.

    Every parameter group gets what `configure_optimizers` gives it at that rate: the groups of a module move in
    proportion, and one whose rate does not depend on the module's stays where it is.
    """

    def __init__(self, test: RangeTest, value: NamedValue) -> None:
        self.test, self.value = test, value
        self.planned = test.rates()
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.ended_by = ""
        self._groups: list[tuple[dict[str, Any], float, float]] = []
        self._loss: float | None = None
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Learn how the optimizer's rates follow the module's; schedules do not take part."""
        run = trainer.current_fit
        if not run.automatic or len(run.optimizers) != 1:
            raise UsageError(
                "a range test needs one optimizer, which the trainer steps",
                why=f"{type(module).__name__} has {len(run.optimizers)}"
                + ("" if run.automatic else ", and automatic_optimization = False"),
                fix="choose the learning rates by hand",
            )
        run.schedulers.clear()
        self._groups = self._follow(module, run)

    def wrap_call(self, run: Run, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The step of training: a loss that is not finite ends the sweep and not the run."""
        if name != "training_step" or not isinstance(run, FitRun):
            return call
        return lambda *arguments: self._finite(run, call(*arguments))

    def _follow(self, module: Module, run: FitRun) -> list[tuple[dict[str, Any], float, float]]:
        """Each parameter group with (a, b) where its rate is `a + b * (the module's rate)`."""
        base = self.value.value
        self.value.give(2 * base)
        (optimizer,), (probe,) = run.optimizers, read_optimizers(module.configure_optimizers(), run)[0]
        self.value.give(base)
        rates = [(_target(group), _target(other)) for group, other in _pairs(optimizer, probe)]
        slopes = [(doubled - single) / base for single, doubled in rates]
        if not any(slopes):
            raise UsageError(
                f"the optimizer does not use {self.value.name}",
                why=f"{type(module).__name__}.configure_optimizers gives the same rates whatever it is",
                fix=f"torch.optim.Adam(self.parameters(), lr=self.{self.value.name})",
            )
        return [
            (group, single - slope * base, slope)
            for group, (single, _), slope in zip(optimizer.param_groups, rates, slopes, strict=True)
        ]

    def _finite(self, run: FitRun, outputs: Any) -> Any:
        """What the step returned, or None (no loss, no gradients) at a rate that is too high for any loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor) or math.isfinite(loss.item()):
            return outputs
        self._end(run, f"the loss became {loss.item()}")
        return None

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """The rate of the step that this batch belongs to."""
        self._steps = trainer.global_step
        for group, constant, slope in self._groups:
            group["lr"] = constant + slope * self.planned[self._steps]

    def on_before_backward(self, trainer: Trainer, module: Module, loss: torch.Tensor) -> None:
        """A batch of an accumulation group comes with its share of the group's loss."""
        self._loss = (self._loss or 0.0) + loss.item()

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the step, keep its loss; end the sweep where it has risen too far."""
        if trainer.global_step == self._steps or self._loss is None or self.ended_by:
            return
        self.rates.append(self.planned[self._steps])
        self.losses.append(self._loss)
        self._loss = None
        self.smoothed = smoothed(self.losses, self.test.smoothing)
        limit, lowest = self.test.early_stop_threshold, min(self.smoothed)
        if limit is not None and self.smoothed[-1] > lowest + (limit - 1) * abs(lowest):
            self._end(trainer.current_fit, f"the loss rose to more than {limit:g} times its lowest")

    def _end(self, run: FitRun, why: str) -> None:
        self.ended_by = why
        run.leave()


def learning_rate_of(module: Module, attribute: str | None) -> NamedValue:
    """The learning rate of a module, in every place that has it.

    Raises:
        UsageError: it has none, or not a number above 0.
    """
    names = ("learning_rate", "lr") if attribute is None else (attribute,)
    shown, kind = " or ".join(names), type(module).__name__

    def missing() -> UsageError:
        return UsageError(
            f"{kind} has no learning rate that could be set",
            why=f"neither an attribute nor a saved hyper-parameter is named {shown}",
            fix=f"self.{names[0]} = 0.001 in __init__, and lr=self.{names[0]} in configure_optimizers",
        )

    found = NamedValue.find(names, (module,), missing)
    if not is_number(found.value) or found.value <= 0:
        raise UsageError(
            f"{found.name} of {kind} is {found.value!r}: a number above 0 is needed to start from",
            fix=f"{found.name}=0.001",
        )
    return found


def find_learning_rate(trial: Trial, test: RangeTest, finetuning: Finetuning | None) -> LearningRateCurve:
    """Run the test on the copies of a trial, in the first stage of the finetuning strategy.

    Raises:
        UsageError: the loss did not fall at any rate, or the module's rate cannot be followed.
    """
    sweep = _Sweep(test, learning_rate_of(trial.module, test.attribute))
    first = None if finetuning is None else finetuning.only(0)
    accumulate = batches_a_step(trial.trainer)[0]
    try:
        trial.fit(sweep, steps=test.num_training, batches_a_step=accumulate, finetuning=first)
    except DivergedError as error:  # a gradient, where they are clipped
        sweep.ended_by = error.what
    place = steepest(sweep.smoothed, beginning_of(len(sweep.smoothed), test.smoothing))
    if place is None:
        raise _no_suggestion(sweep)
    return LearningRateCurve(
        rates=tuple(sweep.rates),
        losses=tuple(sweep.losses),
        smoothed=tuple(sweep.smoothed),
        suggestion=sweep.rates[place],
        is_clear=falls_clearly(sweep.losses, test.smoothing),
        ended_by=sweep.ended_by,
        mode=test.mode,
    )


def _no_suggestion(sweep: _Sweep) -> UsageError:
    losses, rates = sweep.smoothed, sweep.rates
    if len(losses) < 3:
        return UsageError(
            f"no learning rate could be found: the sweep ended after {len(losses)} steps",
            why=sweep.ended_by or "training_step returned no loss",
            fix=f'start lower, learning_rate={{"min_lr": {sweep.planned[0] / 100:g}}}, or look at the loss itself',
        )
    ended = f"; {sweep.ended_by}" if sweep.ended_by else ""
    return UsageError(
        "no learning rate could be found: the loss did not fall at any rate",
        why=f"it was {losses[0]:.4g} at {rates[0]:.2g} and {losses[-1]:.4g} at {rates[-1]:.2g}{ended}",
        fix='more steps, learning_rate={"num_training": 300}, or other rates, {"min_lr": 1e-6, "max_lr": 10.0}',
    )


def _pairs(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> Any:
    return zip(one.param_groups, other.param_groups, strict=True)


def _target(group: dict[str, Any]) -> float:
    """The rate that a group is made with: what a schedule reaches, or else starts from."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
