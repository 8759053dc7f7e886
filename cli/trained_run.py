"""One of several runs of a command: trained as its recipe says, from its last checkpoint if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.cli.parts import build_parts
from flashtask.cli.recipe import Recipe
from flashtask.cli.resume import resume
from flashtask.core.plain_json import read_json
from flashtask.trainer.checkpoints.newest import newest_whole_checkpoint

if TYPE_CHECKING:
    from flashtask.trainer.callbacks.callback import Callback

__all__ = ["trained_run"]


def trained_run(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train the run in `trainer.output_dir`, unless it is finished, and give its summary.

    Args:
        recipe: that was checked, with `trainer.output_dir`.
        callbacks: besides those of the recipe.
    """
    start = resume(recipe)
    if not start.is_finished:
        parts = build_parts(start.recipe)
        if parts.searched:
            parts.tune()
        parts.trainer.says_result = False
        checkpoint = None if start.folder is None else newest_whole_checkpoint(start.folder)
        start.clear()
        parts.trainer.callbacks += callbacks
        parts.trainer.finetune(parts.model, datamodule=parts.datamodule, ckpt_path=checkpoint, **parts.finetune)
    summary: dict[str, Any] = read_json(Path(recipe.get("trainer.output_dir")) / "summary.json")
    return summary
