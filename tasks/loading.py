"""`load`: the task that a checkpoint holds, whichever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import IntegrityError
from flashtask.tasks import TASKS
from flashtask.tasks.fetching import local_file
from flashtask.trainer.checkpoints.restoring import module_from_content

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["load"]


def load(path: Any, map_location: Any = None) -> Task:
    """The task in a checkpoint, in eval mode. No data and no code are needed, and none from the file is run.

    Args:
        path: of the file, or its https address.
        map_location: device for the weights.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: the file is damaged, or it holds a module that is not a registered task.
    """
    local = local_file(path)
    content = read_checkpoint(local, map_location=map_location)
    name = content.get("task")
    if not isinstance(name, str):
        raise IntegrityError(
            f"{local} does not say which task it holds",
            why="it was saved from a module that is not a registered task",
            fix=f"YourModule.load_from_checkpoint({str(local)!r})",
        )
    task: Task = module_from_content(TASKS.get(name), content, local)
    return task
