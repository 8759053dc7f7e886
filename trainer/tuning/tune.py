"""`tune`: find a learning rate and a batch size on copies, then give them to the module and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.trainer.closed_form_fit import refuse_tuning
from flashtask.trainer.datamodule import DataModule
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.module import Module
from flashtask.trainer.tuning.batch_size_finder import batch_size_in, find_batch_size
from flashtask.trainer.tuning.batch_size_search import BatchSizeOptions, BatchSizeSearch
from flashtask.trainer.tuning.learning_rate_curve import LearningRateCurve, check_picture
from flashtask.trainer.tuning.learning_rate_finder import RangeTest, find_learning_rate, learning_rate_of
from flashtask.trainer.tuning.trials import require_one_process, trial

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["TuningResult", "tune"]

Options = TypeVar("Options", RangeTest, BatchSizeOptions)


@dataclass(frozen=True)
class TuningResult:
    """What `tune` found; what it was not asked for is None."""

    batch_size: BatchSizeSearch | None = None
    learning_rate: LearningRateCurve | None = None

    def __str__(self) -> str:
        return "\n".join(str(found) for found in (self.batch_size, self.learning_rate) if found is not None)


def tune(
    trainer: Trainer,
    module: Module,
    data: DataModule,
    *,
    finetuning: Finetuning | None = None,
    learning_rate: bool | str | Mapping[str, Any] = False,
    batch_size: bool | str | Mapping[str, Any] = False,
) -> TuningResult:
    """Find a batch size, then with it a learning rate, and give both to the module and its data.

    Nothing else changes: the search works on copies. If it fails, nothing changes at all.

    Args:
        trainer: whose settings the trial runs have.
        module: to tune.
        data: to train it on.
        finetuning: what is frozen: the rate is searched in the first stage, the batch size in that which trains most.
        learning_rate: True, the name of the attribute, or arguments of `RangeTest`.
        batch_size: True, `"power"`, `"binsearch"`, or arguments of `BatchSizeOptions`.

    Raises:
        UsageError: nothing or something unknown is asked for, there is no such number in the module or the data, or no
            learning rate makes the loss fall.
        OutOfMemoryError: not even small batches fit.
    """
    test = _options(
        RangeTest, "learning_rate", {"attribute": learning_rate} if isinstance(learning_rate, str) else learning_rate
    )
    sizes = _options(
        BatchSizeOptions, "batch_size", {"mode": batch_size} if isinstance(batch_size, str) else batch_size
    )
    if test is None and sizes is None:
        raise UsageError("tune was not asked for anything", fix="trainer.tune(model, ..., learning_rate=True)")
    # What cannot be given is refused before it is searched for.
    require_one_process(trainer, "tune looks for numbers")
    refuse_tuning(module, finetuning)
    rate = None if test is None else learning_rate_of(module, test.attribute)
    size = None if sizes is None else batch_size_in(module, data, sizes.attribute)
    if test is not None and test.picture is not None:
        check_picture(test.picture)
    found = None if sizes is None else _find_size(trainer, module, data, finetuning, sizes)
    sized = {} if sizes is None or found is None else {sizes.attribute: found.batch_size}
    curve = None if test is None else _find_rate(trainer, module, data, finetuning, test, sized)
    if size is not None and found is not None:
        size.give(found.batch_size)
    if rate is not None and curve is not None:
        rate.give(curve.suggestion)
    return TuningResult(found, curve)


def _find_size(
    trainer: Trainer, module: Module, data: DataModule, finetuning: Finetuning | None, options: BatchSizeOptions
) -> BatchSizeSearch:
    _say(trainer, "looking for a batch size: a few steps of training at small sizes")
    with trial(trainer, module, data) as copies:
        return find_batch_size(copies, options, finetuning)


def _find_rate(
    trainer: Trainer,
    module: Module,
    data: DataModule,
    finetuning: Finetuning | None,
    test: RangeTest,
    sized: Mapping[str, int],
) -> LearningRateCurve:
    _say(trainer, f"looking for a learning rate: {test.num_training} steps of training at growing rates")
    with trial(trainer, module, data) as copies:
        for name, batch_size in sized.items():
            batch_size_in(copies.module, copies.data, name).give(batch_size)
        curve = find_learning_rate(copies, test, finetuning)
    if test.picture is not None:
        curve.plot(test.picture)
    return curve


def _say(trainer: Trainer, line: str) -> None:
    if trainer.enable_progress_bar:
        trainer.say(line)


def _options(kind: type[Options], name: str, given: Any) -> Options | None:
    """The options that an argument of `tune` means, None if it means no."""
    if given is False or given is None:
        return None
    if given is True:
        return kind()
    if not isinstance(given, Mapping):
        raise UsageError(f"{name}={given!r}: True or a dictionary of options is needed", fix=f"{name}=True")
    known = [field.name for field in fields(kind)]
    for option in given:
        if option not in known:
            fix = did_you_mean(str(option), known) or f"choose from {', '.join(known)}"
            raise UsageError(f"{name}: there is no option {option!r}", fix=fix)
    return kind(**given)
