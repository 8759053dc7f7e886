"""Weights & Biases, online or offline. Its library is imported when a run starts."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from typing import Any

from flashtask.core.errors import HubError, UnknownNameError, UsageError
from flashtask.core.files import PathLike, atomic_write_text
from flashtask.core.plain_json import canonical_json, read_json
from flashtask.trainer.loggers.libraries import first_line, library, plain_value, require_library
from flashtask.trainer.loggers.logger import Logger, SilentLogger

__all__ = ["WandbLogger"]

_INSTALL = "pip install wandb"
#: points of a series that are kept for a chart; of more, every other one is left out
_MOST_POINTS = 1000


class WandbLogger(Logger):
    """Logs to Weights & Biases; a resumed run continues the same W&B run, whose id is in the folder's `wandb.json`.

    All values have `global_step` as their x axis. Values of `self.log("cost", {...})` are drawn one by one in a run,
    and in one chart when it ends. W&B takes nothing back: a step that is taken again after a kill is there twice.
    Where a W&B run is active already (`wandb.init`, a sweep), it is used and left open. An offline run that was resumed
    is in several folders, which `wandb sync --id <id>` puts together.

    Args:
        project: of W&B.
        name: what W&B calls the run; it finds a name by itself.
        offline: write files only, to be sent later with `wandb sync`; False leaves it to W&B (`WANDB_MODE`).
        id: of a W&B run to continue.
        log_model: when a fit ends, store its `best.ckpt` and `last.ckpt` as versions of the artifact `model-<id>`.
        save_dir: for W&B's own files; the run folder if not given.
        version: another name of `id`.
        experiment: a W&B run that is active already, to be used and left open.
        options: further arguments of `wandb.init`, for example `entity`, `group`, `tags`.

    Raises:
        UnknownNameError: `wandb.init` has no such option.
        UsageError: W&B is not installed, or there is no login.
        HubError: W&B does not answer.
    """

    instead = {
        "prefix": 'self.log("prefix/loss", ...)',
        "checkpoint_name": "log_model=True, which calls the artifact model-<id>",
        "add_file_policy": "leave it out",
    }

    def __init__(
        self,
        project: str = "flashtask",
        name: str | None = None,
        offline: bool = False,
        id: str | None = None,
        *,
        log_model: bool = False,
        save_dir: PathLike | None = None,
        version: str | None = None,
        experiment: Any = None,
        **options: Any,
    ) -> None:
        require_library("wandb", "WandbLogger", _INSTALL)
        if not isinstance(log_model, bool):
            raise UsageError(
                f"WandbLogger(log_model={log_model!r}): True or False is needed",
                fix="log_model=True for the best and the last checkpoint at the end of a fit",
            )
        if id is not None and version is not None:
            raise UsageError("id and version of WandbLogger are the same", fix="drop version")
        self.project, self.run_name, self.offline, self.options = project, name, offline, options
        self.id = version if id is None else id
        self.log_model, self._save_dir, self._given_run = log_model, save_dir, experiment
        for option in options:
            known = [*inspect.signature(library("wandb", "WandbLogger", _INSTALL).init).parameters, "offline"]
            if option not in known:
                error = UnknownNameError("option of WandbLogger", option, [*known, "log_model", "save_dir"])
                error.fix = self.instead.get(option) or error.fix
                raise error
        self._run: Any = None
        self._last_id: str | None = None
        #: the file of a run folder that names the W&B run
        self._record: Path | None = None
        self._charts: dict[str, dict[str, list[list[float]]]] = {}

    @property
    def experiment(self) -> Any:
        """The W&B run, for images, tables and whatever else it can take; also before and after a fit."""
        if not self._is_written_here():
            return SilentLogger(self)
        self.open_outside_of_a_fit()
        return self._run

    @property
    def version(self) -> str | None:
        """The id of the W&B run; None before there is one."""
        return self._last_id or self.id

    @property
    def save_dir(self) -> str | None:
        """The folder of W&B's files that it was given, else the run folder; None before there is one."""
        return super().save_dir if self._save_dir is None else str(self._save_dir)

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Begin a W&B run, or continue that of the folder."""
        record = folder / "wandb.json"
        if self._run is not None and not step and self._record in (None, record):  # begun before the fit
            self._record = record
            self.flush()
        else:
            self._begin(folder, history, step, record)

    def _start_alone(self) -> None:
        place = Path.cwd() if self.trainer is None else self.trainer.default_root_dir
        self._begin(place, [], 0, None)

    def _begin(self, folder: Path, history: list[dict[str, float]], step: int, record: Path | None) -> None:
        self.close()
        wandb = library("wandb", "WandbLogger", _INSTALL)
        self._record = record
        kept = read_json(record) if step and record is not None and record.exists() else {}
        active = self._given_run
        if active is None and self.id is None:
            active = wandb.run
        self._is_own = active is None
        self._run = active if active is not None else self._init(wandb, folder, kept.get("id"))
        self._last_id = self._run.id
        self._mark(True)
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        # W&B counts the calls; the parts of an offline run fit together only if the next goes on counting.
        self._count = max(kept.get("count", 0), self._run.step)
        for chart, lines in kept.get("charts", {}).items():
            self._charts[chart] = {name: [p for p in points if p[0] <= step] for name, points in lines.items()}
        for row in () if kept else history:
            self.log_epoch(row)
        self.flush()

    def _init(self, wandb: Any, folder: Path, kept_id: str | None) -> Any:
        folder = folder if self._save_dir is None else Path(self._save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        given = {"project": self.project, "name": self.run_name, "dir": str(folder), "id": self.id or kept_id}
        if self.offline:
            given["mode"] = "offline"
        elif given["id"]:
            given["resume"] = "allow"
        # The console belongs to the trainer, and this run ends with its fit, whatever others go on.
        quiet = {"settings": wandb.Settings(console="off", silent=True), "reinit": "create_new"}
        try:
            run = wandb.init(**{**quiet, **given, **self.options})
        except wandb.errors.UsageError as error:
            raise UsageError(
                "W&B starts no run", why=first_line(error), fix="wandb login, or WandbLogger(offline=True)"
            ) from error
        except wandb.errors.Error as error:
            raise HubError("W&B starts no run", why=first_line(error), fix="WandbLogger(offline=True)") from error
        sync = f"wandb sync --id {run.id} {folder / 'wandb' / f'offline-run-*-{run.id}'}"
        place = f"is written to files; send it with: {sync}" if run.offline else f"is at {run.url}"
        print(f"the W&B run {place}", file=sys.stderr, flush=True)
        return run

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """Make the hyper-parameters the W&B run's config."""
        self._run.config.update(plain_value(values), allow_val_change=True)

    def draw_together(self, chart: str) -> None:
        """Values whose names begin with `<chart>/` are drawn in one chart when the run ends."""
        self._charts.setdefault(chart, {})

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Send values, with their step as `global_step`."""
        if values:
            self._log(values, step, epoch)

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row's values over `global_step`; the last row is also the run's summary."""
        values = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        self._log(values, int(row["step"]), int(row["epoch"]))

    def _log(self, values: dict[str, float], step: int, epoch: int) -> None:
        # Not as W&B's own step: that one may not go back, and belongs to whatever else is logged to the run.
        count, self._count = max(self._count, self._run.step), 0
        self._run.log({**values, "epoch": epoch, "global_step": step}, step=count, commit=True)
        for name, value in values.items():
            for chart in (chart for chart in self._charts if name.startswith(f"{chart}/") and math.isfinite(value)):
                points = self._charts[chart].setdefault(name.removeprefix(f"{chart}/"), [])
                points.append([step, value])
                if len(points) > _MOST_POINTS:
                    del points[1::2]

    def flush(self) -> None:
        """Keep id and charts for a resumed run; W&B's own process writes and sends the values as they come."""
        if self._run is not None and self._record is not None:
            kept = {"id": self._run.id, "count": self._run.step, "charts": self._charts}
            atomic_write_text(self._record, canonical_json(kept))

    def close(self, error: BaseException | None = None) -> None:
        """Draw the charts of several series, and end the W&B run."""
        if self._run is None:
            return
        for chart, lines in self._charts.items():
            if lines:
                self._run.log({chart: _drawn(chart, lines)})
        self.flush()
        self._mark(False)
        if self.log_model and error is None:
            self._store_checkpoints()
        run, self._run = self._run, None
        self._charts = {chart: {} for chart in self._charts}
        if self._is_own:
            run.finish(exit_code=0 if error is None else 1)

    def _store_checkpoints(self) -> None:
        """Log the checkpoints of the fit as an artifact, each one once; `best` and `latest` are W&B's aliases."""
        run = None if self.trainer is None else self.trainer.active_run
        checkpoint = None if self.trainer is None else self.trainer.checkpoint_callback
        if checkpoint is None or run is None or run.stage != "fit":
            return
        wandb = library("wandb", "WandbLogger", _INSTALL)
        for alias, path in (("best", checkpoint.best_model_path), ("latest", checkpoint.last_model_path)):
            if path:
                artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
                artifact.add_file(str(path))
                self._run.log_artifact(artifact, aliases=[alias])


def _drawn(chart: str, lines: dict[str, list[list[float]]]) -> Any:
    """W&B's chart of several lines."""
    plot = library("wandb.plot", "WandbLogger", _INSTALL)
    xs, ys = ([[point[place] for point in points] for points in lines.values()] for place in (0, 1))
    return plot.line_series(xs, ys, keys=list(lines), title=chart, xname="global_step")
