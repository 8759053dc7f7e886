"""`FinishedRun`: what a run left behind, opened again: its history, its model, and what that makes of the data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import IntegrityError, OutputError, UsageError
from flashtask.core.model_path import model_path
from flashtask.core.plain_json import read_json
from flashtask.core.yaml_reader import read_yaml
from flashtask.reports.evaluation import Evaluation
from flashtask.reports.history import History
from flashtask.reports.judgement import Judged
from flashtask.reports.statistics import ClassCounts
from flashtask.tasks import TASKS
from flashtask.trainer.run_folder import owner_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from flashtask.data.image_datamodule import ImageDataModule
    from flashtask.reports.report import Report
    from flashtask.tasks.operating import OperatingPoints
    from flashtask.tasks.task import Task
    from flashtask.trainer.fit_result import FitResult
    from flashtask.trainer.trainer import Trainer

__all__ = ["FinishedRun"]


class FinishedRun:
    """A run that is over, from its folder or from a checkpoint alone.

    Everything is read when it is first asked for: history and summary without loading a model, the model from its best
    checkpoint, else the last, and the data from the recipe.

    Args:
        path: of a run folder or a checkpoint.
        task: the model of the run, if it is in memory; None loads it.
        data: its data, if it is in memory; None makes it as the recipe says.
        trainer: whose devices the model is judged on; None means one with the defaults.
        result: of the fit, if it was in this process: which epoch the model in memory has.

    Raises:
        MissingInputError: there is no run and no checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        task: Task | None = None,
        data: ImageDataModule | None = None,
        trainer: Trainer | None = None,
        result: FitResult | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        #: The folder of the run, or of the checkpoint.
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self._trainer, self._result = trainer, result
        self._evaluations: dict[str, Evaluation] = {}
        if task is not None:
            self.task = task
        if data is not None:
            self.data = data
        if not self.is_folder or not (self.folder / "summary.json").exists():
            self.checkpoint  # noqa: B018 - there has to be one

    @property
    def is_folder(self) -> bool:
        """Whether it was opened as a run folder, rather than as one checkpoint."""
        return self.path.is_dir()

    @cached_property
    def checkpoint(self) -> Path:
        """The file that the model is read from: `best.ckpt`, else `last.ckpt`, or the one that was given.

        Raises:
            MissingInputError: there is none.
        """
        return model_path(self.path, quiet=True)

    # ---- what the run wrote

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: task, backbone, strategy, best metrics, time, versions; empty for a run that did not end."""
        file = self.folder / "summary.json"
        found: dict[str, Any] = read_json(file) if self.is_folder and file.exists() else {}
        return found

    @cached_property
    def runs(self) -> list[FinishedRun]:
        """The runs in a folder of several, as repeats and folds leave it; empty for a single run."""
        entries = self.summary.get("runs") or ()
        return [FinishedRun(self.folder / entry["name"], trainer=self._trainer) for entry in entries]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the run; empty for a module that has none."""
        file = self.folder / "recipe.yaml"
        if self.is_folder and file.exists():
            found: dict[str, Any] = read_yaml(file).content
            return found
        return dict(self._content.get("recipe") or {})

    @cached_property
    def history(self) -> History:
        """A row an epoch: losses, metrics, learning rates, seconds."""
        file = self.folder / "metrics.csv"
        if self.is_folder and file.exists():
            return History.read(file)
        progress = self._content.get("progress") or {}
        rows = progress.get("history")
        return History(json.loads(bytes(rows.tolist())) if rows is not None else ())

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the epoch whose weights the model has."""
        if self._result is not None and self._result.epoch is not None:
            return {"epoch": float(self._result.epoch), **self._result.metrics}
        best = self.summary.get("best") or self._content.get("metrics") or {}
        return {name: float("nan") if value is None else float(value) for name, value in best.items()}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, threads, device and number format of the run."""
        known = self._content if self._result is None else self.task.provenance or {}
        return dict(known.get("environment") or {})

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        return read_checkpoint(self.checkpoint)

    # ---- what it can be asked

    @cached_property
    def task(self) -> Task:
        """The model, in eval mode.

        Raises:
            UnknownNameError, IntegrityError, UsageError: a task that is not registered, or a file that cannot be used.
        """
        return self._loaded()

    def _loaded(self) -> Task:
        name = self._content.get("task")
        if not isinstance(name, str):
            raise IntegrityError(f"{self.checkpoint} holds a module that is no task")
        loaded: Task = TASKS.get(name).load_from_checkpoint(self.checkpoint)
        return loaded.eval()

    @cached_property
    def data(self) -> ImageDataModule:
        """The data of the run, made as its recipe says.

        Raises:
            UsageError: the recipe cannot hold it; or a checkpoint was opened, which must not lead to other files.
            BadDataError, MissingInputError: it is not there any more.
        """
        if not self.is_folder:
            raise UsageError(f"{self.path} is a checkpoint, which does not lead to data", fix="give the run folder")
        section = self.recipe.get("data")
        if not section or "data" in self.recipe.get("not_saved", {}):
            raise UsageError(f"the recipe of {self.path} does not lead to its data", fix="FinishedRun(path, data=data)")
        ((constructor, arguments),) = section.items()
        if not constructor.startswith("from_") or not hasattr(self.task.data_class, constructor):
            raise UsageError(f"the recipe of {self.path} has data from {constructor!r}, which is no constructor")
        made: ImageDataModule = getattr(self.task.data_class, constructor)(**arguments)
        return made

    def evaluation(self, part: str = "val") -> Evaluation:
        """What the model makes of each sample of a part, with metrics, intervals and statistics of all.

        Args:
            part: `val` or `test`.

        Raises:
            UsageError: the data has no such part.
        """
        if part not in self._evaluations:
            from flashtask.tasks.judged_pass import evaluated

            self._evaluations[part] = evaluated(self.task, self.data, part, self._trainer)
        return self._evaluations[part]

    def predictions(self, part: str = "val") -> list[dict[str, Any]]:
        """The predictions for a part, as `flashtask predict` writes them in a table, a row each."""
        return [dict(one.row) for one in self.evaluation(part).samples]

    def confusion_matrix(self, part: str = "val") -> np.ndarray[Any, Any]:
        """How much of each true class (rows) was predicted as which (columns), in the order of `task.labels`."""
        return self.evaluation(part).confusion_matrix()

    def per_class(self, part: str = "val") -> list[ClassCounts]:
        """Precision, recall and F1 of each class."""
        return self.evaluation(part).per_class()

    def mistakes(self, k: int = 12, part: str = "val") -> list[Judged]:
        """The samples with the largest errors, the worst first."""
        return self.evaluation(part).mistakes(k)

    def report(self, part: str | None = None, *, slices: Sequence[str] | None = None) -> Report:
        """Everything about the run as a page, as JSON or as a picture: `run.report().save("report.html")`.

        Of the folder of several runs, as repeats and folds leave it, it is the page of all.

        Args:
            part: `val` or `test`; None means validation data, else test data.
            slices: columns that the samples are sliced by, such as `folder`, `brightness`, or any column of the table
                that the data came from; None means all.

        Raises:
            UnknownNameError: no sample has such a column.
        """
        from flashtask.tasks.run_report import report_of
        from flashtask.tasks.several_report import report_of_runs

        if self.runs:
            return report_of_runs(self.folder, self.runs, part, slices)
        return report_of(self, part, slices)

    def operate(
        self,
        part: str = "val",
        *,
        recall: Mapping[str, float] | None = None,
        precision: Mapping[str, float] | None = None,
        coverage: float | None = None,
        abstain_below: float | None = None,
        output: str | os.PathLike[str] | None = None,
    ) -> OperatingPoints:
        """Fit the temperature of the model in `checkpoint`, choose thresholds, and store both in that file.

        Nothing else in the file changes. Prediction, serving and export use what is stored.

        Args:
            part: `val` or `test`.
            recall: as for `ImageClassifier.operate`, and so are the next three.
            precision: see there.
            coverage: see there.
            abstain_below: see there.
            output: a file for the checkpoint with the result; None replaces `checkpoint`.

        Raises:
            UsageError, UnknownNameError, BadDataError: as of `ImageClassifier.operate`.
            OutputError: the run is going on.
            StorageError: the file cannot be written.
        """
        self._require_a_checkpoint(output)
        # Not the model in memory, which may have other weights.
        task: Task = self._loaded()
        targets = {"recall": recall, "precision": precision, "coverage": coverage, "abstain_below": abstain_below}
        found: OperatingPoints = task.operate(self.data, part, trainer=self._trainer, **targets)
        self._store(found, output)
        self.task, self._result = task, None
        self._evaluations.clear()
        return found

    def drop_operating_points(self, output: str | os.PathLike[str] | None = None) -> None:
        """Take temperature and thresholds out of the checkpoint again.

        Args:
            output: as for `operate`.
        """
        self._require_a_checkpoint(output)
        self._store(None, output)
        vars(self).pop("task", None)
        self._evaluations.clear()

    def _require_a_checkpoint(self, output: str | os.PathLike[str] | None) -> None:
        if self.checkpoint.is_dir():
            raise UsageError(
                f"{self.checkpoint} is a folder in timm's layout, which is not changed",
                fix="operate on the checkpoint that it was saved from, and save it again",
            )
        if output is None and (owner := owner_of(self.folder)):
            raise OutputError(f"{self.folder} is in use by {owner}", fix="wait for it, or give another file as output")

    def _store(self, found: OperatingPoints | None, output: str | os.PathLike[str] | None) -> None:
        content = {name: value for name, value in read_checkpoint(self.checkpoint).items() if name != "operating"}
        if found is not None:
            content["operating"] = found.to_dict()
        write_checkpoint(self.checkpoint if output is None else output, content)
        vars(self).pop("_content", None)

    def plot(self, part: str | None = None) -> Figure:
        """Curves, confusion matrix, precision over recall and calibration, as a figure of matplotlib.

        Args:
            part: `val` or `test`, which the model is judged on; None draws the history alone.
        """
        from flashtask.reports.figure import figure

        return figure(
            self.history, self.task.monitor, None if part is None else self.evaluation(part), self.folder.name
        )

    def explain(self, image: Any, method: str = "auto") -> Image:
        """A picture as the model gets it, with a heat map of what its prediction comes from: see `heat_maps`.

        Args:
            image: as `predict` takes it.
            method: `rollout` for transformers, `hirescam`, or `auto`: the former where it is possible.

        Raises:
            UsageError: several pictures, or a backbone that has no such map.
        """
        import PIL.Image

        from flashtask.data.inputs import input_of
        from flashtask.data.transforms import eval_transform
        from flashtask.tasks.explanation import heat_maps, heated

        given = input_of(image)
        found = heat_maps(self.task, [given], method)
        if found is None:
            which = "" if method == "auto" else f" by {method}"
            raise UsageError(f"the predictions of {self.path} have no heat map{which}", fix='method="auto"')
        return heated(PIL.Image.fromarray(given.read(eval_transform(self.task.preprocessing).first)), found.maps[0])

    # ---- how it is shown

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items() if name.startswith("val_"))
        words = [str(self.summary.get(name)) for name in ("task", "backbone", "strategy") if self.summary.get(name)]
        return f"{self.path}: {', '.join(words)}" + (f"; {shown}" if shown else "")

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """The result and the rows of its history; `run.report()` shows the whole page."""
        from html import escape

        return f"<p>{escape(str(self))}</p>{self.history._repr_html_()}"
