"""`flashtask validate` and `flashtask test`: the metrics of a checkpoint on a folder, or on the data of its run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import CONSTRUCTOR, EVALUATE, OF_TABLES, given
from flashtask.cli.processes import check_distributed, launched
from flashtask.cli.request import refuse_columns
from flashtask.core.errors import UsageError
from flashtask.core.files import missing_file
from flashtask.core.plain_json import number_or_null
from flashtask.data.cached_inputs import brought_here, is_address
from flashtask.data.layout import existing_folder, is_shards, is_table_name, is_yolo_file, stage_folder

__all__ = ["below", "data_source", "data_to_judge", "evaluate"]

#: Arguments of data from which a model learns.
_TRAINED_ON = ("root", "train_folder", "train_file")
_PARTS = {"validate": "val", "test": "test"}


def evaluate(stage: str, ckpt: str, data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        stage: `validate` or `test`.
        ckpt: a checkpoint of a task.
        data: a folder that holds val/ (test/), or the folder of class folders itself; or a table. None means the data
            of the run whose folder is given as `ckpt`.
        params: the options of the command.

    Raises:
        MissingInputError: the checkpoint or the folder is not there.
        BadDataError: folders that do not match the checkpoint's labels, or images that cannot be read.
        UsageError: no data, and no run that leads to its own; or options of data that is not given.
    """
    check_distributed(params["distributed"])
    checkpoint, said = checkpoint_source(ckpt), given(EVALUATE, params)
    if data is None:
        source, options = None, {key: value for key, (_, value) in said.items()}
        if flags := [flag for key, (flag, _) in said.items() if key.startswith("data.")]:
            raise UsageError(
                f"{', '.join(flags)}: no DATA is given, and that of the run is read as its recipe says",
                fix=f"flashtask {stage} {ckpt} DATA {flags[0]} ...",
            )
    else:
        source, options = data_source(data, _PARTS[stage], said)
    # Standard output is for the metrics alone.
    with redirect_stdout(sys.stderr), launched(below("trainer.", options)) as strategy:
        metrics = _measure(stage, ckpt, checkpoint, source, options, strategy, per_class=params["per_class"])
    if params["json"]:
        click.echo(json.dumps({name: number_or_null(value) for name, value in metrics.items()}))
        return
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        click.echo(f"{name:<{width}}  {value:.4f}")


def data_source(data: str, part: str, said: Mapping[str, tuple[str, Any]]) -> tuple[Path | str, dict[str, Any]]:
    """The folder or the table that DATA means, and the options of a command by key.

    Args:
        data: as it was typed.
        part: `val` or `test`.
        said: flag and value of the options that were given, by key.

    Raises:
        MissingInputError: it is not there.
        UsageError: columns of something that has none.
    """
    source = _place(data, part)
    if not is_table_name(source):
        refuse_columns(flag for key, (flag, _) in said.items() if key.startswith(f"data.{OF_TABLES}."))
    return source, {key: value for key, (_, value) in said.items()}


def data_to_judge(task: Any, source: Path | str, part: str, options: Mapping[str, Any]) -> Any:
    """The data module of what DATA means, for a trained task."""
    from flashtask.data.image_source import loader_of_model

    own = {**below(f"data.{CONSTRUCTOR}.", options), **below(f"data.{OF_TABLES}.", options)}
    if task.load_image is not None and not is_shards(source):
        own = {"load_image": loader_of_model(task.load_image).given, **own}
    return task.data_class.for_evaluation(source, part, task.target_description, **own)


def _place(data: str, part: str) -> Path | str:
    if is_shards(data) or is_yolo_file(data):
        return data
    if not is_table_name(data):
        data = brought_here(data)
    if is_table_name(data):
        if not is_address(data) and not os.path.isfile(data):
            raise missing_file(data)
        return data
    return stage_folder(existing_folder(data, "DATA"), part)


def _measure(
    stage: str,
    ckpt: str,
    checkpoint: Path | str,
    source: Path | str | None,
    options: Mapping[str, Any],
    strategy: Any,
    *,
    per_class: bool,
) -> dict[str, float]:
    from flashtask import load
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.trainer.trainer import Trainer

    task = load(checkpoint)
    task.per_class = per_class
    if source is None:
        datamodule = FinishedRun(ckpt, task=task).data
    else:
        _warn_of_training_data(task, source, f"flashtask {stage} RUN")
        datamodule = data_to_judge(task, source, _PARTS[stage], options)
    joined = {} if strategy is None else {"strategy": strategy}
    arguments = {**below("trainer.", options), **joined}
    trainer = Trainer(logger=False, enable_checkpointing=False, **arguments)
    (metrics,) = getattr(trainer, stage)(task, datamodule=datamodule, verbose=False)
    return {name: float(value) for name, value in metrics.items()}


def _warn_of_training_data(task: Any, source: Path | str, otherwise: str) -> None:
    """Say so where DATA is what the model was trained on, because the metrics then count its training images too."""
    sections = ((task.provenance or {}).get("recipe") or {}).get("data") or {}
    trained_on = {
        os.path.realpath(value)
        for arguments in sections.values()
        for name, value in arguments.items()
        if name in _TRAINED_ON and isinstance(value, str)
    }
    if os.path.realpath(source) in trained_on:
        print(f"{source} is what the model was trained on, so training images count too; {otherwise} leaves them out")


def below(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a section, by what follows its name."""
    return {key.removeprefix(section): value for key, value in options.items() if key.startswith(section)}
