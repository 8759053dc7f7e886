"""`flashtask operate`: the temperature and the thresholds of a trained classifier, stored in its checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.evaluate import below, data_source, data_to_judge
from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import OPERATE, given
from flashtask.cli.output import require_writable_file
from flashtask.core.errors import UsageError

__all__ = ["operate"]

_TARGETS = ("recall", "class_precision", "coverage", "abstain_below")


def operate(path: str, data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        path: a run folder or a checkpoint.
        data: images that the model was not trained on; None means the validation data of the run.
        params: the options of the command.

    Raises:
        MissingInputError: the run or the data is not there.
        UsageError: another task, classes or targets that cannot be, or options that contradict each other.
        OutputError: the run is going on, or the file cannot be written.
    """
    source = Path(checkpoint_source(path))
    if "://" in path or not source.exists():
        raise UsageError(f"{path} is not on this machine", fix=f"flashtask pull {path} FOLDER")
    part, said = params["of"] or "val", given(OPERATE, params)
    where, options = None, {key: value for key, (_, value) in said.items()}
    if data is not None:
        where, options = data_source(data, part, said)
    elif columns := [flag for key, (flag, _) in said.items() if key.startswith("data.")]:
        raise UsageError(f"{columns[0]} is about DATA, which is not given", fix=f"flashtask operate {path} DATA")
    targets = {name: params[name] for name in _TARGETS if params[name]}
    if params["clear"] and (targets or data is not None):
        raise UsageError("--clear removes what is stored, and takes no targets and no DATA", fix="leave out --clear")
    if params["output"]:
        require_writable_file(Path(params["output"]))
    place = params["output"] or str(source)
    with redirect_stdout(sys.stderr):
        made = _operated(path, where, part, targets, options, params)
    if params["json"]:
        click.echo(json.dumps({"checkpoint": place, "operating": made and made.to_dict()}))
        return
    if made is not None:
        click.echo("\n".join(made.lines()))
    click.echo(f"{'stored in' if made else 'removed from'}: {place}")


def _operated(
    path: str,
    where: Path | str | None,
    part: str,
    targets: Mapping[str, Any],
    options: Mapping[str, Any],
    params: Mapping[str, Any],
) -> Any:
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.trainer.trainer import Trainer

    finished = FinishedRun(path, trainer=Trainer(**below("trainer.", options)))
    if params["clear"]:
        finished.drop_operating_points(params["output"])
        return None
    if where is not None:
        finished.data = data_to_judge(finished.task, where, part, options)
    return finished.operate(
        part,
        recall=_by_class("--recall", targets.get("recall", ())),
        precision=_by_class("--class-precision", targets.get("class_precision", ())),
        coverage=targets.get("coverage"),
        abstain_below=targets.get("abstain_below"),
        output=params["output"],
    )


def _by_class(flag: str, pairs: Any) -> dict[str, float]:
    labels = [label for label, _ in pairs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"{flag} names {twice[0]!r} twice", fix="leave out one of them")
    return dict(pairs)
