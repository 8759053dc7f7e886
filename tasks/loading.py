"""The task that a checkpoint, a folder or a repository on the hub holds, whichever it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flashtask.core.checkpoint import error_context
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.keywords import named_arguments
from flashtask.tasks import TASKS
from flashtask.tasks.own_class import Lack, class_in_file, is_of_a_child, with_stand_ins
from flashtask.tasks.pretrained.source import Source, find_source
from flashtask.tasks.stored_task import build_task, content_of, registered_class, task_name
from flashtask.tasks.task import Task

__all__ = ["load"]


@named_arguments
def load(path: Any, map_location: Any = None, *, task: type[Task] | None = None) -> Task:
    """The task in a checkpoint, a folder or a repository, in eval mode. No data and no code are needed or run.

    What only a loss or a metric needs may be missing: a class of the user's own that changes nothing else, or an
    argument that no file can hold. Then the model predicts, which is said, and any other stage names what it needs.

    Args:
        path: of a checkpoint, or its https address; a run folder, which means its best checkpoint, else its last; a
            folder that `save_pretrained` wrote, or one in timm's layout; `hf://org/name@revision` for the hub.
        map_location: device for the weights.
        task: the class that it is, in place of the registered one.

    Raises:
        MissingInputError: there is no such file, or no model in the folder.
        HubError: the hub cannot be reached, or refuses.
        UnknownNameError: it holds a task that is not registered here.
        UsageError: it was written by a class of the user's own that predicts in its own way.
        IntegrityError: the file is damaged, or it holds a module that is no task.
    """
    source = find_source(path)
    content = content_of(source, map_location)
    kind = registered_class(content, source) if task is None else _given_class(task, content, source)
    with error_context(source.path):
        with_all, lack = with_stand_ins(kind, content, source.path)
    loaded = _built_for_prediction(kind, with_all, content, source, map_location)
    if is_of_a_child(kind, content):
        name = class_in_file(content)
        fix = f"flashtask.load({str(source.path)!r}, task={name})"
        lack = Lack(f"the loss and metrics of the class {name}", fix)
        loaded._class_of_weights = {key: content[key] for key in ("task", "own_class")}
    if lack is not None:
        loaded._lack = lack
        stages = "train" if lack.only_to_train else "validate, test or train"
        print(f"{source.path} predicts without {lack.what}; to {stages}: {lack.fix}", file=sys.stderr)
    return loaded


def _given_class(task: Any, content: Mapping[str, Any], source: Source) -> type[Task]:
    """The class that the user names for a file.

    Raises:
        UsageError: it is no task, or one of another name.
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UsageError(f"load(task={task!r}): a subclass of flashtask.Task is needed", fix="task=MyTask")
    held = task_name(content, source)
    if held not in (task.name, TASKS.name_of(task)):
        raise UsageError(
            f"{source.path} holds a task {held[:100]!r}, but {task.__name__} is {task.name!r}",
            fix=f"flashtask.load({str(source.path)!r})",
        )
    return task


def _built_for_prediction(
    kind: type[Task], with_stand_ins: dict[str, Any], content: dict[str, Any], source: Source, map_location: Any
) -> Task:
    """The task with stand-ins; where it cannot even be built with them, the error that asks for the arguments."""
    if with_stand_ins is content:
        return build_task(kind, content, source, {}, map_location)
    try:
        return build_task(kind, with_stand_ins, source, {}, map_location)
    except (UsageError, IntegrityError):
        return build_task(kind, content, source, {}, map_location)
