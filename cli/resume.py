"""`--resume`: what is in the run folder, and whether what is asked for now is still that run."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.cli.kinds import AUTO
from flashtask.cli.model_source import is_same_source
from flashtask.cli.output import require_creatable
from flashtask.cli.parts import SEARCHED
from flashtask.cli.processes import are_several
from flashtask.cli.recipe import Recipe, read_recipe
from flashtask.cli.recipe_checks import lost_from
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.plain_json import read_json
from flashtask.core.registry import Registry
from flashtask.trainer.checkpoints.newest import checkpoints_in
from flashtask.trainer.finetuning.strategies import resolve_finetuning
from flashtask.trainer.run_folder import files_of_a_run, remove_remains

__all__ = [
    "FREE_KEYS",
    "Start",
    "how_finished",
    "lost_for_resuming",
    "merged",
    "resume",
]

#: What may differ when a run is continued: how long it is, and where and how visibly it runs.
FREE_KEYS = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.output_dir",
    "trainer.report",
    "data.from_folders.num_workers",
    "zoo",
)

_BATCH_SIZE = SEARCHED["batch_size"]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        recipe: of the run.
        folder: to continue from; None for a run from the beginning.
        remark: what to tell the user about it.
        is_finished: there is nothing left to do.
        remains: a folder with what a run wrote before its first checkpoint.
    """

    recipe: Recipe
    folder: Path | None = None
    remark: str = ""
    is_finished: bool = False
    remains: Path | None = None

    @property
    def is_new(self) -> bool:
        """There is nothing of this run yet."""
        return self.folder is None and self.remains is None and not self.is_finished

    def clear(self) -> None:
        """Take away what a run wrote before its first checkpoint, unless it still runs."""
        if self.remains is not None:
            remove_remains(self.remains)


def resume(requested: Recipe) -> Start:
    """Find the run to continue in `trainer.output_dir`; without one, begin it. Nothing is written.

    Raises:
        UsageError: no run folder is named, or what is asked for is another run; with the differences.
        OutputError: the folder cannot be written, or another process runs in it.
    """
    output = requested.get("trainer.output_dir")
    if not output:
        raise UsageError("--resume needs to know the run", fix="flashtask finetune --resume --output-dir runs/000")
    folder = Path(output)
    require_creatable(folder)
    if not files_of_a_run(folder):
        return Start(requested, remark=f"nothing to resume in {folder}: starting")
    if not (folder / "recipe.yaml").exists():
        raise UsageError(
            f"{folder} cannot be resumed: it has no recipe.yaml",
            why="the run was started in Python, with a module or data that a recipe cannot describe",
            fix=f'trainer.finetune(model, data, ckpt_path="{folder / "last.ckpt"}") in that script',
        )
    own = read_recipe(folder / "recipe.yaml")
    _require_whole(own, folder)
    recipe = merged(own, requested)
    if not checkpoints_in(folder):
        remark = f"{folder} was stopped before its first checkpoint: starting from the beginning"
        return Start(recipe, remark=remark, remains=folder)
    if finished := how_finished(folder, recipe):
        return Start(recipe, remark=f"nothing left to do: the run in {folder} {finished}", is_finished=True)
    return Start(recipe, folder, remark=f"resuming {folder}")


def lost_for_resuming(own: Recipe, folder: Path) -> dict[str, str]:
    """What a run needs to go on and its recipe does not hold; the weights it began with are in its checkpoint."""
    lost = lost_from(own)
    if checkpoints_in(folder):
        lost.pop("model.weights", None)
    return lost


def _require_whole(own: Recipe, folder: Path) -> None:
    if lost := lost_for_resuming(own, folder):
        named = ", ".join(f"{key}: {what}" for key, what in lost.items())
        raise UsageError(
            f"{folder} cannot be resumed from the command line: its recipe.yaml does not hold everything ({named})",
            why="a recipe cannot hold what was made in Python, and without it the run would be different",
            fix=f'trainer.finetune(model, data, ckpt_path="{folder / "last.ckpt"}") in that script',
        )


