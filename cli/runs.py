"""`flashtask runs` and `flashtask rerun`: the runs in a folder as a table, and one of them once more."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from flashtask.cli.input_paths import checkpoint_source
from flashtask.cli.options import FINETUNE, unset
from flashtask.cli.output import require_writable_file
from flashtask.core.errors import FlashtaskError, MissingInputError, UnknownNameError, UsageError
from flashtask.core.files import atomic_write_text, missing_file
from flashtask.core.names import shown_name
from flashtask.core.plain_json import read_json
from flashtask.trainer.text_table import WIDTH, text_table, wrapped

__all__ = ["DifferentBitsError", "rerun", "runs"]

_SUMMARY = "summary.json"
#: Columns of the log that no repeat has again.
_OF_THE_MACHINE = frozenset({"seconds", "images_per_second", "peak_memory", "max_memory_allocated"})


class DifferentBitsError(FlashtaskError):
    """A repeat whose weights are not those of the run."""

    exit_code = 1


def runs(folder: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        folder: below which run folders are looked for.
        params: the options of the command.

    Raises:
        MissingInputError: there is no such folder, or no run in it.
        UnknownNameError: --sort or --where names no column.
        OutputError: the page cannot be written.
    """
    place = Path(folder or "runs")
    if not place.is_dir():
        raise missing_file(place)
    rows = [_row(place, file) for file in sorted(place.rglob(_SUMMARY))]
    if not rows:
        raise MissingInputError(f"there is no finished run below {place}", fix="flashtask runs FOLDER")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for condition in params["where"]:
        rows = [row for row in rows if _holds(condition, row, columns)]
    order = params["sort"]
    if order:
        name = order.removeprefix("-")
        if name not in columns:
            raise UnknownNameError("column", name, columns)
        rows = _sorted(rows, name, descending=order.startswith("-"))
    if params["output"]:
        require_writable_file(Path(params["output"]))
        atomic_write_text(Path(params["output"]), _page(rows, place))
    if params["json"]:
        click.echo(json.dumps(rows))
        return
    click.echo("\n".join(_table(rows)) if rows else "no run fits")
    if params["output"]:
        click.echo(f"page: {params['output']}")


def _page(rows: list[dict[str, Any]], place: Path) -> str:
    """All columns of the runs as one HTML file."""
    from flashtask.reports.runs_page import runs_page

    shown = [{**row, "run": f"{row['run']} (mean of {row['mean_of']})"} if "mean_of" in row else row for row in rows]
    known = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "mean_of"]
    known = [name for name in known if "_loss_" not in name]  # the parts of a loss
    first = ("run", "task", "backbone", "strategy")
    columns = sorted(known, key=lambda name: (name not in first, not name.startswith("val_"), name == "val_loss"))
    return runs_page(f"Runs below {shown_name(str(place))}", columns, shown, _cell)


def _row(place: Path, file: Path) -> dict[str, Any]:
    """What the summary of a run says, flat; of several runs of one recipe, the means."""
    found = read_json(file)
    best = found.get("best") or {}
    named = {name: found.get(name) for name in ("task", "backbone", "strategy", "epochs", "seconds", "seed", "stopped")}
    metrics = {name: value for name, value in best.items() if name == "epoch" or name.startswith(("val_", "train_"))}
    ended = datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")
    of_several = {"mean_of": len(found["runs"])} if "runs" in found else {}
    return {"run": os.path.relpath(file.parent, place), **of_several, **named, **metrics, "ended": ended}


def _holds(condition: str, row: Mapping[str, Any], columns: list[str]) -> bool:
    """Whether `NAME=PATTERN`, `NAME<X` or `NAME>X` is true of a row."""
    parts = re.fullmatch(r"([^=<>]*)([=<>])(.*)", condition)
    if parts is None:
        raise UsageError(f"--where {condition!r} is not a condition", fix="--where 'val_loss<0.5'")
    name, sign, wanted = parts.groups()
    if name not in columns:
        raise UnknownNameError("column", name, columns)
    value = row.get(name)
    if sign == "=":
        return fnmatchcase(str(value), wanted)
    try:
        limit = float(wanted)
    except ValueError:
        raise UsageError(f"--where {condition}: {wanted!r} is not a number", fix=f"--where '{name}{sign}0.9'") from None
    return isinstance(value, (int, float)) and (value < limit if sign == "<" else value > limit)


