"""A time budget in place of a strategy and a number of epochs: both are chosen from the measured time of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.timing import Duration, read_duration
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.finetuning.strategies import Finetuning, resolve_finetuning
from flashtask.trainer.finetuning_plan import PhasePlan, Plan, plan
from flashtask.trainer.module import Module
from flashtask.trainer.tuning.trials import require_one_process

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["RULES", "Budget", "BudgetChoice", "Rule", "choose_within", "seconds_of_budget"]

#: A length of time as `max_time` takes it, or `"best"`: as long as a rule allows.
Budget = Duration

#: Share of the time that is planned; the rest is for start-up, checkpoints and the report.
_SHARE = 0.85
#: Most epochs of a strategy without a rule.
_MOST = 30


@dataclass(frozen=True)
class Rule:
    """A strategy, and for how many epochs it is worth its time.

    Args:
        strategy: by name.
        least: fewer epochs than these are worse than the next rule.
        most: more epochs than these bring nothing that was measured.
        why: what was measured, in half a sentence.
        samples: with fewer training images than these the next rule is better.
    """

    strategy: str
    least: int
    most: int
    why: str
    samples: int = 0


#: For tasks whose own strategy is `freeze`, from the best to the fastest: the first whose least epochs fit is taken.
#: The head alone is the first phase of the other one, so it needs no measurement of its own.
RULES = (
    Rule("freeze_unfreeze:2", 6, 20, "with many images, training the backbone too pays from six epochs on", 1000),
    Rule("freeze", 1, 10, "the backbone sees each image once, and the head gains little after ten epochs"),
)


@dataclass(frozen=True)
class BudgetChoice:
    """What fits into a budget.

    Args:
        strategy: the finetuning strategy.
        epochs: of the run.
        seconds: that the run will take, an estimate.
        says: the choice and its reason, in a sentence.
    """

    strategy: Finetuning
    epochs: int
    seconds: float
    says: str


def seconds_of_budget(budget: Budget) -> float:
    """The seconds of a budget; infinite for `"best"`.

    Raises:
        UsageError: it is no length of time, or it is zero.
    """
    if budget == "best":
        return math.inf
    seconds = read_duration(budget).total_seconds()
    if not seconds:
        raise UsageError("a budget must be longer than zero", fix='budget="10min", or "best"')
    return seconds


def choose_within(
    trainer: Trainer, module: Module, data: DataModule, strategy: Finetuning | None, budget: Budget
) -> BudgetChoice:
    """Measure a few steps on copies, and choose the strategy and the number of epochs that fit into a time.

    Args:
        trainer: of the run; how long it is must be open.
        module: to train; it stays as it is.
        data: to train it on.
        strategy: if given, only the number of epochs is chosen.
        budget: how long everything may take, this choice included.

    Raises:
        UsageError: the trainer has an end of its own or several processes, or the time of a step cannot be estimated.
    """
    began, seconds = time.perf_counter(), seconds_of_budget(budget)
    ends = {"max_epochs": trainer.arguments["max_epochs"], "max_time": trainer.max_time}
    ends["max_steps"] = trainer.max_steps if trainer.max_steps >= 0 else None
    if given := [name for name, value in ends.items() if value is not None]:
        raise UsageError(
            f"budget chooses how long the run is, and {' and '.join(given)} says it too",
            fix=f"leave out {' and '.join(given)}, or budget",
        )
    require_one_process(trainer, "budget measures steps")
    rules = _rules_for(module, strategy)
    finetuning = strategy or resolve_finetuning(rules[0].strategy)
    planned = plan(trainer.with_changes(max_epochs=rules[0].most), module, data, finetuning)
    left = seconds * _SHARE - (time.perf_counter() - began)
    rule, phases, epochs = _fitting(rules, planned, left) or _shortest(rules, planned)
    finetuning = finetuning if rule is rules[0] else resolve_finetuning(rule.strategy)
    spent = _seconds_of(phases, epochs)
    late = "" if spent <= left else ", the shortest that there is; the budget has no room for more"
    length = f"{epochs} epoch{'s' if epochs > 1 else ''} in about {_shown(spent)}{late}"
    return BudgetChoice(
        finetuning, epochs, spent, f"budget {_shown(seconds)}: {finetuning.name}, {length} ({rule.why})"
    )


def _fitting(rules: Sequence[Rule], planned: Plan, left: float) -> tuple[Rule, Sequence[PhasePlan], int] | None:
    """The first rule that has enough samples and whose least epochs fit, its phases, and as many epochs as fit."""
    samples = (planned.batches or 0) * (planned.batch_size or 0)
    for rule in rules:
        phases = _phases_of(rule, rules, planned)
        fitting = [epochs for epochs in range(rule.least, rule.most + 1) if _seconds_of(phases, epochs) <= left]
        if fitting and (samples >= rule.samples or rule is rules[-1]):
            return rule, phases, max(fitting)
    return None


def _shortest(rules: Sequence[Rule], planned: Plan) -> tuple[Rule, Sequence[PhasePlan], int]:
    """The last rule, with its least epochs; with its most where features that are there make further ones free."""
    rule = rules[-1]
    phases = _phases_of(rule, rules, planned)
    return rule, phases, rule.most if phases[0].features_once and len(phases) == 1 else rule.least


def _phases_of(rule: Rule, rules: Sequence[Rule], planned: Plan) -> Sequence[PhasePlan]:
    """What is planned of the first rule; every other trains what its first phase does."""
    return planned.phases if rule is rules[0] else (_longer(planned.phases[0], rule.most),)


def _rules_for(module: Module, strategy: Finetuning | None) -> tuple[Rule, ...]:
    if strategy is not None:
        return (Rule(strategy.name, 1, _MOST, "the strategy was given"),)
    if module.default_strategy == "freeze":
        return RULES
    own = resolve_finetuning(module.default_strategy).name
    return (Rule(own, 1, _MOST, "it is the strategy of the task"),)


def _longer(phase: PhasePlan, epochs: int) -> PhasePlan:
    """The first phase of a plan, for more epochs."""
    if phase.seconds is None or not phase.epochs:
        return phase
    seconds = phase.seconds if phase.features_once else phase.seconds * epochs / phase.epochs
    return replace(phase, epochs=epochs, seconds=seconds)


def _seconds_of(phases: Sequence[PhasePlan], epochs: int) -> float:
    """The estimate for the first epochs of a plan."""
    total = 0.0
    for phase in phases:
        if phase.seconds is None or phase.start is None or phase.epochs is None:
            raise UsageError(
                "the time of this strategy cannot be estimated, so no number of epochs fits a budget",
                why="a phase ends by a metric, or the loaders have no length",
                fix="max_time=..., which ends the run when the time is over",
            )
        own = min(max(epochs - phase.start, 0), phase.epochs)
        if own:
            # Features are computed once, however many epochs use them.
            total += phase.seconds if phase.features_once else phase.seconds * own / phase.epochs
    return total


def _shown(seconds: float) -> str:
    if math.isinf(seconds):
        return "best"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
