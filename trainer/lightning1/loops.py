"""Loops as objects, in the manner of Lightning 1.x: `trainer.fit_loop = MyLoop()`, `replace`, `connect`.

An adapter over loop.py, whose functions it calls for everything that has an order. The tree is made when it is first
used; until something in it is replaced, a trainer runs loop.py itself and pays nothing. The loops of a fit are

    FitLoop                       an epoch after the other
      TrainingEpochLoop             a group of batches after the other, and validation
        TrainingBatchLoop             one of the two below
          OptimizerLoop                 a step of each optimizer
          ManualOptimization            a step of the module's own
        EvaluationLoop                a pass over each loader
          EvaluationEpochLoop           a batch after the other
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.trainer.loop import Hooks
from flashtask.trainer.signals import RunInterruptedError

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.trainer import Trainer

__all__ = [
    "EvaluationEpochLoop",
    "EvaluationLoop",
    "FitLoop",
    "Loop",
    "LoopTree",
    "ManualOptimization",
    "OptimizerLoop",
    "PredictionLoop",
    "TrainingBatchLoop",
    "TrainingEpochLoop",
    "TreeLoop",
]


class Loop:
    """Base of loops: at least `done` and `advance` must be written.

    A loop that is an attribute of another is its child; all of a tree know the same `trainer`.
    """

    _trainer: Any = None

    @property
    def trainer(self) -> Any:
        """The trainer that the loop belongs to, as in Lightning."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer) -> None:
        self.__dict__["_trainer"] = trainer
        for child in self.children().values():
            child.trainer = trainer

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Loop):
            value.trainer = self._trainer

    def children(self) -> dict[str, Loop]:
        """The loops below this one, by the names they are replaced by."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Loop)}

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        raise UsageError(f"{type(self).__name__} has no `done`", fix="@property\n  def done(self) -> bool: ...")

    def advance(self, *arguments: Any) -> None:
        """One turn of the loop; StopIteration ends it."""
        raise UsageError(f"{type(self).__name__} has no `advance`", fix="def advance(self): ...")

    def on_run_start(self, *arguments: Any) -> None:
        """Before the first turn, with the arguments of `run`."""

    def on_advance_start(self, *arguments: Any) -> None:
        """Before each turn, with the arguments of `run`."""

    def on_advance_end(self) -> None:
        """After each turn that did not end the loop."""

    def on_run_end(self) -> Any:
        """After the last turn; what it returns, `run` returns."""

    def run(self, *arguments: Any) -> Any:
        """Turn after turn until it is done; the arguments are given to every turn."""
        self.on_run_start(*arguments)
        while not self.done:
            self._stop_if_asked_to()
            try:
                self.on_advance_start(*arguments)
                self.advance(*arguments)
                self.on_advance_end()
            except StopIteration:
                break
        return self.on_run_end()

    def connect(self, **loops: Loop) -> None:
        """Put loops in the places of children: `fit_loop.connect(epoch_loop=mine)`.

        Raises:
            UnknownNameError: the loop has no such child.
            UsageError: it is a class, or no loop.
        """
        for name, loop in loops.items():
            if name not in self.children():
                raise UnknownNameError(f"loop below {type(self).__name__}", name, self.children())
            if not isinstance(loop, Loop):
                called = getattr(loop, "__name__", type(loop).__name__)
                raise UsageError(f"connect({name}=...) takes a loop, not {called}", fix=f"replace({name}={called})")
            setattr(self, name, loop)

    def replace(self, **loops: Any) -> None:
        """Put others in the places of children, which take over the loops below: `replace(epoch_loop=MyEpochLoop)`.

        Args:
            loops: by the name of the child, a class or a loop.

        Raises:
            UnknownNameError: the loop has no such child.
            UsageError: it is not a loop.
        """
        for name, given in loops.items():
            loop = given() if isinstance(given, type) else given
            before = self.children().get(name)
            self.connect(**{name: loop})
            for kept, child in before.children().items() if before is not None else ():
                setattr(loop, kept, child)

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call a hook of callbacks and module (`on_<hook>`)."""
        try:
            self.trainer.active_run.notify(hook, *arguments)
        except StopIteration as error:  # it would end the loop that tells
            raise RuntimeError(f"on_{hook} raised StopIteration") from error

    def go_through(self, hooks: Hooks) -> None:
        """Go through a part of loop.py, calling each of its hooks."""
        with closing(hooks):
            for hook in hooks:
                self.tell(*hook)

    def _stop_if_asked_to(self) -> None:
        active = self.trainer.active_run if self.trainer is not None else None
        fit = getattr(active, "parent", active)  # an evaluation asks the fit that it nests in, if there is one
        if fit is not None and fit.interrupted_by is not None and not fit.group_is_open:
            raise RunInterruptedError(fit.interrupted_by)


