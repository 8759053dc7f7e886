"""One pass over validation or test data that keeps how each sample was judged, beside the metrics of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.data.checks import look_at_images
from flashtask.data.image_datamodule import ImageDataModule
from flashtask.reports.evaluation import Evaluation
from flashtask.reports.judgement import Judged, Judgement
from flashtask.tasks.batches import StepOutput
from flashtask.trainer.trainer import Trainer

if TYPE_CHECKING:
    from flashtask.data.samples import SampleTable
    from flashtask.tasks.task import Task

__all__ = ["evaluated", "measured"]

#: Lines of a prediction in words.
_MOST_LINES = 3
_STAGES = {"val": "validate", "test": "test"}


def evaluated(task: Task, data: ImageDataModule, part: str = "val", trainer: Trainer | None = None) -> Evaluation:
    """Validate or test a task, and keep the prediction for each sample with how good it is.

    It is the pass of `Trainer.validate` or `test`, on cached features where there are some, so metrics and predictions
    are the same numbers.

    Args:
        task: trained.
        data: that has the part.
        part: `val` or `test`.
        trainer: whose devices and number format are used; None means one with the defaults.

    Raises:
        UsageError: the data does not have the part.
        BadDataError: images that cannot be read.
    """
    made: list[tuple[Any, Judgement]] = []

    inputs: list[str] = []

    def keep(step: StepOutput, of_metrics: tuple[Any, Any]) -> None:
        judged = task.judge(step, of_metrics)
        if not inputs:  # not before: setting up may leave out samples
            inputs.extend(data.samples(part).inputs.tolist())
        samples = [data.images.input(name) for name in inputs[len(made) : len(made) + len(judged)]]
        made.extend(zip(task.to_predictions(task.postprocess(step.outputs), samples), judged, strict=True))

    metrics = measured(task, data, part, keep, trainer)
    table = data.samples(part)
    if len(made) != len(table):
        raise UsageError(
            f"the samples of {part} are not judged: {type(task).__name__} has steps of its own",
            fix="call self.keep_measured(step, self.metric_inputs(step)) in them",
        )
    facts = (table.names(), table.inputs.tolist(), data.target_words(part), _columns(table, data))
    whole = zip(*facts, made, strict=True)
    samples = tuple(
        Judged(name, path, target, _words(said), _row(said), judged, columns)
        for name, path, target, columns, (said, judged) in whole
    )
    labels = tuple(getattr(task, "labels", None) or ())
    groups = None if table.groups is None else table.groups.tolist()
    numbers = {name: float(value) for name, value in metrics.items()}
    return Evaluation(part, numbers, samples, labels, task.scoring, groups, getattr(task, "temperature", None))


def measured(
    task: Task,
    data: ImageDataModule,
    part: str,
    keep: Callable[[StepOutput, tuple[Any, Any]], None],
    trainer: Trainer | None = None,
) -> Mapping[str, float]:
    """Validate or test a task without writing anything, and hand over what each batch gave.

    Args:
        task: trained.
        data: that has the part.
        part: `val` or `test`.
        keep: called as `Task.keep_measured`.
        trainer: whose devices and number format are used; None means one with the defaults.

    Raises:
        UsageError: the data does not have the part.
    """
    if part not in data.sizes():
        raise UsageError(
            f"there is no {part} data to judge the model on",
            fix=f"name data with {part} images after the run: RUN DATA; or another part of its own data",
        )
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "callbacks": None,
    }
    quiet |= {"enable_progress_bar": False, "profiler": None, "output_dir": None, "fast_dev_run": False}
    quiet |= {"limit_val_batches": None, "limit_test_batches": None, "overfit_batches": 0.0}
    runner = Trainer(**quiet) if trainer is None else trainer.with_changes(**quiet)
    task.keep_measured = keep
    try:
        (metrics,) = getattr(runner, _STAGES[part])(task, datamodule=data, verbose=False)
    finally:
        task.keep_measured = None
    found: Mapping[str, float] = metrics
    return found


def _words(prediction: Any) -> str:
    lines = prediction.lines() if hasattr(prediction, "lines") else []
    return ", ".join(lines[:_MOST_LINES])


def _row(prediction: Any) -> Mapping[str, Any]:
    row: Mapping[str, Any] = prediction.as_row() if hasattr(prediction, "as_row") else {"output": str(prediction)}
    return row


def _columns(table: SampleTable, data: ImageDataModule) -> Sequence[Mapping[str, Any]]:
    """What samples may have in common: folder, size, brightness, sharpness, and the other columns of tables."""
    of_tables: Sequence[Mapping[str, Any]] = [{}] * len(table)
    if data.other_columns is not None:
        of_tables = data.other_columns.of(table.inputs.tolist())
    prints = look_at_images(table.inputs.tolist(), data.channels, images=data.images).fingerprints
    found = []
    targets = [None] * len(table) if table.targets is None else table.targets.tolist()
    for name, path, target, of_table in zip(table.names(), table.inputs.tolist(), targets, of_tables, strict=True):
        own: dict[str, Any] = {}
        folders = name.split("/")[:-1]
        if folders[:1] == [target]:
            folders = folders[1:]  # the folder of a class says no more than the class
        if folders and not os.path.isabs(name):
            own["folder"] = "/".join(folders)
        if (seen := prints.get(path)) is not None:
            own |= {"size": f"{seen.width} x {seen.height}", "brightness": seen.mean, "contrast": seen.deviation}
            own["sharpness"] = seen.sharpness
        found.append({**of_table, **own, **of_table})  # the user's come first, and win where names are equal
    return found
