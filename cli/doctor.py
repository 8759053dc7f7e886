"""`flashtask doctor`: is a run or a checkpoint whole, and from where can it be resumed? Nothing is changed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtask.cli.recipe import asked_for_several, read_recipe
from flashtask.cli.resume import how_finished, lost_for_resuming
from flashtask.core.errors import FlashtaskError, IntegrityError, MissingInputError
from flashtask.core.files import missing_file
from flashtask.core.plain_json import read_json
from flashtask.trainer.checkpoints.newest import checkpoints_in
from flashtask.trainer.run_folder import files_of_a_run, owner_of

if TYPE_CHECKING:
    import torch

__all__ = ["CheckedCheckpoint", "check_checkpoint", "doctor"]


@dataclass(frozen=True)
class CheckedCheckpoint:
    """What was found out about one checkpoint.

    Args:
        path: of the file.
        problem: why it cannot be used; empty for a file that is as it was written and holds finite weights.
        can_be_resumed: it holds optimizers, schedules, random state and the place in the data, not weights alone.
        epoch: the last one that was trained in, from 0; None where the file cannot be read.
        is_between_epochs: the epoch was complete.
        step: optimizer steps so far.
        metrics: of that epoch.
        written_by: versions and machine facts that it was written with.
    """

    path: Path
    problem: str = ""
    can_be_resumed: bool = False
    epoch: int | None = None
    is_between_epochs: bool = True
    step: int | None = None
    metrics: Mapping[str, float] | None = None
    written_by: Mapping[str, Any] | None = None


def doctor(source: str, as_json: bool) -> None:
    """Run the command.

    Args:
        source: a run folder or a checkpoint.
        as_json: one JSON object in place of text.

    Raises:
        MissingInputError: there is no such path, or no run in the folder.
        IntegrityError: after the report, if anything in it is damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise missing_file(path)
    if path.is_dir() and not files_of_a_run(path):
        raise MissingInputError(f"there is no run in {path}", fix="give a run folder or a .ckpt file")
    if path.is_dir() and (path / "recipe.yaml").is_file() and asked_for_several(read_recipe(path / "recipe.yaml")):
        own = sorted(file.parent for file in path.glob("*/recipe.yaml"))
        raise MissingInputError(
            f"{path} holds several runs",
            fix=f"flashtask doctor {own[0] if own else 'RUN'}; flashtask finetune --resume --output-dir {path}",
        )
    files = checkpoints_in(path) if path.is_dir() else [path]
    checked = [check_checkpoint(file) for file in files]
    others = _problems_of_run(path) if path.is_dir() else {}
    resume = _resume_advice(path, checked) if path.is_dir() else ""
    problems = {one.path.name: one.problem for one in checked if one.problem} | others
    if as_json:
        found = [{**asdict(one), "path": str(one.path)} for one in checked]
        click.echo(json.dumps({"path": str(path), "checkpoints": found, "problems": problems, "resume": resume}))
    else:
        for line in _report(path, checked, others, resume):
            click.echo(line)
    if problems:
        raise IntegrityError(
            f"{path}: {', '.join(problems)} cannot be used as it is", why=next(iter(problems.values()))
        )


def check_checkpoint(path: Path) -> CheckedCheckpoint:
    """Read a checkpoint whole: its digest, its structure and whether its weights are finite."""
    from flashtask.core.checkpoint import read_checkpoint

    try:
        content = read_checkpoint(path)
    except FlashtaskError as error:
        return CheckedCheckpoint(path, problem=error.what + (f" ({error.why})" if error.why else ""))
    progress = content.get("progress")
    bad = list(_not_finite(content.get("state_dict") or {}))
    return CheckedCheckpoint(
        path,
        problem=f"NaN or infinite values in {len(bad)} tensors, such as {bad[0]}" if bad else "",
        can_be_resumed=progress is not None,
        epoch=content.get("epoch"),
        is_between_epochs=progress is None or bool(progress["epoch_is_complete"]),
        step=content.get("global_step"),
        metrics=content.get("metrics"),
        written_by=content.get("environment"),
    )


