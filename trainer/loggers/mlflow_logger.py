"""MLflow, on a tracking server or in a database in the run folder. Its library is imported when a run starts."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashtask._version import __version__
from flashtask.core.errors import OutputError, UsageError
from flashtask.core.files import atomic_write_text
from flashtask.core.plain_json import canonical_json, read_json
from flashtask.trainer.loggers.libraries import first_line, flat_values, library, require_library
from flashtask.trainer.loggers.logger import Logger, SilentLogger

__all__ = ["MLFlowLogger"]

_INSTALL = "pip install mlflow-skinny sqlalchemy alembic"
#: what every MLflow takes at once, and in what length
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100
_LONGEST_NAME, _LONGEST_VALUE = 250, 500
#: what a stored model is called in its run
_MODEL = "model"
#: seconds after which a server that did not answer is asked again
_PAUSE = 600


class MLFlowLogger(Logger):
    """Logs to MLflow; a resumed run continues the same MLflow run, whose id is in the folder's `mlflow.json`.

    Values are logged by optimizer step and are sent when the log is flushed; if that fails, it is reported, and they
    are kept and sent with the next ones. MLflow draws each series in a chart of its own; those of one chart stand
    together. Characters that MLflow does not allow in names become `_`. The database of a run folder is shown by
    `mlflow server --backend-store-uri sqlite:///<run folder>/mlflow.db`, for which the whole `mlflow` is needed.

    Args:
        experiment_name: it is made if there is none.
        run_name: what MLflow calls the run; the run folder's name if not given.
        tracking_uri: for example `http://localhost:5000` or `sqlite:///mlflow.db`; None means `MLFLOW_TRACKING_URI`
            where that is set, else `mlflow.db` in the run folder.
        run_id: of an MLflow run to continue.
        tags: of the MLflow run.
        log_model: when a fit of a task ends, store its `best.ckpt` (else its `last.ckpt`) with the MLflow run as the
            model `model`, which `mlflow.pyfunc.load_model("runs:/<run id>/model")` loads.

    Raises:
        UsageError: MLflow is not installed.
        OutputError: the tracking server does not answer, or the database cannot be written.
    """

    instead = {
        "save_dir": 'tracking_uri="sqlite:///logs/mlflow.db"',
        "artifact_location": "make the experiment with mlflow.create_experiment(name, artifact_location)",
        "prefix": 'self.log("prefix/loss", ...)',
    }
    _alone = 'tracking_uri="sqlite:///mlflow.db"'

    def __init__(
        self,
        experiment_name: str = "flashtask",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        *,
        log_model: bool = False,
    ) -> None:
        require_library("mlflow", "MLFlowLogger", _INSTALL)
        if not isinstance(log_model, bool):
            raise UsageError(
                f"MLFlowLogger(log_model={log_model!r}): True or False is needed",
                fix="log_model=True for the best checkpoint at the end of a fit",
            )
        if log_model:
            require_library("pandas", "MLFlowLogger with log_model=True", "pip install pandas")
        self.experiment_name, self.run_name, self.tracking_uri = experiment_name, run_name, tracking_uri
        self.run_id, self.tags, self.log_model = run_id, tags, log_model
        self._client: Any = None
        #: the file of a run folder that names the MLflow run
        self._record: Path | None = None
        self._waiting: list[Any] = []
        self._known: set[tuple[str, int, str]] = set()
        self._try_again_at = 0.0

    @property
    def experiment(self) -> Any:
        """The `MlflowClient`, also before and after a fit; `version` is the run that it logs to.

        Raises:
            UsageError: before a fit, without a `tracking_uri`.
        """
        if not self._is_written_here():
            return SilentLogger(self)
        self.open_outside_of_a_fit()
        return self._client

    @property
    def version(self) -> str | None:
        """The id of the MLflow run; None before there is one."""
        return getattr(self, "run_id_now", self.run_id)

    def start(self, folder: Path, history: list[dict[str, float]], step: int) -> None:
        """Begin an MLflow run, or continue that of the folder."""
        record = folder / "mlflow.json"
        if self._client is not None and not step and self._record in (None, record):  # begun before the fit
            self._record = record
            atomic_write_text(record, canonical_json({"run_id": self.run_id_now}))
        else:
            self._start_in(folder, history, step, record)

    def _start_alone(self) -> None:
        if self.trainer is None and self.tracking_uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
            raise self._too_early()
        folder = Path.cwd() if self.trainer is None else self.trainer.default_root_dir
        self._start_in(folder, [], 0, None)

    def _start_in(self, folder: Path, history: list[dict[str, float]], step: int, record: Path | None) -> None:
        self.close()
        self._mlflow = library("mlflow", "MLFlowLogger", _INSTALL)
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or _database_at((folder / "mlflow.db").absolute())
        for package in ("sqlalchemy", "alembic") if uri.startswith("sqlite:") else ():
            require_library(package, "MLFlowLogger with a database", _INSTALL)
        folder.mkdir(parents=True, exist_ok=True)
        kept = read_json(record)["run_id"] if step and record is not None and record.exists() else None
        self._step, self._waiting, self._known, self._try_again_at = step, [], set(), 0.0
        with _said_as_output(self._mlflow, uri):
            client = self._mlflow.MlflowClient(tracking_uri=uri)
            goes_on = self._continue(client, self.run_id or kept)
            if not goes_on:
                # Without a place of its own, MLflow takes the working folder for a run's files.
                place = (folder / "mlflow_artifacts").absolute().as_uri() if not given else None
                self.run_id_now = self._begin(client, self.run_name or folder.name, place)
        if record is not None:
            atomic_write_text(record, canonical_json({"run_id": self.run_id_now}))
        self._client, self._uri, self._record = client, uri, record
        self._mark(True)
        for row in () if goes_on else history:
            self.log_epoch(row)

    def _begin(self, client: Any, run_name: str, place: str | None) -> str:
        found = client.get_experiment_by_name(self.experiment_name)
        if found is not None:
            experiment = found.experiment_id
        else:
            experiment = client.create_experiment(self.experiment_name, artifact_location=place)
        return str(client.create_run(experiment, run_name=run_name, tags=self.tags).info.run_id)

    def _continue(self, client: Any, run_id: str | None) -> bool:
        """Open a run again, and learn what it has of the steps that are taken once more; False if it is not there."""
        if run_id is None:
            return False
        try:
            run = client.get_run(run_id)
        except self._mlflow.MlflowException as error:
            # The run folder was kept, and the database or server is another one.
            if self.run_id is None and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        client.update_run(run_id, status="RUNNING")
        for name in run.data.metrics:
            points = client.get_metric_history(run_id, name)
            self._known |= {(p.key, p.step, repr(p.value)) for p in points if p.step >= self._step}
        self.run_id_now = run_id
        return True

    def log_hyperparameters(self, values: dict[str, Any]) -> None:
        """Make the hyper-parameters the MLflow run's parameters."""
        entities = self._mlflow.entities
        given = {_allowed(name): str(value)[:_LONGEST_VALUE] for name, value in flat_values(values).items()}
        with _said_as_output(self._mlflow, self._uri):
            there = self._client.get_run(self.run_id_now).data.params
            new = [entities.Param(name, value) for name, value in given.items() if name not in there]
            for start in range(0, len(new), _PARAMETERS_AT_ONCE):
                self._log_batch(params=new[start : start + _PARAMETERS_AT_ONCE])
            # Parameters cannot be changed, so another value in a resumed run becomes a tag.
            for name, value in given.items():
                if there.get(name, value) != value:
                    self._log_batch(tags=[entities.RunTag(f"{name} from step {self._step}"[:_LONGEST_NAME], value)])

    def log_step(self, values: dict[str, float], step: int, epoch: int) -> None:
        """Keep values with their step, to be sent when the log is flushed."""
        now = int(time.time() * 1000)
        for name, given in values.items():
            key, value = _allowed(name), float(given)
            if (key, step, repr(value)) not in self._known:
                self._waiting.append(self._mlflow.entities.Metric(key, value, now, step))
        if len(self._waiting) >= _METRICS_AT_ONCE:
            self.flush()

    def log_epoch(self, row: dict[str, float]) -> None:
        """Keep the row's values, `epoch` among them, at the step with which the epoch ended."""
        values = {name: value for name, value in row.items() if name != "step"}
        self.log_step(values, int(row["step"]), int(row["epoch"]))

    def flush(self) -> None:
        """Send what is kept; what cannot be sent stays for the next time."""
        if self._client is not None and time.monotonic() >= self._try_again_at:
            with self._said_as_warning("wait"):
                self._send()

    def close(self, error: BaseException | None = None) -> None:
        """Send what is left and call the MLflow run finished, or failed."""
        if self._client is None:
            return
        with self._said_as_warning("are lost"):
            self._send()
            if self.log_model and error is None:
                self._store_model()
            self._client.set_terminated(self.run_id_now, status="FINISHED" if error is None else "FAILED")
        self._client = None
        self._mark(False)

    def _store_model(self) -> None:
        """Log the checkpoint of the fit as a model with the flavour `python_function`; of a plain `Module` nothing."""
        run = None if self.trainer is None else self.trainer.active_run
        checkpoint = None if self.trainer is None else self.trainer.checkpoint_callback
        if checkpoint is None or run is None or run.stage != "fit" or "task" not in run.module.describe():
            return
        path = checkpoint.best_model_path or checkpoint.last_model_path
        if not path:
            return
        pyfunc = library("mlflow.pyfunc", "MLFlowLogger with log_model=True", _INSTALL)
        with tempfile.TemporaryDirectory(prefix="flashtask-") as folder:
            # The module is named, not pickled; MLflow imports it when it loads the model.
            pyfunc.save_model(
                os.path.join(folder, _MODEL),
                loader_module="flashtask.tasks.mlflow_model",
                data_path=str(path),
                pip_requirements=[f"flashtask=={__version__}", "pandas"],
            )
            self._client.log_artifacts(self.run_id_now, os.path.join(folder, _MODEL), _MODEL)

    def _send(self) -> None:
        while self._waiting:
            self._log_batch(metrics=self._waiting[:_METRICS_AT_ONCE])
            del self._waiting[:_METRICS_AT_ONCE]

    def _log_batch(self, **what: Any) -> None:
        self._client.log_batch(self.run_id_now, synchronous=True, **what)

    @contextmanager
    def _said_as_warning(self, fate: str) -> Iterator[None]:
        """A run does not end because a server is away for a while."""
        try:
            yield
        except self._mlflow.MlflowException as error:
            # MLflow has tried for minutes already; training is not to wait for that at each flush.
            self._try_again_at = time.monotonic() + _PAUSE
            message = f"MLflow cannot be reached, {len(self._waiting)} values {fate}: {_first_line(error)}"
            warnings.warn(message, stacklevel=4)


