"""A fit without epochs: one pass over the frozen part of a module, then a closed-form head is fitted on its features.

The loop in loop.py treats such a run as any other: the step of a batch collects features and has no loss, there is no
optimizer, and the head is fitted where an epoch's batches end. Validation, logs and checkpoints follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.weight_averaging import AveragingCallback
from flashtask.trainer.features import rows_of_all
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.module import Module

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["SOLVED", "ClosedFormFit", "fits_in_closed_form", "refuse_gradients", "refuse_tuning"]

#: Arguments of a trainer that say how gradient steps are taken -> their defaults.
_OF_STEPS = {
    "max_steps": -1,
    "min_epochs": None,
    "min_steps": None,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
}
#: Why a run with a closed-form head ends; checkpoints hold it.
SOLVED = "the head has been solved"


def fits_in_closed_form(module: Module, finetuning: Finetuning | None) -> bool:
    """Whether the head is solved: it can be, and no phase of the strategy trains anything else."""
    head = module.head_to_solve()
    if not callable(getattr(head, "solve", None)) or finetuning is None:
        return False
    return all(phase.train.is_head_only for phase in finetuning.phases)


def refuse_gradients(module: Module, finetuning: Finetuning | None) -> None:
    """Refuse to train a head by gradient steps that can only be solved.

    Raises:
        UsageError: with the strategy to take.
    """
    head = module.head_to_solve()
    if not getattr(head, "requires_solving", False) or fits_in_closed_form(module, finetuning):
        return
    kind = head.__name__ if isinstance(head, type) else type(head).__name__
    given = "a fit without a finetuning strategy" if finetuning is None else f"the strategy {finetuning.name!r}"
    raise UsageError(
        f"{kind} is solved on the features of a frozen backbone, and {given} trains",
        why="this head is found in closed form or by its own solver, not by gradient steps with the backbone",
        fix='strategy="freeze", or a head that is trained: head="linear"',
    )


def refuse_tuning(module: Module, finetuning: Finetuning | None) -> None:
    """Refuse to tune a closed-form head, which has neither a learning rate nor a step whose memory could be measured.

    Raises:
        UsageError: the head would be solved.
    """
    refuse_gradients(module, finetuning)
    if fits_in_closed_form(module, finetuning):
        raise UsageError(
            "there is nothing to tune: the head is solved in one pass",
            why="no optimizer takes a step, so no learning rate is used",
            fix="leave the learning rate and the batch size as they are, or take another head",
        )


class ClosedFormFit:
    """The part of a run that replaces training where the head is solved.

    Args:
        run: a fit run whose data is set up and whose strategy freezes the backbone.

    Raises:
        UsageError: the module offers no features, the data is augmented, or a callback averages weights.
    """

    def __init__(self, run: FitRun) -> None:
        self.run, self.module = run, run.module
        #: of all batches so far, on the CPU
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []
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
                why="one random crop of an image does not represent it",
                fix='leave augment out, or augment="none"',
            )
        if any(isinstance(one, AveragingCallback) for one in run.callbacks):
            raise UsageError("there are no steps whose weights could be averaged: the head is solved", fix="drop it")

    def prepare(self) -> None:
        """One pass over every sample, without optimizers.

        Raises:
            UsageError: the data has a sampler.
        """
        run = self.run
        of_trainer = [name for name, default in _OF_STEPS.items() if getattr(run.trainer, name) != default]
        if run.trainer.max_epochs not in (None, 1, self.module.default_max_epochs):
            of_trainer = ["max_epochs", *of_trainer]
        if unused := [*self.module.unused_by_solving(), *of_trainer]:
            run.trainer.say(f"the head is solved in one pass, so these have no effect on it: {', '.join(unused)}")
        run.replace_training(self)
        if run.ordered is not None:
            if run.ordered.sampler is not None:
                raise UsageError(
                    "a sampler draws the training samples, and a head that is solved sees each of them once",
                    why="samples that are drawn twice make its penalty and its probabilities wrong",
                    fix='leave sampler out; head_options={"balanced": True} weighs the classes alike',
                )
            run.ordered.drop_last = False  # a sample that is left out of an epoch has its turn in the next

    @torch.no_grad()
    def step(self, batch: Any, batch_idx: int) -> None:
        """Collect the features of a batch, which is on the device; there is no loss.

        Raises:
            UsageError: `frozen_features` gave no features and targets of the same number of samples.
        """
        if not self.run.batch_size:
            return  # samples that only fill a step are another process's own
        self.module.eval()
        given = self.module.frozen_features(batch)
        if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(one, Tensor) for one in given)):
            raise self._wrong(f"gave {type(given).__name__}")
        features, targets = given
        if not features.ndim or features.shape[:1] != targets.shape[:1]:
            raise self._wrong(f"gave features {tuple(features.shape)} and targets {tuple(targets.shape)}")
        self._features.append(features.detach().to("cpu", torch.float32))
        self._targets.append(targets.detach().to("cpu"))

    def _wrong(self, what: str) -> UsageError:
        return UsageError(
            f"{type(self.module).__name__}.frozen_features {what}",
            why="features and targets of every sample of the batch are needed",
            fix="return self.backbone(inputs), targets",
        )

    def finish(self) -> None:
        """Solve, after the pass.

        Raises:
            UsageError: it is incomplete: `max_time` was over, or a callback skipped the rest.
        """
        run = self.run
        if run.is_leaving or run.skip_epoch:
            raise UsageError(
                "the pass over the frozen part was ended before the features of all samples were there",
                why="a head that is solved on a part of the data would look like one that is solved on all of it",
                fix="a longer max_time" if run.is_leaving else "let on_train_batch_start not return -1",
            )
        line = self.module.solve_head(*self._collected())
        self._features, self._targets = [], []
        self._agree()
        if isinstance(line, str) and run.trainer.enable_model_summary:
            run.trainer.say(line)
        run.stop(SOLVED)

    def _collected(self) -> tuple[Tensor, Tensor]:
        """Features (N, ...) and targets (N, ...) of all processes, in the order of the data."""
        strategy = self.run.strategy
        sizes = strategy.gather([len(batch) for batch in self._features])
        kept = (torch.cat(batches) if batches else None for batches in (self._features, self._targets))
        features, targets = (_in_turn(rows_of_all(strategy, rows), sizes) for rows in kept)
        return features, targets

    def _agree(self) -> None:
        """Take the first process's head: every process solves the same problem, but rounding depends on threads."""
        head, strategy = self.module.head_to_solve(), self.run.strategy
        if strategy.world_size == 1 or not isinstance(head, nn.Module):
            return
        own = {name: value.cpu() for name, value in head.state_dict().items()} if strategy.global_rank == 0 else {}
        head.load_state_dict(strategy.gather(own)[0])

    def resume(self) -> None:
        """After a checkpoint was restored: the run is over, or the pass starts again, as no file holds features."""
        run = self.run
        if run.stop_reason == SOLVED or run.epoch:
            run.trainer.say("nothing left to do: the head has been solved")
        elif run.batch_idx:
            run.trainer.say("the pass over the frozen part starts again")
            run.begin_epoch_anew()


def _in_turn(by_process: Sequence[Tensor | None], sizes: Sequence[Sequence[int]]) -> Tensor:
    """The rows of the first batch of all processes, then those of the second, and so on: the order of the data."""
    batches = [
        () if rows is None else torch.split(rows, list(own)) for rows, own in zip(by_process, sizes, strict=True)
    ]
    return torch.cat([part for parts in zip_longest(*batches) for part in parts if part is not None])
