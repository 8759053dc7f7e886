"""`flashtask compare`: runs beside each other, on the samples that they were validated on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtask.cli.evaluate import below, data_source, data_to_judge
from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import COMPARE, given
from flashtask.cli.output import require_writable_file
from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.core.files import atomic_write
from flashtask.core.names import shown_name
from flashtask.trainer.text_table import WIDTH, text_table, wrapped

if TYPE_CHECKING:
    from flashtask.reports.comparison import Comparison, Difference
    from flashtask.tasks.finished_run import FinishedRun

__all__ = ["compare"]

#: Samples that are named, of those that became right and of those that became wrong.
_NAMED = 5


def compare(paths: Sequence[str], params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        paths: run folders or checkpoints; each is compared with the first.
        params: the options of the command.

    Raises:
        UsageError: fewer than two runs, runs of different tasks, or options that contradict each other.
        MissingInputError: a run is not there.
    """
    if len(paths) < 2:
        raise UsageError("compare needs two runs or more", fix="flashtask compare runs/000 runs/001")
    for path in paths:
        if "://" in path or not Path(checkpoint_source(path)).exists():
            raise UsageError(f"{path} is not on this machine", fix=f"flashtask pull {path} FOLDER")
    if params["output"]:
        require_writable_file(Path(params["output"]))
    with redirect_stdout(sys.stderr):
        made = _comparison(paths, params)
    if params["output"]:
        from flashtask.reports.comparison_page import comparison_page

        with atomic_write(params["output"]) as file:
            file.write(comparison_page(made).encode())
    if params["json"]:
        click.echo(json.dumps(made.to_dict()))
        return
    click.echo("\n".join(_lines(made)))
    if params["output"]:
        click.echo(f"page: {params['output']}")


def _comparison(paths: Sequence[str], params: Mapping[str, Any]) -> Comparison:
    from flashtask.reports.comparison import compared, data_that_differ, settings_that_differ
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.trainer.trainer import Trainer

    part, said = params["of"] or "val", given(COMPARE, params)
    options = {key: value for key, (_, value) in said.items()}
    where = None
    if params["data"]:
        where, options = data_source(params["data"], part, said)
    runs = [FinishedRun(path, trainer=Trainer(**below("trainer.", options))) for path in paths]
    tasks = {run.task.name for run in runs}
    if len(tasks) > 1:
        raise UsageError(f"the runs are of different tasks: {', '.join(sorted(tasks))}", fix="compare runs of one task")
    data = data_that_differ([_data_of(run) for run in runs])
    if where is not None:
        for finished in runs:
            finished.data = data_to_judge(finished.task, where, part, options)
    evaluations = [run.evaluation(part) for run in runs]
    return compared(_names(paths), evaluations, settings_that_differ([run.recipe for run in runs]), data)


def _data_of(run: FinishedRun) -> dict[str, dict[str, str]] | None:
    """By part, the target of each sample by its name; None if the run does not lead to its data."""
    try:
        data = run.data
    except FlashtaskError:
        return None
    return {
        part: dict(zip(data.samples(part).names(), data.target_words(part), strict=True))
        for part in data.sizes()
        if part != "predict"
    }


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that differ."""
    whole = [Path(os.path.abspath(path)).parts for path in paths]
    length = next((n for n in range(1, 20) if len({one[-n:] for one in whole}) == len(whole)), 20)
    return [shown_name("/".join(one[-length:])) for one in whole]


def _lines(made: Comparison) -> Iterator[str]:
    rows = [[name, *(_number(one) for one in values)] for name, values in made.metrics.items()]
    yield text_table([f"{made.evaluations[0].part} metrics", *made.names], rows).rstrip()
    if made.settings:
        rows = [[key, *(_short(value) for value in values)] for key, values in made.settings.items()]
        yield ""
        yield text_table(["settings that differ", *made.names], rows).rstrip()
    if made.data:
        rows = [[what, *("" if one is None else f"{one:,}" for one in counts)] for what, counts in made.data.items()]
        yield ""
        yield text_table(["data that differs", *made.names], rows).rstrip()
    for name, sizes, one in zip(made.names[1:], map(len, made.evaluations[1:]), made.differences, strict=True):
        yield ""
        yield from _difference_lines(made, name, sizes, one)


def _difference_lines(made: Comparison, name: str, size: int, one: Difference) -> Iterator[str]:
    yield from wrapped(f"{name} beside {made.names[0]}: {one.verdict}", WIDTH)
    first = len(made.evaluations[0])
    if one.common < max(first, size):
        text = (
            f"they were validated on different samples: {first:,} and {size:,}, {one.common:,} of them the same, which "
            "the other run may have been trained on; --data DATA judges all runs on the same samples"
        )
        yield from wrapped(text, WIDTH)
    if one.per_class:
        rows = [[a.label, _number(a.f1), _number(b.f1), f"{b.f1 - a.f1:+.4f}"] for a, b in one.per_class]
        yield text_table(["F1 of the class", made.names[0], name, "difference"], rows).rstrip()
    for title, flips in (
        ("became right", [flip for flip in one.flips if flip.is_better]),
        ("became wrong", [flip for flip in one.flips if not flip.is_better]),
    ):
        if flips:
            named = ", ".join(shown_name(flip.after.name) for flip in flips[:_NAMED])
            more = f", and {len(flips) - _NAMED:,} more" if len(flips) > _NAMED else ""
            yield from wrapped(f"{len(flips):,} {title}: {named}{more}", WIDTH)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 24 else f"...{text[-21:]}"
