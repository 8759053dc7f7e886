"""`ModelCheckpoint`: when the checkpoints of a run are written, and which of them are kept."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import DivergedError, FlashtaskError, StorageError, UnknownNameError, UsageError
from flashtask.core.files import PathLike
from flashtask.core.metric_value import MetricValue
from flashtask.core.number_checks import is_whole
from flashtask.trainer.callbacks.callback import Callback, state_name
from flashtask.trainer.callbacks.timing import Duration, read_duration
from flashtask.trainer.checkpoints.content import checkpoint_content, weights_only
from flashtask.trainer.checkpoints.kept_files import (
    BestFiles,
    CheckpointFolder,
    NameTemplate,
    SavedFile,
    is_last_name,
)
from flashtask.trainer.metric_order import best_mode, tie_break

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["Frequency", "ModelCheckpoint"]

#: what may be monitored besides metrics: of later places there is more
_PLACE = ("epoch", "step")


class ModelCheckpoint(Callback):
    """Writes the checkpoints of a fit: `last.ckpt`, from which it can be continued, and the best by a metric.

    Without arguments both are written after every epoch, and after every validation inside one, into the run folder:
    `last.ckpt` always, `best.ckpt` if that was the best so far. Equal scores are decided by the lower `val_loss`, then
    the older stays; NaN and infinity are never best. Where the module's own metric is not measured (there is no
    validation), the newest is best. Several of these callbacks may be used at once; the first is
    `trainer.checkpoint_callback`.

    Args:
        dirpath: folder to write to, relative to the trainer's `default_root_dir`; None means the run folder. From the
            start of a fit on, the attribute is the absolute path of the folder.
        filename: template for the names of the best files, such as `"{epoch:02d}-{val_loss:.2f}"`; `epoch`, `step` and
            every logged metric can be used in it. None means `best`, or `{epoch}-{step}` if several are kept; a second
            callback without a name adds `-2`.
        monitor: the metric to rank by, or `epoch` or `step` to keep the newest; None means the module's own.
        verbose: print what was written.
        save_last: True writes `last.ckpt` at each look and at the end of the fit. `"link"` does too, but where one of
            the best files is written as well, `last.ckpt` is a second name (a hard link) of it: half the writing, but
            damage to one is damage to both. False writes it only when a signal stops the run.
        save_top_k: how many of the best are kept; -1 for all that are looked at, 0 for none.
        save_weights_only: the best files have no state that only a resume needs; `last.ckpt` always has.
        mode: `min` (less is better) or `max`; None means the module's own for the module's own metric, and for any
            other what its name implies (`val_f1`: more, `val_loss`: less).
        auto_insert_metric_name: write `epoch=02` for `{epoch:02d}`, else `02`.
        every_n_train_steps: look after every so many optimizer steps, and rank by the values that are known then; 0
            never does.
        every_n_steps: another name for it.
        train_time_interval: look at the first step after so much time: `"00:01:00:00"`, a timedelta, or a dictionary
            such as `{"minutes": 30}`.
        every_n_epochs: look only after every so many epochs. The others are not written and, however good they are,
            cannot be best. None means 1, or never if steps or time are given; so does 0 in any case.
        save_on_train_epoch_end: False looks only where validation took place, True only at the ends of epochs; None
            looks at both.
        save_on_exception: write `last.ckpt` when an error ends the fit between two steps, unless the loss diverged.

    Attributes:
        best_model_path: the best file, or empty, as the other two.
        kth_best_model_path: the file that would have to go for a better one; empty while there is room.
        last_model_path: the newest `last.ckpt`.
        best_model_score: the monitored value of the best file, or None.
        best_k_models: the path of each file that is kept, best first, and its score.
        current_score: the value that was looked at last.

    Raises:
        UsageError: an invalid argument; `mode` is missing and the name of the metric does not imply it; two
            of these callbacks would write the same files.
        UnknownNameError: nothing of the monitored name, or of a name in the template, was logged.
        OutputError: the folder cannot be made.
        StorageError: a file cannot be written; those that were there before still are.
    """

    comes_last = True

    def __init__(
        self,
        dirpath: PathLike | None = None,
        filename: str | None = None,
        *,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str = True,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str | None = None,
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        every_n_steps: int | None = None,
        train_time_interval: Duration | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
    ) -> None:
        _check_arguments(locals())
        #: the folder that was asked for; None means the run folder
        self.given_dirpath = dirpath
        self.filename, self.monitor, self.mode = filename, monitor, mode
        self.verbose, self.save_last, self.save_top_k = verbose, save_last, save_top_k
        self.save_weights_only, self.save_on_exception = save_weights_only, save_on_exception
        self.frequency = Frequency(
            every_n_steps if every_n_train_steps is None else every_n_train_steps,
            train_time_interval,
            every_n_epochs,
            save_on_train_epoch_end,
        )
        self.template = self._given_template = _template_of(filename, save_top_k, auto_insert_metric_name)
        self._insert_names = auto_insert_metric_name
        self._forget()

    def _forget(self) -> None:
        #: the files that are kept, of the fit that runs or ran last
        self.best = BestFiles(Path(), 0, "max")
        self.last_model_path = ""
        self.current_score: float | None = None
        #: all callbacks of this kind in the fit; the first of them writes for all
        self._together: list[ModelCheckpoint] = [self]
        self._number = 0
        self._step_seen = 0
        #: (epoch, batch, step) where the run last was between two steps with all hooks called; None: it is not
        self._resting_place: tuple[int, int, int] | None = None
        self._warned_of_score = False

    # ---- which files there are

    @property
    def dirpath(self) -> PathLike | None:
        """The folder of the files; before a fit the one that was asked for."""
        folder = self.best.folder
        return str(folder) if folder != Path() else self.given_dirpath

    @dirpath.setter
    def dirpath(self, dirpath: PathLike | None) -> None:
        self.given_dirpath = dirpath
        self.best = BestFiles(Path(), 0, "max")

    @property
    def best_model_path(self) -> str:
        """The best file, or an empty text."""
        return str(self.best.folder / self.best.best.name) if self.best.best is not None else ""

    @property
    def best_model_score(self) -> float | None:
        """The monitored value of the best file."""
        best = self.best.best
        return None if best is None or best.score is None else MetricValue(best.score)

    best_score = best_model_score

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best file, counted from 0; None before there is one."""
        return self.best.best.epoch if self.best.best is not None else None

    @property
    def best_metrics(self) -> dict[str, float]:
        """All metrics of the best file's epoch, by name."""
        return dict(self.best.best.metrics) if self.best.best is not None else {}

    @property
    def best_k_models(self) -> dict[str, float | None]:
        """The path of each file that is kept, best first, and its score."""
        return {str(self.best.folder / file.name): file.score for file in self.best.files}

    @property
    def kth_best_model_path(self) -> str:
        """The file that would have to go for a better one; empty while there is room."""
        is_full = 0 < self.save_top_k <= len(self.best.files)
        return str(self.best.folder / self.best.files[-1].name) if is_full else ""

    @property
    def last_file(self) -> Path:
        """Where `last.ckpt` of this fit is, written or not; callbacks that share a folder share it."""
        first = next(one for one in self._together if one.best.folder == self.best.folder)
        return first._folder.path / first._folder.last_name

    # ---- the beginning of a fit

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Settle where checkpoints go and what ranks them, and forget those of an earlier fit."""
        if stage != "fit":
            return
        self._forget()
        self._together = [one for one in trainer.current_fit.callbacks if isinstance(one, ModelCheckpoint)]
        self._number = [one for one in self._together if one._own_key == self._own_key].index(self)
        self._folder = CheckpointFolder(trainer, self.given_dirpath)
        #: `last.ckpt` may be a link
        self.links = self.save_last == "link"
        #: the name of the metric that ranks the files
        self.metric: str = self.monitor or module.monitor
        mode = self.mode or ("max" if self.metric in _PLACE else None)
        mode = best_mode("ModelCheckpoint", self.metric, mode, module)
        self._require_own_names()
        may_replace = partial(self._folder.may_replace, is_fixed=not self.template.fields)
        self.best = BestFiles(self._folder.path, self.save_top_k, mode, may_replace)
        self._say = trainer.say

    def _require_own_names(self) -> None:
        """Two callbacks must not write over each other's files: where no name was given, the second is `best-2`."""
        if self._together.count(self) > 1:
            raise UsageError("a ModelCheckpoint is twice in the list of callbacks", fix="drop one of the two")
        beside = [
            one.template.text
            for one in self._together[: self._together.index(self)]
            if one.best.folder == self._folder.path and one.save_top_k and self.save_top_k
        ]
        self.template = self._given_template
        if self.template.text in beside:
            if self.filename is not None:
                raise UsageError(
                    f"two ModelCheckpoints write {self.template.text}.ckpt in {self._folder.path}",
                    fix='another name or folder for one of them: ModelCheckpoint(filename="{epoch}-{val_loss:.2f}")',
                )
            numbered = (f"{self.template.text}-{number}" for number in count(2))
            self.template = NameTemplate(next(name for name in numbered if name not in beside), self._insert_names)

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock of `train_time_interval`."""
        self._step_seen = trainer.current_fit.global_step
        self.frequency.start()
        name = self.last_file.name
        if self.save_last and name != "last.ckpt" and not self._folder.is_ours:
            trainer.say(f"{self._folder.path} holds checkpoints of another run; the newest of this one is {name}")

    # ---- when checkpoints are written; the first of several callbacks does it for all

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step: write what is due by steps or time."""
        run = trainer.current_fit
        self._note_place(run)
        if self is not self._together[0] or run.global_step == self._step_seen:
            return
        self._step_seen = run.global_step
        if due := [one for one in self._together if one.frequency.is_due_after_step(run)]:
            _save_together(trainer, due, [], {**run.metrics, **run.results.callback_values()}, None)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Note that the run is between two steps."""
        self._note_place(trainer.current_fit)

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Note that it is not, until the epoch's values have been collected."""
        self._resting_place = None

    def on_validated(self, trainer: Trainer, module: Module) -> None:
        """After a validation inside an epoch: write what is due."""
        run = trainer.current_fit
        self._note_place(run)
        due = [one for one in self._together if one.frequency.is_due_after_validation(run)]
        if due and self is self._together[0]:
            values = {**run.metrics, **run.results.callback_values()}
            _save_together(trainer, due, [], values, run.validations[-1])

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """After an epoch: write what is due, and `last.ckpt` where the fit ends."""
        run = trainer.current_fit
        self._note_place(run)
        if self is self._together[0]:
            due = [one for one in self._together if one.frequency.is_due_after_epoch(run)]
            ending = [one for one in self._together if one not in due] if _is_last_epoch(run) else []
            if due or ending:
                _save_together(trainer, due, ending, run.metrics, run.history[-1])

    def write_last(self, trainer: Trainer) -> str:
        """Write `last.ckpt` with the present state of the run, also in the middle of an epoch; its path."""
        _write_last_files(trainer, [self], checkpoint_content(trainer.current_fit))
        return self.last_model_path

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """Write the present state, if that is wanted and can be continued; after a signal the engine writes it."""
        run = trainer.current_fit
        # After a failed write another would fail too, and diverged weights must not replace good ones.
        is_wanted = isinstance(exception, Exception) and not isinstance(exception, (DivergedError, StorageError))
        if not (self.save_on_exception and is_wanted and run.samples_seen) or run.done:
            return
        if run.strategy.world_size > 1:  # the other processes are elsewhere in the run, or gone
            trainer.say(f"{self.last_file} stays as it was: an error in one of several processes")
            return
        run.abandon_evaluation()
        # At the end of an epoch some hooks may have been called and others not.
        is_between_steps = not run.group_is_open and run.current_hook != "train_epoch_end"
        try:
            if not is_between_steps or self._resting_place != _place_of(run):
                raise UsageError("the error came in the middle of a step or of the end of an epoch")
            trainer.say(f"stopped by {type(exception).__name__}; continue from {self.write_last(trainer)}")
        except FlashtaskError as error:
            trainer.say(f"{self.last_file} stays as it was: {error.what}")

    def _note_place(self, run: FitRun) -> None:
        """Remember that the run is between two steps, unless it is in the middle of an accumulation group."""
        if not run.group_is_open:
            self._resting_place = _place_of(run)

    # ---- which of them are kept

    def _take(self, run: FitRun, values: Mapping[str, float], row: Mapping[str, float] | None) -> SavedFile | None:
        """The file to write among the best, which counts as kept from now on; None if it would not be one of them.

        Raises:
            UnknownNameError: nothing of the metric's name, or of a name in the template, was logged.
        """
        if not self.save_top_k:
            return None
        place = {"epoch": run.epoch, "step": run.global_step}
        values = {**values, **place}
        is_ranked, self.current_score = self._score(run, values, after_step=row is None)
        if self.current_score is not None and not math.isfinite(self.current_score):
            is_ranked = False
            if not self._warned_of_score:
                self._warned_of_score = True
                what = f"{self.metric} is {self.current_score}, which is never the best"
                self._say(f"epoch {run.epoch}: {what} (reported once)")
        if not is_ranked and self.save_top_k > 0:
            return None
        metrics = dict(values if row is None else row)
        new = SavedFile(self.current_score, tie_break(values), run.epoch, run.global_step, metrics)
        if not self.best.wants(new):
            return None
        stem = self.template.fill(values, is_early=_has_not_validated(run))
        others = [one.best for one in self._together if one is not self and one.best.folder == self.best.folder]
        return self.best.take(new, stem, [file.name for best in others for file in best.files])

    def _score(self, run: FitRun, values: Mapping[str, float], *, after_step: bool) -> tuple[bool, float | None]:
        """(whether this place can be ranked, the value of the metric); without a value a newer place is better."""
        if self.metric in _PLACE:
            return True, float(values[self.metric])
        # A value that was not measured here does not describe the present weights.
        is_closed = run.epoch_is_over and run.has_validated
        if not after_step and run.validation is not None and not is_closed and self.metric not in run.new_metrics:
            return False, None
        if self.metric in values:
            return True, float(values[self.metric])
        if _has_not_validated(run):
            return False, None
        if self.monitor is not None:
            raise UnknownNameError("metric to monitor", self.metric, sorted(values))
        return True, None

    # ---- what survives a resume

    @property
    def _own_key(self) -> str:
        given = {"monitor": self.monitor, "mode": self.mode, "filename": self.filename}
        given_as = [f"{name}={value}" for name, value in given.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*given_as, str(self.frequency)])})"

    @property
    def state_key(self) -> str:
        """One for each metric, name and frequency; equal ones are numbered."""
        return f"{self._own_key} {self._number + 1}" if self._number else self._own_key

    def state_dict(self) -> dict[str, Any]:
        """Which files are kept, and their scores."""
        return {**self.best.state_dict(), "last": self.last_file.name}

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """Report it if the run that is resumed did not have this callback."""
        known = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__name__)]
        own = state_name(self)
        if self.save_top_k and known and own not in known:
            trainer.say(f"the best so far is unknown to {own}: the checkpoint has {', '.join(known)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best so far; where a run is continued in another folder, its files are copied there."""
        resumed = self._folder.resumed
        assert resumed is not None
        if self.save_top_k and self.best.load_state_dict(state, resumed.parent, self._say):
            self._folder.is_ours = True
        self._folder.use_last_name(state["last"])
        self.last_model_path = str(self.last_file) if self.last_file.exists() else ""


# ---- when


class Frequency:
    """How often checkpoints are due: by each of these on its own, and after every epoch if none is given.

    Args:
        steps: after every so many optimizer steps; 0 for never.
        interval: at the first step after so much time, as `read_duration` takes it.
        epochs: after every so many epochs; 0 for never.
        at_epoch_ends: True only at the ends of epochs, False only where validation took place, None at both.

    Raises:
        UsageError: the interval is not a length of time.
    """

    def __init__(
        self, steps: int | None, interval: Duration | None, epochs: int | None, at_epoch_ends: bool | None
    ) -> None:
        self.steps, self.interval = steps, None if interval is None else read_duration(interval)
        self.epochs = 1 if (steps, interval, epochs) == (None, None, None) else epochs
        self._at_epoch_ends = at_epoch_ends
        self._last_due_at = 0.0

    def __str__(self) -> str:
        given = {"every_n_train_steps": self.steps, "train_time_interval": self.interval, "every_n_epochs": self.epochs}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    def start(self) -> None:
        """Start the clock of the interval."""
        self._last_due_at = time.monotonic()

    def is_due_after_step(self, run: FitRun) -> bool:
        """Whether a checkpoint is due after the step that was just taken; if by time, the clock starts again."""
        by_time = self.interval is not None and time.monotonic() - self._last_due_at >= self.interval.total_seconds()
        if by_time:
            self.start()
        return by_time or (self.steps is not None and _is_nth(run.global_step, self.steps))

    def is_due_after_epoch(self, run: FitRun) -> bool:
        """Whether a checkpoint is due after the epoch that is over."""
        if self._at_epoch_ends is False and not run.has_validated:
            return False
        return _is_nth(run.epoch + 1, self.epochs)

    def is_due_after_validation(self, run: FitRun) -> bool:
        """Whether a checkpoint is due after a validation inside an epoch."""
        return not self._at_epoch_ends and _is_nth(run.epoch + 1, self.epochs)


def _is_nth(number: int, every: int | None) -> bool:
    return every is not None and every > 0 and number % every == 0


def _is_last_epoch(run: FitRun) -> bool:
    """Whether no epoch follows the one that is over."""
    stops = run.is_leaving or (bool(run.stop_reason) and run.may_stop_after(run.epoch))
    return stops or run.out_of_steps or run.epoch + 1 >= (math.inf if run.max_epochs is None else run.max_epochs)


def _has_not_validated(run: FitRun) -> bool:
    """Whether validation is still to come, so that its metrics are unknown."""
    return run.validation is not None and not run.validation.samples_seen


def _place_of(run: FitRun) -> tuple[int, int, int]:
    return run.epoch, run.batch_idx, run.global_step


# ---- writing: for all callbacks together, so that each file knows what the others keep


def _save_together(
    trainer: Trainer,
    due: Sequence[ModelCheckpoint],
    ending: Sequence[ModelCheckpoint],
    values: Mapping[str, float],
    row: Mapping[str, float] | None,
) -> None:
    """Write the best files first, then the last; then remove what they push out.

    After a failure, or a kill, at any point the files that were kept before are there, and nothing counts as kept that
    has not been written.

    Args:
        trainer: whose fit it is.
        due: the callbacks whose checkpoints are due.
        ending: further ones, which write `last.ckpt` because the fit ends here.
        values: what was measured so far.
        row: of the log, for the epoch or the validation that is over; None after a step.
    """
    run, lasting = trainer.current_fit, [one for one in (*due, *ending) if one.save_last]
    trainer.require_own_folder()
    try:
        found = {one: one._take(run, values, row) for one in due}
    except BaseException as error:
        _undo(due)
        if isinstance(error, UnknownNameError):
            # The training so far is not lost: the run can be continued once the name is corrected.
            _write_last_files(trainer, lasting, checkpoint_content(run))
        raise
    planned = {one: file for one, file in found.items() if file is not None}
    try:
        content = checkpoint_content(run)
        for one, file in planned.items():
            if trainer.is_global_zero:
                path = one.best.folder / file.name
                write_checkpoint(path, weights_only(content) if one.save_weights_only else content)
            one.best.keep()
    except BaseException:
        _undo(due)
        raise
    _write_last_files(trainer, lasting, content, planned)
    for one in due:
        if trainer.is_global_zero:
            one.best.remove_leaving(trainer.say)
        if one.verbose:
            trainer.say(_report(run, one, planned.get(one)))


def _undo(callbacks: Iterable[ModelCheckpoint]) -> None:
    for one in callbacks:
        one.best.undo()


def _write_last_files(
    trainer: Trainer,
    callbacks: Iterable[ModelCheckpoint],
    content: dict[str, Any],
    planned: Mapping[ModelCheckpoint, SavedFile] | None = None,
) -> None:
    """Write the `last.ckpt` of callbacks, each file once; where only links are wanted, link what was just written."""
    by_path: dict[Path, list[ModelCheckpoint]] = {}
    for one in callbacks:
        by_path.setdefault(one.last_file, []).append(one)
    for path, asking in by_path.items():
        written = [one.best.folder / file.name for one, file in (planned or {}).items() if one in asking]
        may_link = bool(written) and all(one.links for one in asking)
        if trainer.is_global_zero and not (may_link and _link(written[0], path, asking, trainer.say)):
            write_checkpoint(path, content)
        for one in asking:
            one.last_model_path = str(path)
    trainer.strategy.barrier("checkpoint")


def _link(source: Path, path: Path, asking: Iterable[ModelCheckpoint], say: Callable[[str], None]) -> bool:
    """Give a file a second name, in one step; a failure is reported, and linking is not tried again."""
    beside = path.with_name(f".{path.name}.link")
    try:
        beside.unlink(missing_ok=True)
        os.link(source, beside)
        os.replace(beside, path)
        beside.unlink(missing_ok=True)  # it is still there if both were names of one file already
    except OSError as error:
        say(f"{path} cannot be a link ({error.strerror}) and is written as a file of its own")
        for one in asking:
            one.links = False
        return False
    return True


def _report(run: FitRun, one: ModelCheckpoint, file: SavedFile | None) -> str:
    place = f"epoch {run.epoch}, step {run.global_step}"
    if file is None:
        return f"{place}: not among the best {one.save_top_k}" if one.save_top_k else f"{place}: looked at"
    score = "" if file.score is None else f", {one.metric} {file.score:.6g}"
    return f"{place}: wrote {one.best.folder / file.name}{score}"


# ---- arguments


#: (whether a value is valid, what is needed, an example)
_Rule = tuple[Callable[[Any], bool], str, str]
_SWITCH: _Rule = (lambda v: isinstance(v, bool), "True or False", "True")
_FREQUENCY: _Rule = (lambda v: v is None or is_whole(v, 0), "None or a whole number of at least 0", "5")
_RULES: dict[str, _Rule] = {
    "dirpath": (lambda v: v is None or isinstance(v, (str, os.PathLike)), "None or a path", '"checkpoints"'),
    "monitor": (lambda v: v is None or isinstance(v, str), "None or the name of a metric", '"val_loss"'),
    "mode": (lambda v: v in (None, "min", "max"), 'None, "min" or "max"', '"min"'),
    "save_last": (lambda v: isinstance(v, bool) or v == "link", 'True, False or "link"', "True"),
    "save_top_k": (lambda v: is_whole(v, -1), "a whole number from 0 on, or -1 for all", "3"),
    "every_n_train_steps": _FREQUENCY,
    "every_n_steps": _FREQUENCY,
    "every_n_epochs": _FREQUENCY,
    "save_on_train_epoch_end": (lambda v: v is None or isinstance(v, bool), "None, True or False", "False"),
    "verbose": _SWITCH,
    "save_weights_only": _SWITCH,
    "auto_insert_metric_name": _SWITCH,
    "save_on_exception": _SWITCH,
}


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Check every argument before anything is trained.

    Raises:
        UsageError: an invalid value, or two that contradict each other.
    """
    for name, (fits, needed, example) in _RULES.items():
        if not fits(given[name]):
            raise UsageError(f"ModelCheckpoint({name}={given[name]!r}): {needed} is needed", fix=f"{name}={example}")
    if given["every_n_steps"] is not None and given["every_n_train_steps"] is not None:
        raise UsageError("every_n_steps and every_n_train_steps are one argument", fix="drop every_n_steps")
    if given["save_last"] == "link" and given["save_weights_only"]:
        raise UsageError(
            'save_last="link" contradicts save_weights_only=True',
            why="last.ckpt would be a file that cannot be resumed",
            fix="save_last=True",
        )


def _template_of(filename: str | None, save_top_k: int, insert_names: bool) -> NameTemplate:
    """The template for names; without one `best`, or `{epoch}-{step}` where several files are kept.

    Raises:
        UsageError: it is not a valid name, or it is the name of the newest file.
    """
    default = "best" if save_top_k in (0, 1) else "{epoch}-{step}"
    template = NameTemplate(default if filename is None else filename, insert_names)
    if not template.fields and is_last_name(f"{template.text}.ckpt"):
        raise UsageError(f"filename={filename!r} is the name of the newest file", fix='filename="best"')
    return template
