"""`GradientAccumulationScheduler`: how many batches make one optimizer step, by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["GradientAccumulationScheduler", "accumulation_by_epoch"]


def accumulation_by_epoch(given: int | Mapping[int, int]) -> Callable[[int], int]:
    """What `Trainer(accumulate_grad_batches=...)` means: epoch -> batches for one optimizer step.

    Raises:
        UsageError: an invalid number or dictionary.
    """
    if isinstance(given, Mapping):
        return GradientAccumulationScheduler(given).batches_for_a_step
    if not is_whole(given, least=1):
        raise UsageError(
            f"Trainer(accumulate_grad_batches={given!r}): a whole number of at least 1 or {{epoch: batches}} is needed",
            fix="accumulate_grad_batches=4, or accumulate_grad_batches={0: 1, 5: 4}",
        )
    return lambda epoch: given


class GradientAccumulationScheduler(Callback):
    """Changes the number of batches for one optimizer step from given epochs on.

    It is a function of the epoch alone, so a resume has nothing to restore.

    Args:
        scheduling: `{4: 2, 8: 4}` means one batch a step in epochs 0 to 3, two from epoch 4 on, four from epoch 8 on.

    Raises:
        UsageError: epochs that are not whole numbers of at least 0, batches that are not whole numbers of at least 1,
            or a `Trainer(accumulate_grad_batches=...)` beside it.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        example = "GradientAccumulationScheduler({4: 2, 8: 4})"
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise UsageError(f"scheduling={scheduling!r}: epochs and their batches a step are needed", fix=example)
        for epoch, batches in scheduling.items():
            if not is_whole(epoch, least=0):
                raise UsageError(f"scheduling: epoch {epoch!r} is not a whole number of at least 0", fix=example)
            if not is_whole(batches, least=1):
                raise UsageError(f"scheduling: {batches!r} batches a step from epoch {epoch} on", fix=example)
        self.scheduling = dict(sorted(scheduling.items()))

    def batches_for_a_step(self, epoch: int) -> int:
        """How many batches make one optimizer step in an epoch (counted from 0)."""
        return next((batches for start, batches in reversed(self.scheduling.items()) if start <= epoch), 1)

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Set it on the run before the optimizers are made; two contradicting settings are refused."""
        if stage != "fit":
            return
        given = trainer.accumulate_grad_batches
        if given != 1:
            raise UsageError(
                f"accumulate_grad_batches={given} contradicts a GradientAccumulationScheduler",
                fix="drop one of them",
            )
        trainer.current_fit.accumulate(self.batches_for_a_step)
