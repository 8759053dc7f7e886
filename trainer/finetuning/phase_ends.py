"""The phases of a strategy in the course of a run: ends that depend on it, and the learning rates of each phase."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.library_internals import rate_lists
from flashtask.trainer.finetuning.phase import Plateau
from flashtask.trainer.finetuning.strategies import Finetuning, Position
from flashtask.trainer.metric_order import best_mode

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module

__all__ = ["PhaseProgress", "enter_phase", "leave_phase", "require_phase_groups", "set_base_rates"]

#: what schedules keep in a parameter group that is a learning rate
_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")


class PhaseProgress:
    """The state of a strategy in a run: what is frozen depends on it and on the epoch alone.

    Args:
        finetuning: the strategy, for the layers of a certain module.
        module: whose own metric is `module.monitor`.

    Raises:
        UsageError: a plateau has no `mode`, and the name of its metric does not imply one.
    """

    def __init__(self, finetuning: Finetuning, module: Module) -> None:
        self.finetuning = finetuning
        plateaus = {phase.plateau for phase in finetuning.phases if phase.plateau is not None}
        self._modes = {plateau: best_mode("Plateau", plateau.monitor, plateau.mode, module) for plateau in plateaus}
        #: number of a phase -> the epoch at which it was over
        self.ends: dict[int, int] = {}
        #: the optimizer step at which each phase began, as far as the run came
        self.first_steps: list[int] = []
        self._best: float | None = None
        self._waited = 0

    def position(self, epoch: int) -> Position:
        """The phase that an epoch belongs to."""
        return self.finetuning.position(epoch, self.ends)

    def first_step(self, number: int) -> int | None:
        """The optimizer step at which a phase began, None if it has not."""
        return self.first_steps[number] if number < len(self.first_steps) else None

    def enter(self, epoch: int, step: int) -> Position:
        """Begin an epoch, and return its phase."""
        position = self.position(epoch)
        if position.number >= len(self.first_steps):
            self.first_steps += [step] * (position.number + 1 - len(self.first_steps))
            self._best, self._waited = None, 0
        return position

    def leave(
        self, epoch: int, step: int, metrics: Mapping[str, float], fresh: Collection[str], measured: bool
    ) -> bool:
        """End an epoch, and return whether the last phase is over with it.

        Args:
            epoch: that is over.
            step: optimizer steps so far.
            metrics: the last value of each.
            fresh: the names of those that were measured in this epoch.
            measured: whether an epoch like this one is validated.

        Raises:
            UnknownNameError: the metric that a plateau waits for was not measured.
        """
        number = self.position(epoch).number
        phase = self.finetuning.phases[number]
        is_over = phase.steps is not None and step - self.first_steps[number] >= phase.steps
        if phase.plateau is not None:
            if phase.plateau.monitor in fresh:
                is_over = self._is_flat(phase.plateau, metrics[phase.plateau.monitor]) or is_over
            elif measured:
                error = UnknownNameError("metric to monitor", phase.plateau.monitor, sorted(metrics))
                raise UsageError(f"phase {number} of the strategy: {error.what}", fix=error.fix)
        if is_over:
            self.ends[number] = epoch + 1
        return is_over and number == len(self.finetuning.phases) - 1

    def _is_flat(self, plateau: Plateau, value: float) -> bool:
        sign = 1 if self._modes[plateau] == "max" else -1
        best = self._best
        if math.isfinite(value) and (best is None or sign * (value - best) > plateau.min_delta):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        return self._waited >= plateau.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the same phase."""
        ends = [[number, epoch] for number, epoch in self.ends.items()]
        return {"ends": ends, "first_steps": [*self.first_steps], "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self.ends = dict(state["ends"])
        self.first_steps = [*state["first_steps"]]
        self._best, self._waited = state["best"], state["waited"]


def enter_phase(run: FitRun) -> None:
    """At the start of an epoch: freeze and unfreeze as its phase wants it, and give the optimizers its rates."""
    if run.freezing is None or run.phases is None:
        return
    number, start = run.phases.enter(run.epoch, run.global_step)
    run.freezing.apply(run.epoch, run.phases.ends)
    rates = {name: by_phase[number] for name, by_phase in run.freezing.rates.items()}
    set_base_rates(run.optimizers, [rate.scheduler for rate in run.schedulers], rates)
    if start == run.epoch and run.epoch > 0:
        count, before = run.freezing.count(number), run.freezing.count(number - 1)
        how = "unfreezing" if count > before else str(run.freezing.finetuning.phases[number].train)
        run.trainer.say(f"epoch {run.epoch}: {how}, {count:,} parameters train now")


def leave_phase(run: FitRun) -> None:
    """At the end of an epoch: find out whether it was the last of its phase; the end of the last phase ends the run."""
    if run.phases is None or not run.epoch_is_complete:
        return
    measured = run.validation is None or run.validation_times.was_in_epoch
    if run.phases.leave(run.epoch, run.global_step, run.metrics, run.fresh_metrics, measured):
        run.stop("the last phase of the strategy is over")


def set_base_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], rates: Mapping[str, float]) -> None:
    """Give parameter groups the base rates of a phase; one that has its rate already is left as it is.

    Args:
        optimizers: whose groups have names, and keep their base rates.
        schedulers: torch's, that change the rates of those groups.
        rates: by name of the group.
    """
    for optimizer in optimizers:
        own = [one for one in schedulers if getattr(one, "optimizer", None) is optimizer]
        for index, group in enumerate(optimizer.param_groups):
            rate, base = rates.get(group.get("name", "")), group.get("base_lr")
            if rate is None or base is None or rate == base:
                continue
            group["base_lr"] = rate
            for key in _IN_GROUPS:
                if key in group:
                    group[key] = _changed(group[key], base, rate)
            for values in (values for one in own for values in rate_lists(one) if index < len(values)):
                values[index] = _changed(values[index], base, rate)


def _changed(value: float, base: float, rate: float) -> float:
    return rate if value == base else value * (rate / base)


def require_phase_groups(optimizers: Iterable[Optimizer], rates: Mapping[str, list[float]], module: Module) -> None:
    """Refuse phases with rates of their own for a module whose optimizer does not have the strategy's groups.

    Raises:
        UsageError: with the line that gives it them.
    """
    held = {group.get("name") for optimizer in optimizers for group in optimizer.param_groups}
    if not rates or not held >= set(rates):
        raise UsageError(
            f"the strategy has learning rates of its own, and {type(module).__name__} makes its optimizer without them",
            why="what configure_optimizers returns is never edited",
            fix="torch.optim.AdamW(self.trainer.fit_run.freezing.optimizer_groups(head=1e-3, backbone=1e-4))",
        )