def _database_at(path: Path) -> str:
    """The address of a SQLite database in a file.

    Raises:
        UsageError: SQLAlchemy is not installed, or no address of its leads to this file.
    """
    sqlalchemy = library("sqlalchemy", "MLFlowLogger with a database", _INSTALL)
    uri = f"sqlite:///{path}"
    if sqlalchemy.make_url(uri).database != str(path):
        raise UsageError(
            f"MLFlowLogger cannot keep its database in {str(path.parent)!r}",
            why="a character of that name has another meaning in the address of a database",
            fix='an output_dir without "?" and "%"; or tracking_uri="http://HOST:5000"',
        )
    return uri


@contextmanager
def _said_as_output(mlflow: Any, uri: str) -> Iterator[None]:
    """Before a run starts, what MLflow refuses is an error."""
    # It logs each table that it makes.
    migrations = logging.getLogger("mlflow.store.db.utils")
    level = migrations.level
    migrations.setLevel(logging.WARNING)
    try:
        yield
    except mlflow.MlflowException as error:
        raise OutputError(
            f"MLflow at {_without_password(uri)} takes no run",
            why=_first_line(error),
            fix='start the server, or write to a file: MLFlowLogger(tracking_uri="sqlite:///mlflow.db")',
        ) from error
    finally:
        migrations.setLevel(level)


def _first_line(error: Exception) -> str:
    return _without_password(first_line(error))


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _allowed(name: str) -> str:
    """A name as MLflow takes it on every system: no other characters, no way out of a folder."""
    return posixpath.normpath(re.sub(r"[^/\w.\- ]", "_", name)).lstrip("./")[:_LONGEST_NAME] or "_"
