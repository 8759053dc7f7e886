"""`flashtask finetune --repeats N --folds N`: several runs of one recipe, begun, resumed and summed up as one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashtask.cli.output import require_creatable, require_free
from flashtask.cli.processes import are_several
from flashtask.cli.recipe import SEVERAL, Recipe, asked_for_several, read_recipe
from flashtask.cli.request import fill_in, require_data
from flashtask.cli.resume import merged
from flashtask.core.errors import UsageError

if TYPE_CHECKING:
    from flashtask.tasks.repeats import PlannedRun, RepeatedRuns

__all__ = ["are_several_runs", "train_several"]

#: What an argument of data constructors is called that names validation data.
_OF_VALIDATION = ("val_folder", "val_file", "split_field")


def are_several_runs(requested: Recipe, params: Mapping[str, Any]) -> bool:
    """Whether several runs are asked for, or are to be resumed.

    Args:
        requested: what was asked for.
        params: the options of the command.
    """
    if asked_for_several(requested):
        return True
    if requested.get("vary") is not None:
        raise UsageError(f"{requested.source_of('vary')} is for several runs", fix="--repeats 5 --vary split")
    there = _recipe_of(requested) if params["resume"] else None
    return there is not None and there.is_file() and bool(asked_for_several(read_recipe(there)))


def train_several(requested: Recipe, params: Mapping[str, Any]) -> None:
    """Train all runs that are not finished, and print what they say together.

    Args:
        requested: what was asked for.
        params: the options of the command.

    Raises:
        UsageError: no folder to resume, other settings than those of the runs in it, or no folds can be made.
        OutputError: the folder is taken, or cannot be written.
    """
    there = _recipe_of(requested)
    if params["resume"] and there is None:
        raise UsageError("--resume needs to know the runs", fix="flashtask finetune --resume --output-dir runs/000")
    recipe = requested
    if params["resume"] and there is not None:
        require_creatable(there.parent)
        if there.is_file():
            recipe = merged(read_recipe(there), requested)
        else:
            print(f"nothing to resume in {there.parent}: starting", file=sys.stderr)
    elif there is not None:
        require_free(there.parent)
    if are_several(recipe.get("trainer", {})):
        raise UsageError(
            "--repeats and --folds train in one process",
            why="every process would have to be started again for each run",
            fix="train the folds one by one: --fold 1/5 --distributed ddp, or leave out --devices and --distributed",
        )
    _require_split(recipe)
    require_data(recipe)
    fill_in(recipe)
    with redirect_stdout(sys.stderr):
        made = _trained(recipe, is_resumed=there is not None and params["resume"])
    from flashtask.trainer.fit_result import shown_path

    click.echo("\n".join(made.lines()))
    click.echo(f"runs: {shown_path(made.folder)}")
    if (page := made.folder / "report.html").exists():
        click.echo(f"report: {shown_path(page)}")


def _recipe_of(requested: Recipe) -> Path | None:
    """The recipe of all runs in the folder that is asked for."""
    output = requested.get("trainer.output_dir")
    return Path(output) / "recipe.yaml" if output else None


def _require_split(recipe: Recipe) -> None:
    """What is to vary can vary.

    Raises:
        UsageError: folds or splits are asked for, and the validation data is given; or a single fold is.
    """
    section = f"data.{recipe.constructor}"
    said = {name: recipe.get(f"{section}.{name}") for name in (*_OF_VALIDATION, "fold", "val_split")}
    given = next((name for name in _OF_VALIDATION if said[name] is not None), "")
    folds, vary = recipe.get("folds"), recipe.get("vary")
    if folds and (given or said["fold"] or said["val_split"]):
        name = given or ("fold" if said["fold"] else "val_split")
        raise UsageError(
            f"folds and {name} ({recipe.source_of(f'{section}.{name}')}) both define the validation data",
            why="each training image validates in one of the folds, and images that are given to validate in none",
            fix=f"leave out {name} (--set {section}.{name}=null), or take --repeats",
        )
    if vary in ("split", "both") and not folds and not said["val_split"]:
        raise UsageError(
            f"--vary {vary}: there is no split that could vary{f', as {given} is given' if given else ''}",
            fix="--folds 5, or --val-split 0.2 and no validation data",
        )


def _trained(recipe: Recipe, *, is_resumed: bool) -> RepeatedRuns:
    from flashtask.tasks.repeats import planned_runs, run_planned
    from flashtask.trainer.run_folder import RunFolder

    output = recipe.remove("trainer.output_dir")
    root = Path(recipe.remove("trainer.default_root_dir") or ".")
    claimed = RunFolder(Path(output), resume=is_resumed) if output else RunFolder.next_free(root)
    section, vary = f"data.{recipe.constructor}", recipe.get("vary") or "seed"
    try:
        claimed.write_recipe(recipe.values)
        plan = planned_runs(
            claimed.path,
            repeats=recipe.get("repeats") or 1,
            folds=recipe.get("folds"),
            vary=vary,
            seed=recipe.get("trainer.seed") or 0,
            split_seed=recipe.get(f"{section}.split_seed") or 0,
        )
        return run_planned(plan, lambda run: _train(recipe, run), claimed, vary)
    finally:
        claimed.release()


def _train(recipe: Recipe, run: PlannedRun) -> None:
    from flashtask.cli.trained_run import trained_run

    own = Recipe(copy.deepcopy(recipe.values), dict(recipe.sources))
    for key in SEVERAL:
        own.remove(key)
    own.set("trainer.seed", run.seed, "--repeats")
    own.set("trainer.output_dir", str(run.folder), "--output-dir")
    for name, value in run.split.items():
        if name == "fold" or value:
            own.set(f"data.{recipe.constructor}.{name}", value, "--folds" if name == "fold" else "--vary")
    print(f"{run.name}: {run.folder}", file=sys.stderr)
    trained_run(own)
