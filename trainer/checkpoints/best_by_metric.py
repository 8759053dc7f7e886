"""Which places of a run are worth a file: those with the best values of a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from flashtask.core.errors import UnknownNameError
from flashtask.trainer.checkpoints.best_files import BestFiles, SavedFile
from flashtask.trainer.checkpoints.names import NameTemplate
from flashtask.trainer.metric_order import tie_break

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["BestByMetric"]


class BestByMetric:
    """Ranks places of a run by a metric, and names their files.

    Args:
        files: that are kept.
        template: for their names.
        metric: the name of the metric.
        is_asked_for: the user named it, so that it must be there; else, without it, the newest is best.
        say: tells the user something.
    """

    def __init__(
        self, files: BestFiles, template: NameTemplate, metric: str, is_asked_for: bool, say: Callable[[str], None]
    ) -> None:
        self._files, self._template, self._say = files, template, say
        self._metric, self._is_asked_for = metric, is_asked_for
        self._has_said = False
        #: the value that was looked at last
        self.score: float | None = None

    def plan(
        self, run: FitRun, values: Mapping[str, float], taken: Collection[str], *, after_epoch: bool
    ) -> SavedFile | None:
        """The file to write, which counts as kept from now on; None if the place is not worth one.

        Args:
            run: a fit, between two steps.
            values: what was measured so far.
            taken: names of files that others keep.
            after_epoch: an epoch is over, else a step.

        Raises:
            UnknownNameError: nothing of the metric's name, or of a name in the template, was logged.
        """
        has_value, self.score = self._look(run, values, after_epoch)
        if self.score is not None and not math.isfinite(self.score):
            self._say_once(run, self.score)
            has_value = False
        if not has_value and self._files.most >= 0:
            return None
        place = {"epoch": run.epoch, "step": run.global_step}
        metrics = dict(run.history[-1]) if after_epoch else {**values, **place}
        new = SavedFile(self.score, tie_break(values), run.epoch, run.global_step, metrics)
        if not self._files.wants(new):
            return None
        stem = self._template.fill({**values, **place}, is_early=_has_not_validated(run))
        return self._files.take(new, stem, taken)

    def _look(self, run: FitRun, values: Mapping[str, float], after_epoch: bool) -> tuple[bool, float | None]:
        """(whether there is something to rank by, the value)."""
        is_elsewhere = run.validation is not None and not run.validates and self._metric not in run.fresh_metrics
        if after_epoch and is_elsewhere:
            return False, None  # it is measured in other epochs
        if self._metric in values:
            return True, float(values[self._metric])
        if _has_not_validated(run):
            return False, None
        if self._is_asked_for:
            raise UnknownNameError("metric to monitor", self._metric, sorted(values))
        return True, None

    def _say_once(self, run: FitRun, score: float) -> None:
        if not self._has_said:
            self._has_said = True
            self._say(f"epoch {run.epoch}: {self._metric} is {score}, which is never the best (said once)")


def _has_not_validated(run: FitRun) -> bool:
    """Whether validation is still to come, so that what it measures is unknown."""
    return run.validation is not None and not run.validation.samples_seen