def _sorted(rows: list[dict[str, Any]], name: str, *, descending: bool) -> list[dict[str, Any]]:
    """By a column, numbers or text; runs that lack it come last."""
    having = [row for row in rows if row.get(name) is not None and not _is_nan(row[name])]
    is_number = all(isinstance(row[name], (int, float)) for row in having)
    having.sort(key=lambda row: row[name] if is_number else str(row[name]), reverse=descending)
    return having + [row for row in rows if row not in having]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The columns that fit: run, backbone, strategy, the first metrics of validation, seconds, the time it ended."""
    metrics = list(dict.fromkeys(name for row in rows for name in row if name.startswith("val_")))
    metrics.sort(key=lambda name: name == "val_loss")
    shown = ["run", "backbone", "strategy", *metrics[:2], "seconds", "ended"]
    cells = [[_cell(row.get(name)) for name in shown] for row in rows]
    for row, own in zip(rows, cells, strict=True):
        own[0] += f" (mean of {row['mean_of']})" if "mean_of" in row else ""
    yield text_table(shown, cells, WIDTH if sys.stdout.isatty() else None, num_left=3).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.0f}"
    return shown_name(str(value))


def rerun(source: str, params: Mapping[str, Any]) -> None:
    """Run the command: train the recipe of a run once more, and compare weights and logs bit for bit.

    Args:
        source: a run folder.
        params: the options of the command.

    Raises:
        MissingInputError: there is no run, or it has no recipe.
        DifferentBitsError: the repeat is not the same.
    """
    from flashtask.cli.finetune import finetune

    folder = Path(checkpoint_source(source)).parent if Path(source).expanduser().is_dir() else Path(source)
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise MissingInputError(f"there is no recipe in {source}", fix="give a run folder")
    output = Path(params["output_dir"] or f"{folder.absolute()}-again")
    options = {**unset(FINETUNE), "config": str(recipe), "output_dir": str(output), "quiet": params["quiet"]}
    with redirect_stdout(sys.stderr):
        finetune(None, options)
    differences = _differences(folder, output)
    if params["json"]:
        click.echo(json.dumps({"run": str(folder), "again": str(output), "differences": differences}))
    if not differences:
        if not params["json"]:
            click.echo(f"{output} has the same bits as {folder}: weights, losses and metrics")
        return
    raise DifferentBitsError(
        f"{output} is not {folder} again",
        why="\n    ".join(line for one in differences for line in wrapped(one, WIDTH - 4)),
        fix="the same versions, processor and number of threads give the same bits; `flashtask doctor` shows both",
    )


def _differences(first: Path, again: Path) -> list[str]:
    """What is not the same, in words: columns of the log, tensors of the best checkpoint, versions and machine."""
    found = list(_log_differences(first, again))
    contents = [_weights_of(folder) for folder in (first, again)]
    if all(contents):
        one, two = (content["state_dict"] for content in contents if content)
        changed = [name for name in one if name not in two or not _is_same(one[name], two[name])]
        if changed:
            found.append(f"{len(changed):,} of {len(one):,} tensors differ, the first is {changed[0]}")
        places = [content["environment"] or {} for content in contents if content]
        known = sorted({name for place in places for name in place})
        found += [
            f"{name}: {places[0].get(name)} then, {places[1].get(name)} now"
            for name in known
            if found and places[0].get(name) != places[1].get(name)
        ]
    return found


def _log_differences(first: Path, again: Path) -> Iterator[str]:
    from flashtask.reports.history import History

    one, two = (History.read(folder / "metrics.csv") for folder in (first, again))
    if len(one) != len(two):
        yield f"{len(one)} epochs then, {len(two)} now"
        return
    for name in one.columns:
        if name in _OF_THE_MACHINE or name.endswith("seconds"):
            continue
        for before, after in zip(one, two, strict=True):
            if before.get(name) != after.get(name) and not _is_nan(before.get(name)):
                place = f"epoch {before.get('epoch', 0):.0f}"
                yield f"{name} of {place}: {before.get(name)} then, {after.get(name)} now"
                break


def _weights_of(folder: Path) -> dict[str, Any] | None:
    from flashtask.core.checkpoint import read_checkpoint
    from flashtask.core.model_path import model_path

    try:
        content = read_checkpoint(model_path(folder, quiet=True))
    except MissingInputError:
        return None
    return {"state_dict": content["state_dict"], "environment": content.get("environment")}


def _is_same(one: Any, two: Any) -> bool:
    import torch

    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, two)))  # NaN is itself again
