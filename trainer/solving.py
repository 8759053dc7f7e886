"""A fit without epochs: one pass over the frozen part, then the head is solved on the features.

The page in loop.py goes through such a run as through any other. A batch's step collects features and has no loss,
there is no optimizer, and where an epoch's batches end the head is solved; validation, logs and checkpoints follow.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.trainer.averaging.stochastic_weight_averaging import StochasticWeightAveraging
from flashtask.trainer.averaging.weight_averaging import WeightAveraging
from flashtask.trainer.features import FeaturePass
from flashtask.trainer.finetuning.phases import Finetuning
from flashtask.trainer.module import Module

__all__ = ["SOLVED", "Solving", "refuse_tuning", "require_solvable", "will_be_solved"]

#: Why a run with a solved head ends.
SOLVED = "the head has been solved"


def will_be_solved(module: Any, finetuning: Finetuning | None) -> bool:
    """Whether the head is solved: it can be, and no phase of the strategy trains anything else."""
    head = module.head_to_solve()
    if not callable(getattr(head, "solve", None)) or finetuning is None:
        return False
    return all(phase.train.is_head_only for phase in finetuning.phases)


def require_solvable(module: Any, finetuning: Finetuning | None) -> None:
    """Refuse to train by gradient a head for which that makes no sense.

    Raises:
        UsageError: with the strategy to take.
    """
    head = module.head_to_solve()
    if not getattr(head, "requires_solving", False) or will_be_solved(module, finetuning):
        return
    kind = head.__name__ if isinstance(head, type) else type(head).__name__
    given = "a fit without a finetuning strategy" if finetuning is None else f"the strategy {finetuning.name!r}"
    raise UsageError(
        f"{kind} is solved on the features of a frozen backbone, and {given} trains",
        why="this head is found in closed form or by its own solver, not by gradient steps with the backbone",
        fix='strategy="freeze", or a head that is trained: head="linear"',
    )


def refuse_tuning(module: Any, finetuning: Finetuning | None) -> None:
    """There is neither a learning rate nor a step whose memory a batch size decides where a head is solved.

    Raises:
        UsageError: the head would be solved.
    """
    require_solvable(module, finetuning)
    if will_be_solved(module, finetuning):
        raise UsageError(
            "there is nothing to tune: the head is solved in one pass",
            why="no optimizer takes a step, so no learning rate is used",
            fix="leave the learning rate and the batch size as they are, or take another head",
        )


class Solving:
    """What takes the place of training in a run whose head is solved.

    Args:
        run: a fit run whose module has met its data and whose strategy freezes.

    Raises:
        UsageError: the module offers no features, the data is augmented, or a callback averages weights.
    """

    def __init__(self, run: Any) -> None:
        self.run, self.module = run, run.module
        self._pass = FeaturePass(self.module)
        name = type(self.module).__name__
        if type(self.module).frozen_features is Module.frozen_features:
            raise UsageError(
                f"{name} has a head that is solved, and no frozen_features",
                why="the head is solved on what the frozen part gives for the training data",
                fix="def frozen_features(self, batch): inputs, targets = batch; return self.backbone(inputs), targets",
            )
        if run.data.augments_while_frozen:
            raise UsageError(
                "the training data is augmented, and a head that is solved sees each sample once, as it is",
                why="features of one random crop an image would stand for nothing",
                fix='leave augment out, or augment="none"',
            )
        if any(isinstance(one, (WeightAveraging, StochasticWeightAveraging)) for one in run.callbacks):
            raise UsageError("there are no steps whose weights could be averaged: the head is solved", fix="drop it")

    def prepare(self) -> None:
        """One pass over every sample, without optimizers."""
        run = self.run
        run.replace_training(self)
        if run.ordered is not None:
            run.ordered.drop_last = False  # a sample that is left out of an epoch has its turn in the next

    def step(self, batch: Any, batch_idx: int) -> None:
        """Collect a batch's features; there is no loss. A sample that only fills a step is another process's own."""
        if self.run.batch_size:
            self._pass.add(batch)

    def finish(self) -> None:
        """Solve, after the pass.

        Raises:
            UsageError: it is not whole: `max_time` was over, or a callback skipped the rest.
        """
        run = self.run
        if run.is_leaving or run.skip_epoch:
            raise UsageError(
                "the pass over the frozen part was ended before the features of all samples were there",
                why="a head that is solved on a part of the data would look like one that is solved on all of it",
                fix="a longer max_time" if run.is_leaving else "let on_train_batch_start not return -1",
            )
        said = self.module.solve_head(*self._pass.collected(run.strategy))
        self._pass = FeaturePass(self.module)  # the features are not needed any more
        self._agree()
        if isinstance(said, str) and run.trainer.enable_model_summary:
            run.trainer.say(said)
        run.stop(SOLVED)

    def _agree(self) -> None:
        """Every process has solved the same problem; rounding depends on threads, so the first one's head counts."""
        head, strategy = self.module.head_to_solve(), self.run.strategy
        if strategy.world_size == 1 or not isinstance(head, nn.Module):
            return
        own = {name: value.cpu() for name, value in head.state_dict().items()} if strategy.global_rank == 0 else None
        head.load_state_dict(strategy.gather(own)[0])

    def resume(self) -> None:
        """After a checkpoint was restored: nothing is left to do, or the pass begins anew; no file holds features."""
        run = self.run
        if run.stop_reason == SOLVED or run.epoch:
            run.trainer.say("nothing left to do: the head has been solved")
        elif run.batch_idx:
            run.trainer.say("the pass over the frozen part begins anew")
            run.begin_epoch_anew()