def merged(own: Recipe, requested: Recipe) -> Recipe:
    """The own recipe of one run or several with what may differ; anything else is refused, with both values."""
    free = {own.here(key) for key in FREE_KEYS}
    if are_several(own.get("trainer", {})) or are_several(requested.get("trainer", {})):
        free.add(own.here(_BATCH_SIZE))  # it is that of one process: with half of them, it is twice as large
    searched = {own.here(key) for key in SEARCHED.values()}
    different = []
    for key, value in requested.leaves():
        if key in free:
            own.set(key, value, requested.source_of(key))
        elif (value == AUTO and key in searched) or key == "finetune.budget":
            continue  # it was found when the run began
        elif key == "model.from" and is_same_source(own.get(key), value):
            continue
        elif key.startswith("data.") and key.endswith("_folder") and not Path(str(own.get(key))).exists():
            own.set(key, value, requested.source_of(key))  # it was moved; the checkpoint knows the names of its files
        elif _plain(key, value) != _plain(key, own.get(key, _default(key))):
            different.append(f"{key} is {own.get(key)!r} in the run, {value!r} now")
    if different:
        more = [f"and {len(different) - 4} more"] if len(different) > 4 else []
        raise UsageError(
            "--resume continues a run with its own settings",
            why="\n    ".join(["these settings differ:", *different[:4], *more]),
            fix="leave these out, or start another run with a new --output-dir and without --resume",
        )
    return own


def _plain(key: str, value: Any) -> Any:
    """A value in the one form of several that mean the same."""
    from flashtask.backbones import BACKBONES
    from flashtask.data.arguments import read_preprocessing
    from flashtask.trainer.by_name import named_form
    from flashtask.trainer.callbacks.callback_registry import CALLBACKS
    from flashtask.trainer.callbacks.timing import read_duration
    from flashtask.trainer.loggers.logger_registry import LOGGERS
    from flashtask.trainer.profiling.profilers import PROFILERS

    registries: dict[str, Registry[Any]] = {
        "trainer.callbacks": CALLBACKS,
        "trainer.logger": LOGGERS,
        "trainer.profiler": PROFILERS,
    }
    if value is None:
        return None
    if key in registries and not isinstance(value, bool):
        forms = named_form(value.lower() if isinstance(value, str) else value, registries[key])
        return [form for form in forms if form != {"csv": {}}] or forms
    if key == "trainer.max_time":
        return read_duration(value)
    if key.startswith("data.") and key.endswith(".preprocessing"):
        return read_preprocessing(value)
    if key in ("model.optimizer", "model.lr_scheduler") and isinstance(value, str):
        return value.lower()
    if key == "finetune.strategy":
        return resolve_finetuning(value).recipe()
    if key == "model.backbone" and isinstance(value, str):
        return BACKBONES.entry(value).name
    if key == "trainer.precision":
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _default(key: str) -> Any:
    """What a key of `trainer` means where the run's recipe does not say it: a recipe leaves out what is the default."""
    from flashtask.trainer.trainer import Trainer

    section, _, name = key.partition(".")
    parameter = inspect.signature(Trainer).parameters.get(name) if section == "trainer" else None
    return None if parameter is None else parameter.default


def how_finished(folder: Path, recipe: Recipe) -> str:
    """What is to be said of a run that has ended; empty if it goes on.

    Raises:
        IntegrityError: its `summary.json` cannot be read.
    """
    try:
        summary = read_json(folder / "summary.json")
    except FileNotFoundError:
        return ""
    if not isinstance(summary, dict) or not all(type(summary.get(key)) is int for key in ("epochs", "steps")):
        raise IntegrityError(
            f"{folder / 'summary.json'} was not written by flashtask, or was changed", fix=f"ls -l {folder}"
        )
    epochs, steps = recipe.get("trainer.max_epochs"), recipe.get("trainer.max_steps") or -1
    all_epochs = epochs is not None and 0 <= epochs <= summary["epochs"]
    if all_epochs or 0 < steps <= summary["steps"]:
        return "is finished"
    if not summary.get("stopped"):
        return ""
    epochs = f"{summary['epochs']} epoch{'s' if summary['epochs'] != 1 else ''}"
    further = f"to train its model further: flashtask finetune --from {shlex.quote(str(folder))}"
    return f"ended after {epochs}, and more epochs do not continue it: {summary['stopped']}\n{further}"
