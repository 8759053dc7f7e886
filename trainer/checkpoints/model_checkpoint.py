"""`ModelCheckpoint`: when the checkpoints of a run are written, and which of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import DivergedError, FlashtaskError, StorageError, UsageError
from flashtask.trainer.callbacks.base import Callback
from flashtask.trainer.checkpoints.best_by_metric import BestByMetric
from flashtask.trainer.checkpoints.best_files import BestFiles, SavedFile
from flashtask.trainer.checkpoints.content import checkpoint_content
from flashtask.trainer.checkpoints.folder import CheckpointFolder
from flashtask.trainer.checkpoints.moments import Frequency, RestingPlace, is_last_epoch
from flashtask.trainer.checkpoints.saving import save_together, write_last_files
from flashtask.trainer.checkpoints.settings import check_checkpoint_settings, template_of
from flashtask.trainer.metric_order import best_mode

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["ModelCheckpoint"]


class ModelCheckpoint(Callback):
    """Writes the checkpoints of a fit: `last.ckpt`, from which it can be continued, and the best by a metric.

    Without arguments both are written after every epoch, into the run folder: `last.ckpt` always, `best.ckpt` if the
    epoch was the best so far. Equal scores are decided by the lower `val_loss`, then the older stays; NaN and infinity
    are never best. Where the module's own metric is not measured (there is no validation), the newest is best. Several
    of these callbacks may be used at once; the first is `trainer.checkpoint_callback`.

    Args:
        dirpath: folder to write to, relative to the trainer's `default_root_dir`; None means the run folder.
        filename: template for the names of the best files, such as `"{epoch:02d}-{val_loss:.2f}"`; `epoch`, `step` and
            every logged metric can stand in it. None means `best`, or `{epoch}-{step}` if several are kept.
        monitor: the metric to rank by; None means the module's own.
        verbose: say after each look what was written.
        save_last: True writes `last.ckpt` at each look and at the end of the fit. `"link"` does too, but where one of
            the best files is written as well, `last.ckpt` is a second name (a hard link) of it: half the writing, but
            damage to one is damage to both. False writes it only when a signal stops the run.
        save_top_k: how many of the best are kept; -1 for all that are looked at, 0 for none.
        save_weights_only: the best files have no state that only a resume needs; `last.ckpt` always has.
        mode: `min` (less is better) or `max`; None means the module's own for the module's own metric, and for any
            other what its name says (`val_f1`: more, `val_loss`: less).
        auto_insert_metric_name: write `epoch=02` for `{epoch:02d}`, else `02`.
        every_n_train_steps: look after every so many optimizer steps, and rank by the values that are known then.
        every_n_steps: another name for it.
        train_time_interval: look at the first step after so much time: `"00:01:00:00"`, a timedelta, or a dictionary
            such as `{"minutes": 30}`.
        every_n_epochs: look only after every so many epochs. The others are not written and, however good they are,
            cannot be best. None means 1, or never if steps or time are given.
        save_on_train_epoch_end: False looks only at epochs that were validated.
        save_on_exception: write `last.ckpt` when an error ends the fit between two steps, unless the loss diverged.

    Attributes:
        best_model_path: the best file, or empty, as the other two.
        kth_best_model_path: the file that would have to go for a better one; empty while there is room.
        last_model_path: the newest `last.ckpt`.
        best_model_score: the monitored value of the best file, or None.
        best_k_models: the path of each file that is kept, best first, and its score.
        current_score: the value that was looked at last.

    Raises:
        UsageError: an argument that cannot be meant; `mode` is missing and the name of the metric does not say it; two
            of these callbacks would write the same files.
        UnknownNameError: nothing of the monitored name, or of a name in the template, was logged.
        OutputError: the folder cannot be made.
        StorageError: a file cannot be written; those that were there before still are.
    """

    comes_last = True

    def __init__(
        self,
        dirpath: Any = None,
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
        train_time_interval: Any = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
    ) -> None:
        check_checkpoint_settings(locals())
        self.dirpath, self.filename, self.monitor, self.mode = dirpath, filename, monitor, mode
        self.verbose, self.save_last, self.save_top_k = verbose, save_last, save_top_k
        self.save_weights_only, self.save_on_exception = save_weights_only, save_on_exception
        self.frequency = Frequency(
            every_n_train_steps or every_n_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end is False
        )
        self.template = template_of(filename, save_top_k, auto_insert_metric_name)
        self._forget()

    def _forget(self) -> None:
        #: the files that are kept, of the fit that runs or ran last
        self.best = BestFiles(Path(), 0, "max")
        self.last_model_path = ""
        self._ranking: BestByMetric | None = None
        self._together: list[ModelCheckpoint] = [self]
        self._number = 0
        self._step_seen = 0
        self._rest = RestingPlace()

    # ---- which files there are

    @property
    def best_model_path(self) -> str:
        """The best file, or an empty text."""
        return str(self.best.folder / self.best.best.name) if self.best.best is not None else ""

    @property
    def best_model_score(self) -> float | None:
        """The monitored value of the best file."""
        return self.best.best.score if self.best.best is not None else None

    best_score = best_model_score

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best file."""
        return self.best.best.epoch if self.best.best is not None else None

    @property
    def best_metrics(self) -> dict[str, float]:
        """All metrics of the best file."""
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
    def current_score(self) -> float | None:
        """The value that was looked at last."""
        return self._ranking.score if self._ranking is not None else None

    @property
    def last_file(self) -> Path:
        """Where `last.ckpt` of this fit is, written or not; callbacks that share a folder share it."""
        first = next(one for one in self._together if one.best.folder == self.best.folder)
        return first._folder.path / first._folder.last_name

    # ---- the beginning of a fit

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Settle where checkpoints go and what ranks them, and forget those of an earlier fit."""
        if stage != "fit":
            return
        self._forget()
        self._together = [one for one in trainer.fit_run.callbacks if isinstance(one, ModelCheckpoint)]
        self._number = [one for one in self._together if one._own_key == self._own_key].index(self)
        self._folder = CheckpointFolder(trainer, self.dirpath)
        #: `last.ckpt` may be a link
        self.links = self.save_last == "link"
        #: the name of the metric that ranks the files
        self.metric: str = self.monitor or module.monitor
        mode = best_mode("ModelCheckpoint", self.metric, self.mode, module)
        may_replace = partial(self._folder.may_replace, is_fixed=not self.template.fields)
        self.best = BestFiles(self._folder.path, self.save_top_k, mode, may_replace)
        self._ranking = BestByMetric(self.best, self.template, self.metric, self.monitor is not None, trainer.say)
        self._say = trainer.say
        self._require_own_names()

    def _require_own_names(self) -> None:
        """Two callbacks must not write over each other's files."""
        if self._together.count(self) > 1:
            raise UsageError("a ModelCheckpoint is twice in the list of callbacks", fix="drop one of the two")
        for one in self._together[: self._together.index(self)]:
            is_same = (one.best.folder, one.template.text) == (self.best.folder, self.template.text)
            if is_same and one.save_top_k and self.save_top_k:
                raise UsageError(
                    f"two ModelCheckpoints write {self.template.text}.ckpt in {self.best.folder}",
                    fix='another name or folder for one of them: ModelCheckpoint(filename="{epoch}-{val_loss:.2f}")',
                )

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """The clock of `train_time_interval` starts."""
        self._step_seen = trainer.fit_run.global_step
        self.frequency.start()
        name = self.last_file.name
        if self.save_last and name != "last.ckpt" and not self._folder.is_ours:
            trainer.say(f"{self._folder.path} holds checkpoints of another run; the newest of this one is {name}")

    # ---- when checkpoints are written; the first of several callbacks sees to it for all

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step: write what is due by steps or time."""
        run = trainer.fit_run
        self._rest.note(run)
        if self is not self._together[0] or run.global_step == self._step_seen:
            return
        self._step_seen = run.global_step
        if due := [one for one in self._together if one.frequency.is_due_after_step(run)]:
            save_together(trainer, due, (), {**run.metrics, **run.results.callback_values()}, after_epoch=False)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Note that the run stands between two steps."""
        self._rest.note(trainer.fit_run)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Note that it does not, until the epoch's values have been collected."""
        self._rest.leave()

    def on_epoch_end(self, trainer: Any, module: Any) -> None:
        """After an epoch: write what is due, and `last.ckpt` where the fit ends."""
        run = trainer.fit_run
        self._rest.note(run)
        if self is self._together[0]:
            due = [one for one in self._together if one.frequency.is_due_after_epoch(run)]
            ending = [one for one in self._together if one not in due] if is_last_epoch(run) else ()
            save_together(trainer, due, ending, run.metrics, after_epoch=True)

    def plan(self, run: FitRun, values: Mapping[str, float], *, after_epoch: bool) -> SavedFile | None:
        """The file to write among the best, which counts as kept from now on; None if there is none to write."""
        if not self.save_top_k or self._ranking is None:
            return None
        others = [one.best for one in self._together if one is not self and one.best.folder == self.best.folder]
        taken = [file.name for best in others for file in best.files]
        return self._ranking.plan(run, values, taken, after_epoch=after_epoch)

    def write_last(self, trainer: Any) -> str:
        """Write `last.ckpt` where the run stands now, in the middle of an epoch too; its path."""
        write_last_files(trainer, [self], checkpoint_content(trainer.fit_run))
        return self.last_model_path

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Write where the run stands, if that is wanted and can be continued; a signal has seen to it already."""
        run = trainer.fit_run
        # After a failed write another would fail too, and diverged weights must not replace good ones.
        is_meant = isinstance(exception, Exception) and not isinstance(exception, (DivergedError, StorageError))
        if not (self.save_on_exception and is_meant and run.samples_seen) or run.done:
            return
        if run.strategy.world_size > 1:  # the others stand elsewhere, or are gone
            trainer.say(f"{self.last_file} stays as it was: an error in one of several processes")
            return
        if trainer.active_run is not run:
            trainer.active_run.abandon()
        try:
            if not self._rest.is_here(run):
                raise UsageError("the error came in the middle of a step or of the end of an epoch")
            trainer.say(f"stopped by {type(exception).__name__}; continue from {self.write_last(trainer)}")
        except FlashtaskError as error:
            trainer.say(f"{self.last_file} stays as it was: {error.what}")

    # ---- what survives a resume

    @property
    def _own_key(self) -> str:
        given = {"monitor": self.monitor, "mode": self.mode, "filename": self.filename}
        said = [f"{name}={value}" for name, value in given.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*said, str(self.frequency)])})"

    @property
    def state_key(self) -> str:
        """One for each metric, name and frequency; equal ones are numbered."""
        return f"{self._own_key} {self._number + 1}" if self._number else self._own_key

    def state_dict(self) -> dict[str, Any]:
        """Which files are kept, and their scores."""
        return {**self.best.state_dict(), "last": self.last_file.name}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Say so if the run that is resumed knew nothing of this callback."""
        known = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__name__)]
        if self.save_top_k and known and self.state_key not in known:
            trainer.say(f"the best so far is unknown to {self.state_key}: the checkpoint has {', '.join(known)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best so far; files come along where a run is continued in another folder."""
        resumed = self._folder.resumed
        assert resumed is not None
        if self.save_top_k and self.best.load_state_dict(state, resumed.parent, self._say):
            self._folder.is_ours = True
        self._folder.use_last_name(state["last"])
        self.last_model_path = str(self.last_file) if self.last_file.exists() else ""