def _not_finite(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield name


def _problems_of_run(folder: Path) -> dict[str, str]:
    """What is wrong with a run's files besides its checkpoints: file name -> problem."""
    found: dict[str, str] = {}
    if (folder / "recipe.yaml").exists():
        try:
            read_recipe(folder / "recipe.yaml")
        except FlashtaskError as error:
            found["recipe.yaml"] = error.what
    if (folder / "summary.json").exists():
        try:
            read_json(folder / "summary.json")
        except FlashtaskError as error:
            found["summary.json"] = error.what
    return found


def _resume_advice(folder: Path, checked: list[CheckedCheckpoint]) -> str:
    """What `--resume` would do in a run folder, in a sentence."""
    if owner := owner_of(folder):
        return f"not now: {owner} is running in it"
    command = f"flashtask finetune --output-dir {shlex.quote(str(folder))} --resume"
    usable = [one for one in checked if one.can_be_resumed and not one.problem]
    if not (folder / "recipe.yaml").exists():
        place = f', ckpt_path="{usable[0].path}"' if usable else ""
        return f"in Python alone, since it has no recipe.yaml: trainer.finetune(model, data{place})"
    try:
        recipe = read_recipe(folder / "recipe.yaml")
        if lost := lost_for_resuming(recipe, folder):
            return f"in Python alone: recipe.yaml does not hold {', '.join(lost)}"
        if finished := how_finished(folder, recipe):
            longer = f"; to train longer: {command} --epochs N" if finished == "is finished" else ""
            return f"nothing is left to do, the run {finished}{longer}"
    except FlashtaskError as error:
        return f"not possible: {error.what}"
    if not checked:
        return f"{command} (from the beginning: it was stopped before its first checkpoint)"
    if not usable:
        return "not possible: no checkpoint is whole and holds more than weights"
    first = usable[0]
    place = f"after epoch {first.epoch}" if first.is_between_epochs else f"in epoch {first.epoch}, step {first.step}"
    return f"{command} (goes on from {first.path.name}, {place})"


def _report(path: Path, checked: list[CheckedCheckpoint], others: Mapping[str, str], resume: str) -> Iterator[str]:
    from flashtask.trainer.text_table import text_table, wrapped

    yield str(path)
    if checked:
        rows = [(one.path.name, _state(one), _place(one), _metrics(one), _size(one.path)) for one in checked]
        yield text_table(("checkpoint", "state", "place", "metrics", "size"), rows, num_left=4)
    for one in checked:
        if one.problem:
            yield from wrapped(f"{one.path.name}: {one.problem}")
    for name, problem in others.items():
        yield from wrapped(f"{name}: {problem}")
    for line in dict.fromkeys(_environment(one.written_by) for one in checked if one.written_by):
        yield from wrapped(f"written with {line}")
    if resume:
        yield f"resume: {resume}"


def _state(one: CheckedCheckpoint) -> str:
    return "unusable" if one.problem else "whole" if one.can_be_resumed else "whole, weights only"


def _place(one: CheckedCheckpoint) -> str:
    if one.epoch is None:
        return ""
    return f"epoch {one.epoch}{'' if one.is_between_epochs else ' (part)'}, step {one.step}"


def _metrics(one: CheckedCheckpoint) -> str:
    shown = {name: value for name, value in (one.metrics or {}).items() if name.startswith("val_")}
    return ", ".join(f"{name} {value:.4g}" for name, value in list(shown.items())[:2])


def _size(path: Path) -> str:
    return f"{os.path.getsize(path) / 1e6:.1f} MB"


def _environment(facts: Mapping[str, Any]) -> str:
    named = {name: facts[name] for name in ("flashtask", "torch", "python") if name in facts}
    versions = ", ".join(f"{name} {value}" for name, value in named.items())
    rest = [str(facts[name]) for name in ("device", "cpu_capability") if facts.get(name)]
    numbers = [f"{name} {facts[name]}" for name in ("precision", "threads") if facts.get(name)]
    return ", ".join([versions, *rest, *numbers])
