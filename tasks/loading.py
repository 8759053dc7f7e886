"""The task that a checkpoint, a folder or a repository on the hub holds, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import put_to_use, read_checkpoint
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.keywords import named_arguments
from flashtask.tasks import TASKS
from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS
from flashtask.tasks.pretrained.source import Source, find_source
from flashtask.trainer.checkpoints.restoring import module_from_content

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["load", "pretrained_task"]


@named_arguments
def load(path: Any, map_location: Any = None) -> Task:
    """The task in a checkpoint, a folder or a repository, in eval mode. No data and no code are needed or run.

    Args:
        path: of a checkpoint, or its https address; a run folder, which means its best checkpoint, else its last; a
            folder that `save_pretrained` wrote, or one in timm's layout; `hf://org/name@revision` for the hub.
        map_location: device for the weights.

    Raises:
        MissingInputError: there is no such file, or no model in the folder.
        HubError: the hub cannot be reached, or refuses.
        IntegrityError: the file is damaged, or it holds a module that is not a registered task.
    """
    source = find_source(path)
    content = _content(source, map_location)
    with put_to_use(source.path):
        kind = TASKS.get(_task_name(content, source))
    return _built(kind, content, source, {}, map_location)


def pretrained_task(cls: type[Task], source: Source, given: Mapping[str, Any], map_location: Any = None) -> Task:
    """A task of one class from a source, with arguments of the user's in place of stored ones.

    Args:
        cls: the class that it must be, or a parent of it.
        source: where it is.
        given: `learning_rate`, `optimizer`, ... for training on; `labels` or `num_classes` for another set of classes,
            `head` for another kind of head.
        map_location: device for the weights.

    Raises:
        UsageError: it is another task, or an argument belongs to the weights.
    """
    content = _content(source, map_location)
    kind = _class_of(cls, content, source)
    known = content["hyper_parameters"]
    for name in OF_THE_WEIGHTS:
        if name in given and not (isinstance(known.get(name), dict) and "not_saved" in known[name]):
            raise UsageError(
                f"{name} comes with the weights of {source.path}, and cannot be given",
                fix=f"leave {name} out, or begin from it alone: {kind.__name__}(backbone=...)",
            )
    return _built(kind, content, source, given, map_location)


def _content(source: Source, map_location: Any) -> dict[str, Any]:
    if not source.is_folder:
        return read_checkpoint(source.path, map_location=map_location)
    from flashtask.tasks.pretrained.reading import folder_content

    return folder_content(source.path)


def _task_name(content: Mapping[str, Any], source: Source) -> str:
    name = content.get("task")
    if not isinstance(name, str):
        raise IntegrityError(
            f"{source.path} does not say which task it holds",
            why="it was saved from a module that is not a registered task",
            fix=f"YourModule.load_from_checkpoint({str(source.path)!r})",
        )
    return name


def _class_of(cls: type[Task], content: Mapping[str, Any], source: Source) -> type[Task]:
    """The class to build: the registered one, or `cls` where it is a class of the user's for the same task."""
    name = _task_name(content, source)
    if cls.name == name:
        return cls
    with put_to_use(source.path):
        held = TASKS.get(name)
    if issubclass(held, cls):
        return held
    raise UsageError(
        f"{source.path} holds a task {name!r}, not {cls.name!r}",
        fix=f"{held.__name__}.from_pretrained(...), or flashtask.load(...)",
    )


def _built(
    cls: type[Task], content: dict[str, Any], source: Source, given: Mapping[str, Any], map_location: Any
) -> Task:
    """The task with the user's own arguments: classes and head as the weights have them, unless others are given."""
    classes = {name: given[name] for name in ("labels", "num_classes") if given.get(name) is not None}
    head = {name: given[name] for name in OF_THE_HEAD if given.get(name) is not None}
    own = {name: value for name, value in given.items() if name not in ("labels", "num_classes", *OF_THE_HEAD)}
    task: Task
    try:
        if head:
            task = _with_new_head(cls, content, source, {**own, **head})
        else:
            task = module_from_content(cls, content, source.path, given=own)
    except UsageError as error:
        error.fix = error.fix.replace(".load_from_checkpoint(", ".from_pretrained(")
        raise
    if classes:
        task.change_classes(**classes)
    task._has_new_head, task._has_other_weights = bool(head), False
    task.pretrained_from = source.origin
    return task.to(map_location) if map_location is not None and source.is_folder else task


def _with_new_head(cls: type[Task], content: dict[str, Any], source: Source, given: Mapping[str, Any]) -> Task:
    """The trained backbone under a head that is drawn anew, for classes that are given or learned later."""
    state = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith("backbone.")}
    dropped = (*OF_THE_HEAD, "labels", "num_classes")
    arguments = {name: value for name, value in content["hyper_parameters"].items() if name not in dropped}
    changed = {**content, "hyper_parameters": arguments, "state_dict": state, "labels": None}
    task: Task = module_from_content(cls, changed, source.path, strict=False, given=given)
    missing = [name for name in task.state_dict() if name.startswith("backbone.") and name not in state]
    if missing:
        raise IntegrityError(f"{source.path} does not hold the whole backbone", why=f"there is no {missing[0]}")
    return task
