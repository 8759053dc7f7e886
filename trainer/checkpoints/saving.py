"""Writing the checkpoints of one moment: for all callbacks together, so that each file knows what the others keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import UnknownNameError
from flashtask.trainer.checkpoints.best_files import SavedFile
from flashtask.trainer.checkpoints.content import checkpoint_content, weights_only

if TYPE_CHECKING:
    from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint

__all__ = ["save_together", "write_last_files"]

Planned = Sequence[tuple["ModelCheckpoint", SavedFile]]


def save_together(
    trainer: Any,
    due: Sequence[ModelCheckpoint],
    ending: Sequence[ModelCheckpoint],
    values: Mapping[str, float],
    *,
    after_epoch: bool,
) -> None:
    """Write what callbacks want to write at this moment: the best first, then the last, then what has to go goes.

    After a failure, or a kill, at any point the files that were kept before are there, and nothing counts as kept that
    has not been written.

    Args:
        trainer: whose fit it is.
        due: the callbacks that look at this moment.
        ending: further ones, that want `last.ckpt` because the fit ends here.
        values: what was measured so far.
        after_epoch: an epoch is over, else a step.
    """
    if not due and not ending:
        return
    lasting = [one for one in (*due, *ending) if one.save_last]
    try:
        planned = _plan(trainer, due, values, after_epoch=after_epoch)
    except UnknownNameError:
        # What was trained is not lost: the run can be continued once the name is mended.
        write_last_files(trainer, lasting, checkpoint_content(trainer.fit_run))
        raise
    content = _write_best(trainer, due, planned)
    write_last_files(trainer, lasting, content, planned)
    for one in due:
        if trainer.is_global_zero:
            one.best.remove_leaving(trainer.say)
        if one.verbose:
            trainer.say(_report(trainer.fit_run, one, dict(planned).get(one)))


def write_last_files(
    trainer: Any, callbacks: Iterable[ModelCheckpoint], content: dict[str, Any], planned: Planned = ()
) -> None:
    """Write the `last.ckpt` of callbacks, each file once; where only links are wanted, link what was just written."""
    for path, asking in _by_last_file(callbacks).items():
        sources = [one.best.folder / file.name for one, file in planned if one in asking]
        may_link = bool(sources) and all(one.links for one in asking)
        if trainer.is_global_zero and not (may_link and _link(sources[0], path, asking, trainer.say)):
            write_checkpoint(path, content)
        for one in asking:
            one.last_model_path = str(path)
    trainer.strategy.barrier("checkpoint")


def _by_last_file(callbacks: Iterable[ModelCheckpoint]) -> dict[Path, list[ModelCheckpoint]]:
    found: dict[Path, list[ModelCheckpoint]] = {}
    for one in callbacks:
        found.setdefault(one.last_file, []).append(one)
    return found


def _plan(trainer: Any, due: Sequence[ModelCheckpoint], values: Mapping[str, float], *, after_epoch: bool) -> Planned:
    try:
        found = [(one, one.plan(trainer.fit_run, values, after_epoch=after_epoch)) for one in due]
    except BaseException:
        for one in due:
            one.best.undo()
        raise
    return [(one, file) for one, file in found if file is not None]


def _write_best(trainer: Any, due: Sequence[ModelCheckpoint], planned: Planned) -> dict[str, Any]:
    """Write the best files; gives what a whole checkpoint holds, for the last."""
    try:
        content = checkpoint_content(trainer.fit_run)
        for one, file in planned:
            if trainer.is_global_zero:
                path = one.best.folder / file.name
                write_checkpoint(path, weights_only(content) if one.save_weights_only else content)
            one.best.keep()
    except BaseException:
        for one in due:
            one.best.undo()
        raise
    return content


def _link(source: Path, path: Path, asking: Iterable[ModelCheckpoint], say: Callable[[str], None]) -> bool:
    """Give a file a second name, in one step; where that cannot be done it is said, and not tried again."""
    beside = path.with_name(f".{path.name}.link")
    try:
        beside.unlink(missing_ok=True)
        os.link(source, beside)
        os.replace(beside, path)
        beside.unlink(missing_ok=True)  # it is still there if both were names of one file already
    except OSError as error:
        say(f"{path} cannot be a link ({error.strerror}) and is written as a file of its own")
        for one in asking:
            one.links = False
        return False
    return True


def _report(run: Any, one: ModelCheckpoint, file: SavedFile | None) -> str:
    place = f"epoch {run.epoch}, step {run.global_step}"
    if file is None:
        return f"{place}: not among the best {one.save_top_k}" if one.save_top_k else f"{place}: looked at"
    score = "" if file.score is None else f", {one.metric} {file.score:.6g}"
    return f"{place}: wrote {one.best.folder / file.name}{score}"
