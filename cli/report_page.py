"""`flashtask report`: the page of a run or of a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.evaluate import below, data_source, data_to_judge
from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import REPORT, given
from flashtask.cli.output import require_writable_file
from flashtask.core.errors import UsageError
from flashtask.core.plain_json import read_json

__all__ = ["report"]


def report(path: str, data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        path: a run folder or a checkpoint.
        data: what the model is judged on; None means the data of its run.
        params: the options of the command.

    Raises:
        MissingInputError: the run or the data is not there.
        UsageError: an address in the place of a path, or options that contradict each other.
        OutputError: the file cannot be written.
    """
    source = Path(path if _are_several_in(path) else checkpoint_source(path))
    if "://" in path or not source.exists():
        raise UsageError(f"{path} is not on this machine", fix=f"flashtask pull {path} FOLDER")
    part, said = params["of"] or "val", given(REPORT, params)
    where, options = (None, {key: value for key, (_, value) in said.items()})
    if data is not None:
        where, options = data_source(data, part, said)
    elif columns := [flag for key, (flag, _) in said.items() if key.startswith("data.")]:
        raise UsageError(f"{columns[0]} is about DATA, which is not given", fix=f"flashtask report {path} DATA")
    place = _place(path, params, is_own_data=data is None)
    require_writable_file(place)
    with redirect_stdout(sys.stderr):
        named = params["slices"]
        slices = [named] if isinstance(named, str) else named
        made = _report_of(path, where, part if data is not None else params["of"], options, slices)
        made.save(place, params["format"])
    click.echo(str(made))
    if made.remark:
        click.echo(made.remark)
    click.echo(f"report: {place}")


def _place(path: str, params: Mapping[str, Any], *, is_own_data: bool) -> Path:
    """The file to write: in the run folder, unless the model is judged on other data."""
    if params["output"]:
        return Path(params["output"])
    name = f"report.{params['format'] or 'html'}"
    folder = Path(path).expanduser()
    return folder / name if is_own_data and folder.is_dir() else Path(name)


def _report_of(
    path: str, where: Path | str | None, part: str | None, options: Mapping[str, Any], slices: Sequence[str] | None
) -> Any:
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.trainer.trainer import Trainer

    finished = FinishedRun(path, trainer=Trainer(**below("trainer.", options)))
    if where is not None:
        for each in finished.runs or [finished]:
            each.data = data_to_judge(each.task, where, part or "val", options)
    return finished.report(part, slices=slices)


def _are_several_in(path: str) -> bool:
    """Whether it is the folder of several runs, as `--repeats` and `--folds` leave it."""
    file = Path(path).expanduser() / "summary.json"
    return file.is_file() and "runs" in read_json(file)