class FitLoop(Loop):
    """Epochs until the run is done."""

    def __init__(self) -> None:
        self.epoch_loop: Loop = TrainingEpochLoop()

    @property
    def done(self) -> bool:
        """Whether no further epoch is wanted."""
        return bool(self.trainer.fit_run.done)

    def on_run_start(self, *arguments: Any) -> None:
        """Start, and look at a few batches of validation."""
        self.go_through(self.trainer.loops.begin_fit(self.trainer.fit_run))

    def advance(self, *arguments: Any) -> None:
        """Run one epoch by the loop below, `epoch_loop`."""
        self.epoch_loop.run()

    def on_run_end(self) -> Any:
        """The hooks of the end of training and of the fit."""
        self.go_through(self.trainer.loops.end_fit(self.trainer.fit_run))


class _Reading(Loop):
    """A loop over an iterator, which is released at the end, also after an error."""

    _source: Iterator[Any] = iter(())
    #: what the next turn works on, once `done` has been read
    _upcoming: tuple[Any, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the iterator has nothing left; what it gives is kept for the next turn."""
        if not self._upcoming:
            self._upcoming = tuple(islice(self._source, 1))
        return not self._upcoming

    def _next(self) -> Any:
        """What this turn works on.

        Raises:
            StopIteration: nothing is left.
        """
        if self.done:
            raise StopIteration
        (found,), self._upcoming = self._upcoming, ()
        return found

    def run(self, *arguments: Any) -> Any:
        """Turn after turn until the loader has nothing left."""
        try:
            return super().run(*arguments)
        finally:
            self._source, self._upcoming = iter(()), ()


class TrainingEpochLoop(_Reading):
    """One epoch: a step for each group of batches, and validation where it is due."""

    def __init__(self) -> None:
        self.batch_loop: Loop = TrainingBatchLoop()
        self.val_loop: Loop = EvaluationLoop()

    def connect(self, batch_loop: Loop | None = None, val_loop: Loop | None = None, **loops: Loop) -> None:
        """Put loops in the places of the two children."""
        given = {"batch_loop": batch_loop, "val_loop": val_loop}
        super().connect(**{name: loop for name, loop in given.items() if loop is not None}, **loops)

    def on_run_start(self, *arguments: Any) -> None:
        """Freeze what the epoch freezes, and continue where the run is in it."""
        run = self.trainer.fit_run
        self.go_through(self.trainer.loops.begin_epoch(run))
        self._source = self._groups(run)

    def _groups(self, run: FitRun) -> Iterator[list[Any]]:
        """The groups of the epoch; between two of them there may be a validation."""
        for stretch in run.stretches():
            yield from stretch
            if not run.epoch_is_over:
                self._validate(run)

    def _validate(self, run: FitRun) -> None:
        if run.validation is not None and run.validation_times.is_due:
            self.val_loop.run(run.validation)
            self.go_through(self.trainer.loops.look(run))

    def advance(self, *arguments: Any) -> None:
        """The next group: the batches of one optimizer step, which is one batch unless gradients are accumulated."""
        group = self._next()
        self.batch_loop.run(group, self.trainer.fit_run.batch_idx)

    def on_run_end(self) -> Any:
        """Validate, and go on to the next epoch."""
        run = self.trainer.fit_run
        self._validate(run)
        self.go_through(self.trainer.loops.end_epoch(run))


class _Once(Loop):
    """A loop of one turn."""

    def on_run_start(self, *arguments: Any) -> None:
        """Allow one turn."""
        self._is_done = False

    @property
    def done(self) -> bool:
        """After one turn."""
        return self._is_done

    def on_advance_end(self) -> None:
        """Count the turn."""
        self._is_done = True


class TrainingBatchLoop(_Once):
    """What is done with a group of batches, with automatic or manual optimization."""

    def __init__(self) -> None:
        self.optimizer_loop: Loop = OptimizerLoop()
        self.manual_loop: Loop = ManualOptimization()

    def advance(self, *arguments: Any) -> None:
        """Pass the group to the loop below that fits the module."""
        loop = self.optimizer_loop if self.trainer.fit_run.automatic else self.manual_loop
        loop.run(*arguments)


class OptimizerLoop(_Once):
    """A step of each optimizer from a group of batches."""

    def advance(self, *arguments: Any) -> None:
        """The step of loop.py; the arguments are the group and the number of its first batch."""
        self.go_through(self.trainer.loops.step(self.trainer.fit_run, arguments[0]))


class ManualOptimization(OptimizerLoop):
    """The same, where the module optimizes by itself."""


class EvaluationLoop(Loop):
    """One pass over the data of validation or test, a loader after the other."""

    def __init__(self) -> None:
        self.epoch_loop: Loop = EvaluationEpochLoop()
        self._number = 0

    @property
    def done(self) -> bool:
        """Whether the last loader has been gone through."""
        return self._number >= len(self.trainer.active_run.loaders)

    def on_run_start(self, *arguments: Any) -> None:
        """Eval mode; the argument is the evaluation run."""
        self._number = 0
        self.go_through(self.trainer.loops.begin_pass(arguments[0]))

    def advance(self, *arguments: Any) -> None:
        """The pass over one loader, by the loop below."""
        self.epoch_loop.run(arguments[0], self._number)

    def on_advance_end(self) -> None:
        """Go on to the loader with the next number."""
        self._number += 1

    def on_run_end(self) -> Any:
        """Compute the values of the pass, and put modes back."""
        self.go_through(self.trainer.loops.end_pass(self.trainer.active_run))


class PredictionLoop(EvaluationLoop):
    """The same for prediction."""


class EvaluationEpochLoop(_Reading):
    """One pass over the batches of one loader, without gradients."""

    def on_run_start(self, *arguments: Any) -> None:
        """Open the loader; the arguments are the evaluation run and the number of the loader."""
        run, number = arguments
        self._source = run.batches(number)

    def advance(self, *arguments: Any) -> None:
        """The next batch: one step, and the hooks around it."""
        run, number = arguments
        batch, batch_idx = self._next()
        # The generator turns a StopIteration of the module's step into an error; here it would end the loop.
        self.go_through(self.trainer.loops.measure(run, number, batch, batch_idx))


class TreeLoop:
    """An attribute of a trainer that is a loop of its tree."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Trainer, owner: type) -> Any:
        return self if trainer is None else getattr(trainer.loop_tree, self.name)

    def __set__(self, trainer: Trainer, loop: Any) -> None:
        setattr(trainer.loop_tree, self.name, loop)


def _shape(owner: Any) -> dict[str, Any]:
    """The classes of the loops below, by name, and what else was set on them."""
    own = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    return {name: (type(v), _shape(v)) if isinstance(v, Loop) else v for name, v in own.items()}


class LoopTree:
    """The loops of a trainer whose user has used one, called in place of `trainer.loops`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.fit_loop: Loop = FitLoop()
        self.validate_loop: Loop = EvaluationLoop()
        self.test_loop: Loop = EvaluationLoop()
        self.predict_loop: Loop = PredictionLoop()

    def __setattr__(self, name: str, value: Any) -> None:
        if name.endswith("_loop"):
            if not isinstance(value, Loop):
                raise UsageError(f"trainer.{name} takes a Loop, not {value!r}", fix=f"trainer.{name} = MyLoop()")
            value.trainer = self._trainer
        super().__setattr__(name, value)

    @property
    def is_changed(self) -> bool:
        """Whether a loop or an attribute of one was replaced."""
        return _shape(self) != _shape(LoopTree(self._trainer))

    def fit(self, run: FitRun) -> Hooks:
        """A fit by its loop; the loops call their hooks themselves."""
        self.fit_loop.trainer = self._trainer  # another trainer may have it too
        self.fit_loop.run()
        yield from ()

    def evaluate(self, run: FitRun) -> Hooks:
        """An evaluation by the loop of its stage."""
        loop: Loop = getattr(self, f"{run.stage}_loop")
        loop.trainer = self._trainer
        loop.run(run)
        yield from ()
