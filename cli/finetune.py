"""`flashtask finetune`: a recipe becomes a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flashtask.cli.options import CONSTRUCTOR
from flashtask.cli.output import require_free
from flashtask.cli.parts import build_parts
from flashtask.cli.processes import OF_THE_MACHINE, agreed, here, launched, refuse_search, require_same
from flashtask.cli.recipe import Recipe, is_path
from flashtask.cli.request import requested_recipe, require_data
from flashtask.cli.resume import Start, resume
from flashtask.cli.several_runs import are_several_runs, train_several
from flashtask.trainer.checkpoints.newest import newest_whole_checkpoint
from flashtask.trainer.run_folder import was_begun_by_us

__all__ = ["finetune"]


def finetune(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command; what can be checked without torch is checked before it is imported.

    Args:
        data: the folder or recipe that the user named, if any.
        params: the options of the command.
    """
    requested = requested_recipe(data, params)
    if are_several_runs(requested, params):
        train_several(requested, params)
        return
    start = resume(requested) if params["resume"] else Start(requested)
    if start.remark:
        print(start.remark, file=sys.stderr)
    others = here()
    if start.is_finished and others is None:
        return
    place = _place(start.recipe)
    if start.is_new and (others is None or not others.rank) and not was_begun_by_us(place):
        require_free(place)
    require_data(start.recipe)
    with launched(start.recipe.get("trainer", {})) as strategy:
        require_same(strategy, _what_is_asked(start))
        folder = None if start.is_finished else _train(start, strategy)
    if folder is not None:
        _say_result(folder)


def _place(recipe: Recipe) -> Path:
    """The run folder, or the folder in which the engine chooses one."""
    output, root = recipe.get("trainer.output_dir"), recipe.get("trainer.default_root_dir")
    return Path(output) if output else Path(root or ".").absolute() / "runs"


def _what_is_asked(start: Start) -> dict[str, Any]:
    """The recipe without what each machine may have otherwise, and whether there is a run to go on with."""
    own = (*OF_THE_MACHINE, start.recipe.here(f"data.{CONSTRUCTOR}.num_workers"))
    asked = {key: value for key, value in start.recipe.leaves() if not is_path(key) and key not in own}
    return {**asked, "the run is continued": start.folder is not None, "the run is finished": start.is_finished}


def _train(start: Start, strategy: Any) -> Path | None:
    """Build the parts that the recipe names and run it; gives the run folder, None if this process writes nothing."""
    agreed(strategy, start.clear)
    parts = build_parts(start.recipe, strategy)
    if parts.searched:
        refuse_search(strategy)
        click.echo(parts.tune())
    if parts.finetune.get("budget"):
        refuse_search(
            strategy, "--budget", "flashtask plan DATA --budget TIME, with one process; then --strategy S --epochs N"
        )
    folder = start.folder
    checkpoint = None if folder is None else agreed(strategy, lambda: newest_whole_checkpoint(folder))
    trainer = parts.trainer
    trainer.says_result = False
    trainer.finetune(parts.model, datamodule=parts.datamodule, ckpt_path=checkpoint, **parts.finetune)
    return trainer.output_dir if trainer.run_folder is not None else None


def _say_result(folder: Path) -> None:
    """The best epoch, where the run is, and what to do with it."""
    from flashtask.trainer.fit_result import shown_metrics, shown_path

    best = json.loads((folder / "summary.json").read_text())["best"]
    shown = shown_path(folder)
    click.echo(f"best epoch {best.get('epoch', 0):.0f}: {shown_metrics(best)}")
    click.echo(f"run folder: {shown}")
    if (folder / "report.html").exists():
        click.echo(f"report: {os.path.join(shown, 'report.html')}")
    if (folder / "best.ckpt").exists():
        click.echo(f"next: flashtask predict {shlex.quote(os.path.join(shown, 'best.ckpt'))} IMAGE")
