"""The page where training can be read: `fit`, `train`, `step` and `evaluate`.

Each is a generator that yields the hooks of a run as `(name, *arguments)`. `execute` runs them and calls
`on_<name>` of callbacks and module. State lives in the run, never here; no context (autocast, no_grad) is held across a
`yield`, because a hook may do anything.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.run import EvaluationRun

__all__ = ["Hooks", "Loops"]

Hooks = Generator[tuple[Any, ...], None, None]


class Loops:
    """The four functions of the engine, and their beginnings and ends, which loops as objects (lightning1/) call too.

    Replace one by subclassing: `trainer.loops = MyLoops()`.
    """

    def fit(self, run: FitRun) -> Hooks:
        """Epochs until the run is done."""
        yield from self.begin_fit(run)
        while not run.done:
            yield from self.train(run)
        yield from self.end_fit(run)

    def begin_fit(self, run: FitRun) -> Hooks:
        """Before the first epoch: a look at a few batches of validation."""
        yield ("fit_start",)
        if run.sanity is not None:
            yield ("sanity_check_start",)
            yield from self.evaluate(run.sanity)
            yield ("sanity_check_end",)
        yield ("train_start",)

    def end_fit(self, run: FitRun) -> Hooks:
        """After the last epoch."""
        yield ("train_end",)
        yield ("fit_end",)

    def train(self, run: FitRun) -> Hooks:
        """One epoch: a step for each group of batches, in stretches that validation follows."""
        yield from self.begin_epoch(run)
        for stretch in run.stretches():
            for group in stretch:
                yield from self.step(run, group)
            if run.validation is not None and run.validation_times.is_due:
                yield from self.evaluate(run.validation)
                yield from self.look(run)
        yield from self.end_epoch(run)

    def look(self, run: FitRun) -> Hooks:
        """After a validation inside an epoch; what was measured at its end is looked at when the epoch is closed."""
        if not run.epoch_is_over:
            run.close_validation()
            yield ("validated",)

    def begin_epoch(self, run: FitRun) -> Hooks:
        """Before the first step of an epoch."""
        run.start_epoch()
        yield ("train_epoch_start",)

    def end_epoch(self, run: FitRun) -> Hooks:
        """After the epoch's steps and its validation."""
        yield ("training_outputs", run.outputs)
        run.collect()
        yield ("train_epoch_end",)
        run.close_epoch()
        yield ("epoch_end",)
        run.end_epoch()

    def step(self, run: FitRun, group: list[Any]) -> Hooks:
        """One step of each optimizer from a group of batches; a loss counts by its share of the group's samples."""
        for share, batch, batch_idx in run.receive(group):
            yield ("train_batch_start", batch, batch_idx)
            if run.skip_epoch:
                return
            returned: list[Any] = []
            for optimizer, arguments in run.turns():
                with run.forward():
                    outputs = run.training_step(batch, batch_idx, *arguments)
                returned.append(outputs)
                loss = run.loss_of(outputs)
                if loss is not None:
                    loss = loss if share == 1 else loss * share
                    yield ("before_backward", loss)
                    run.precision.backward(loss)
                    yield ("after_backward",)
                if optimizer is not None and run.group_is_complete and run.has_gradients:
                    run.precision.unscale(optimizer)
                    yield ("before_optimizer_step", optimizer, run.turn)
                    run.clip_gradients(optimizer)
                    run.precision.step(optimizer)
                    yield ("before_zero_grad", optimizer)
                    run.zero_grad(optimizer)
            if run.group_is_complete:
                run.count_step()
            yield ("train_batch_end", run.keep(returned), batch, batch_idx)

    def evaluate(self, run: EvaluationRun) -> Hooks:
        """One pass over the data of validation, test or prediction, without gradients."""
        yield from self.begin_pass(run)
        for number in range(len(run.loaders)):
            for batch, batch_idx in run.batches(number):
                yield from self.measure(run, number, batch, batch_idx)
        yield from self.end_pass(run)

    def begin_pass(self, run: EvaluationRun) -> Hooks:
        """Before the first batch of a pass: eval mode."""
        run.begin()
        yield (f"{run.word}_start",)
        yield (f"{run.word}_epoch_start",)

    def measure(self, run: EvaluationRun, number: int, batch: Any, batch_idx: int) -> Hooks:
        """One batch of the loader with this number."""
        yield (f"{run.word}_batch_start", batch, batch_idx, number)
        with run.precision.inference():
            outputs = run.step(batch, batch_idx, number)
        run.keep(outputs, number)
        yield (f"{run.word}_batch_end", outputs, batch, batch_idx, number)

    def end_pass(self, run: EvaluationRun) -> Hooks:
        """After the last batch of a pass: its values are computed, and modes put back."""
        yield (f"{run.word}_outputs", run.outputs_of_pass)
        run.collect()
        yield (f"{run.word}_epoch_end", *run.predictions)
        run.close()
        yield (f"{run.word}_end",)
        run.end()
