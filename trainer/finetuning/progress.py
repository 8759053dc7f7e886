"""Where a run stands in its strategy: the ends of phases that depend on the run, and what they wait for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.finetuning.phase import Plateau
from flashtask.trainer.finetuning.phases import Finetuning, Position
from flashtask.trainer.metric_order import best_mode

__all__ = ["PhaseProgress"]


class PhaseProgress:
    """The part of a strategy that is state; what is frozen follows from it and the epoch alone.

    Args:
        finetuning: the strategy, for the layers of a certain module.
        module: whose own metric is `module.monitor`.

    Raises:
        UsageError: a plateau has no `mode`, and the name of its metric does not say it.
    """

    def __init__(self, finetuning: Finetuning, module: Any) -> None:
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
        """An epoch begins; gives its phase."""
        position = self.position(epoch)
        if position.number >= len(self.first_steps):
            self.first_steps += [step] * (position.number + 1 - len(self.first_steps))
            self._best, self._waited = None, 0
        return position

    def leave(
        self, epoch: int, step: int, metrics: Mapping[str, float], fresh: Collection[str], measured: bool
    ) -> bool:
        """An epoch is over; gives whether the last phase is over with it.

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
        """Take back what `state_dict` gave."""
        self.ends = dict(state["ends"])
        self.first_steps = [*state["first_steps"]]
        self._best, self._waited = state["best"], state["waited"]
