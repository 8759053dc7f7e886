"""TensorBoard's event files. TensorBoard is imported when a run starts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flashtask.core.errors import UsageError
from flashtask.core.files import PathLike
from flashtask.trainer.loggers.libraries import flat_values, library, require_library
from flashtask.trainer.loggers.logger import FolderLogger, SilentLogger

__all__ = ["TensorBoardLogger", "is_available"]

_INSTALL = "pip install tensorboard"


def is_available() -> bool:
    """Whether TensorBoard is installed; it is not imported."""
    return find_spec("tensorboard") is not None


class TensorBoardLogger(FolderLogger):
    """Writes what `tensorboard --logdir <folder>` shows: values over steps, charts of several series, hyper-parameters.

    Values of steps and epochs are logged by optimizer step. A resumed run goes on from its checkpoint: what was
    written after it is hidden by TensorBoard.

    Args:
        folder: None means `tensorboard` in the run folder; else a run writes to `<folder>/<name>/<version>`.
        name: of the folder of all versions; none if not given.
        version: of the run: a text, or a number for `version_<number>`; the run folder's name if not given.
        save_dir: another name of `folder`.
        sub_dir: a folder in that of the version.

    Raises:
        UsageError: TensorBoard is not installed; a name or version without a folder.
    """

    instead = {
        "log_graph": "self.logger.experiment.add_graph(self, inputs) in on_train_start",
        "default_hp_metric": "leave it out: no hp_metric is written",
        "prefix": 'self.log("prefix/loss", ...)',
    }

    def __init__(
        self,
        folder: PathLike | None = None,
        name: str | None = None,
        version: int | str | None = None,
        *,
        save_dir: PathLike | None = None,
        sub_dir: PathLike | None = None,
    ) -> None:
        require_library("tensorboard", "TensorBoardLogger", _INSTALL)
        if folder is not None and save_dir is not None:
            raise UsageError("folder and save_dir of TensorBoardLogger are the same", fix="drop save_dir")
        super().__init__(save_dir if folder is None else folder, name, version)
        self.sub_dir = sub_dir
        self._purge_step: int | None = 0
        self._charts: set[str] = set()
        self._writers: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        """The `SummaryWriter` of the run, for images, texts and whatever else it can take; also before and after it.

        Raises:
            UsageError: there is no folder yet, since it was given none and no fit has begun.
        """
        if not self._is_written_here():
            return SilentLogger(self)
        self.open_outside_of_a_fit()
        return self._writer()

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Open the event file; a run that goes on in another folder brings its rows along."""
        if self._is_begun_in(folder, step):
            return
        self._open(folder)
        assert self._here is not None
        files = list(self._here.rglob("events.out.tfevents.*"))
        _wait_for_a_later_name(files)
        # What was written from this step on is hidden. A run that begins records that too:
        # TensorBoard takes the first file with such a record for the beginning, and hides nothing because of it.
        self._purge_step = step + 1 if step and files else 0
        self._writer()
        for row in () if files else history:
            self.log_epoch(row)

    def start_again(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Write to another event file, which is made with the first value."""
        self._open(folder)
        assert self._here is not None
        self._purge_step = None if any(self._here.rglob("events.out.tfevents.*")) else 0

    def __getstate__(self) -> dict[str, Any]:
        # A writer cannot go to another process, which writes a file of its own.
        return {**vars(self), "_writers": {}, "_purge_step": None}

    def _open(self, folder: Path) -> None:
        self.close()
        self._here = self._place(folder)
        self._mark(True)

    def _place(self, folder: Path) -> Path:
        place = super()._place(folder)
        return (place / "tensorboard" if self.folder is None else place) / (self.sub_dir or "")

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """Write the hyper-parameters where TensorBoard's HPARAMS tab finds them, beside the run's own values."""
        # Not add_hparams: it makes a run of its own, which has the hyper-parameters and nothing else.
        if values:
            summary = library("tensorboard.plugins.hparams.summary_v2", "TensorBoardLogger", _INSTALL)
            self._writer().file_writer.add_summary(summary.hparams_pb(flat_values(values)))

    def draw_together(self, chart: str) -> None:
        """Values whose names begin with `<chart>/` become lines of one chart."""
        self._charts.add(chart)

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Write each value at its step, one of a chart as a line of it."""
        for name, value in values.items():
            self._add(name, value, step)

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row's values, `epoch` among them, at the step with which the epoch ended."""
        for name, value in row.items():
            if name != "step":
                self._add(name, value, int(row["step"]))

    def flush(self) -> None:
        """Write waiting values to the event file."""
        for writer in self._writers.values():
            writer.flush()

    def close(self, error: BaseException | None = None) -> None:
        """Write what is left and close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        self._mark(False)

    def _add(self, name: str, value: float, step: int) -> None:
        chart = max((chart for chart in self._charts if name.startswith(f"{chart}/")), key=len, default=None)
        if chart is None:
            self._writer().add_scalar(name, value, step)
            return
        # One chart has one line for each folder of events. Folders of our own do what `add_scalars` does, but take
        # part in resuming and flushing. A custom layout needs no folders, but is drawn in a tab of its own, away from
        # the charts that everybody looks at first.
        series = name.removeprefix(f"{chart}/")
        self._writer(quote(f"{chart}_{series}", safe=" ")).add_scalar(chart, value, step)

    def _writer(self, series: str = "") -> Any:
        """The writer of a folder: of the run itself, or of a series within it."""
        assert self._here is not None, "a run logs between start and close"
        if series not in self._writers:
            kind = library("torch.utils.tensorboard", "TensorBoardLogger", _INSTALL).SummaryWriter
            self._writers[series] = kind(str(self._here / series), purge_step=self._purge_step)
        return self._writers[series]


def _wait_for_a_later_name(files: Iterable[Path]) -> None:
    """TensorBoard reads files in the order of their names, which begin with the second that they were made in."""
    seconds = [int(path.name.split(".")[3]) for path in files if path.name.split(".")[3].isdigit()]
    # A clock that is far off is not waited for.
    time.sleep(min(1.0, max(0.0, max(seconds, default=0) + 1 - time.time())))
