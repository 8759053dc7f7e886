"""Where a `ModelCheckpoint` writes: its folder, the name of `last.ckpt` there, and which files are the run's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashtask.core.errors import OutputError
from flashtask.core.files import remove_partials
from flashtask.trainer.checkpoints.best_files import place_in
from flashtask.trainer.checkpoints.names import versions, versions_of

__all__ = ["CheckpointFolder"]


class CheckpointFolder:
    """The folder of a fit's checkpoints; it is made if it is not there.

    In a run folder there is one run. Any other folder may hold checkpoints of other runs: they are not touched, and
    `last.ckpt` becomes `last-v1.ckpt`.

    Args:
        trainer: whose fit it is.
        dirpath: relative to the trainer's `default_root_dir`; None means the run folder.

    Raises:
        OutputError: it cannot be made.
    """

    def __init__(self, trainer: Any, dirpath: Any) -> None:
        self._run = trainer.fit_run
        self._is_run_folder = dirpath is None
        self.path = Path(trainer.output_dir) if dirpath is None else Path(trainer.default_root_dir, dirpath).absolute()
        if not self._is_run_folder and trainer.is_global_zero:
            self._make()
        #: the file that the fit is continued from
        self.resumed: Path | None = None if self._run.resume_from is None else Path(self._run.resume_from).resolve()
        is_here = self.resumed is not None and self.resumed.parent == self.path.resolve()
        #: what lies here was written by the run that is continued
        self.is_ours = self.resumed is not None and (self._is_run_folder or is_here)
        self._goes_on_with = self.resumed.name if self.resumed is not None and is_here else ""
        self.last_name = self._find_last_name()

    def use_last_name(self, name: str) -> None:
        """Go on with the name that the run so far had, unless the fit is continued from another such file."""
        if self.is_ours and not versions_of("last").fullmatch(self._goes_on_with):
            self.last_name = name

    def may_replace(self, name: str, *, is_fixed: bool) -> bool:
        """Whether a file that counts nowhere may be overwritten: it is the run's own, from before it was continued.

        Args:
            name: of the file.
            is_fixed: it is the name of one file with changing content, as `best.ckpt`; any other must hold the very
                place where the run stands.
        """
        place = (self._run.epoch, self._run.global_step)
        return self.is_ours and (is_fixed or place_in(self.path / name) == place)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.path} for checkpoints: {error.strerror}",
                fix='ModelCheckpoint(dirpath="..."), relative to default_root_dir; None means the run folder',
            ) from error
        remove_partials(self.path)

    def _find_last_name(self) -> str:
        if versions_of("last").fullmatch(self._goes_on_with):
            return self._goes_on_with
        if self.is_ours or self._is_run_folder:
            return "last.ckpt"
        return next(name for name in versions("last") if not os.path.lexists(self.path / name))
