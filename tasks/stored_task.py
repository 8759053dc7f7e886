"""A task from what a file holds: which class it is, and the task with the weights and arguments of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import MapLocation, error_context, read_checkpoint
from flashtask.core.errors import IntegrityError, UnknownInFileError, UnknownNameError, UsageError
from flashtask.tasks import TASKS
from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_WEIGHTS
from flashtask.tasks.own_class import class_in_file, is_of_a_child, require_same_prediction
from flashtask.tasks.pretrained.source import Source
from flashtask.trainer.checkpoints.restoring import module_from_content

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["build_task", "content_of", "pretrained_task", "registered_class", "task_name"]


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
    content = content_of(source, map_location)
    kind = _class_of(cls, content, source)
    known = content["hyper_parameters"]
    for name in OF_THE_WEIGHTS:
        if name in given and not (isinstance(known.get(name), dict) and "not_saved" in known[name]):
            raise UsageError(
                f"{name} is part of the model in {source.path} and cannot be set",
                fix=f"leave out {name}, or build a new model: {kind.__name__}(backbone=...)",
            )
    return build_task(kind, content, source, given, map_location)


def content_of(source: Source, map_location: MapLocation) -> dict[str, Any]:
    """The content of a checkpoint, or the same from a folder in timm's layout."""
    if not source.is_folder:
        return read_checkpoint(source.path, map_location=map_location)
    from flashtask.tasks.pretrained.reading import folder_content

    return folder_content(source.path)


def task_name(content: Mapping[str, Any], source: Source) -> str:
    """The name of the task that a file holds.

    Raises:
        IntegrityError: it names none.
    """
    name = content.get("task")
    if not isinstance(name, str) or not name:
        raise IntegrityError(
            f"{source.path} does not say which task it holds",
            why="it was saved from a module that is not a registered task",
            fix=f"YourModule.load_from_checkpoint({str(source.path)!r})",
        )
    return name


def registered_class(content: Mapping[str, Any], source: Source) -> type[Task]:
    """The registered class of the task that a file holds.

    Raises:
        UnknownInFileError: none is registered under its name.
    """
    name = task_name(content, source)
    try:
        with error_context(source.path):
            return TASKS.get(name)
    except UnknownNameError as error:
        own = class_in_file(content) or "MyTask"
        raise UnknownInFileError(
            error,
            what=f"{source.path} holds a task {name[:100]!r}, but no task of this name is registered",
            why="it was trained by a class that is not part of flashtask, and a file holds no code",
            fix=f"import the module that registers it first (TASKS.register({name[:100]!r}, {own})), "
            f"or flashtask.load({str(source.path)!r}, task={own})",
        ) from error


def _class_of(cls: type[Task], content: Mapping[str, Any], source: Source) -> type[Task]:
    """The class to build: the registered one, or `cls` where it is a class of the user's for the same task."""
    name = task_name(content, source)
    if name in (cls.name, TASKS.name_of(cls)):
        return cls
    held = registered_class(content, source)
    if issubclass(held, cls):
        return held
    raise UsageError(
        f"{source.path} holds a task {name!r}, not {cls.name!r}",
        fix=f"{held.__name__}.from_pretrained(...), or flashtask.load(...)",
    )


def build_task(
    cls: type[Task], content: dict[str, Any], source: Source, given: Mapping[str, Any], map_location: Any
) -> Task:
    """The task with the user's own arguments: classes and head as the weights have them, unless others are given."""
    classes = {name: given[name] for name in ("labels", "num_classes") if given.get(name) is not None}
    head = {name: given[name] for name in OF_THE_HEAD if given.get(name) is not None}
    own = {name: value for name, value in given.items() if name not in ("labels", "num_classes", *OF_THE_HEAD)}
    with error_context(source.path):
        content, is_partial = _without_own_parts(cls, content, source)
    task: Task
    try:
        if head:
            task = _with_new_head(cls, content, source, {**own, **head})
        else:
            task = module_from_content(cls, content, source.path, strict=not is_partial, given=own)
    except UsageError as error:
        error.fix = error.fix.replace(".load_from_checkpoint(", ".from_pretrained(")
        raise
    if is_partial and not head:
        _require_whole(task, content, source)
    if classes:
        task.change_classes(**classes)
    task._has_new_head, task._has_other_weights = bool(head), False
    task.pretrained_from = source.record
    return task.to(map_location) if map_location is not None and source.is_folder else task


def _without_own_parts(cls: type[Task], content: dict[str, Any], source: Source) -> tuple[dict[str, Any], bool]:
    """The content that the registered class can take, of a file by a class of the user's own; and whether it is that.

    Raises:
        UsageError: that class predicts in its own way.
    """
    own = class_in_file(content)
    if not is_of_a_child(cls, content):
        return content, False
    require_same_prediction(content, source.path, f"flashtask.load({str(source.path)!r}, task={own})")
    known = cls.argument_names()
    arguments = {name: value for name, value in (content.get("hyper_parameters") or {}).items() if name in known}
    return {**content, "hyper_parameters": arguments}, True


def _require_whole(task: Task, content: Mapping[str, Any], source: Source) -> None:
    """Backbone and head have all their weights; what else the file has was of another class.

    Raises:
        IntegrityError: they do not.
    """
    state, own = content["state_dict"], task.state_dict()
    wrong = [name for name in own if name not in state]
    wrong += [name for name in state if name not in own and name.startswith(("backbone.", "head."))]
    if wrong:
        raise IntegrityError(
            f"{source.path}: its weights do not fit {type(task).__name__}",
            why=f"{class_in_file(content)}, the class that wrote it, has other parts: {', '.join(wrong[:3])}",
            fix=f"flashtask.load({str(source.path)!r}, task={class_in_file(content)})",
        )


def _with_new_head(cls: type[Task], content: dict[str, Any], source: Source, given: Mapping[str, Any]) -> Task:
    """The trained backbone under a head that is drawn anew, for classes that are given or learned later."""
    state = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith("backbone.")}
    dropped = (*OF_THE_HEAD, "labels", "num_classes")
    arguments = {name: value for name, value in content["hyper_parameters"].items() if name not in dropped}
    changed = {**content, "hyper_parameters": arguments, "state_dict": state, "labels": None, "operating": None}
    task: Task = module_from_content(cls, changed, source.path, strict=False, given=given)
    missing = [name for name in task.state_dict() if name.startswith("backbone.") and name not in state]
    if missing:
        raise IntegrityError(f"{source.path} does not hold the whole backbone", why=f"there is no {missing[0]}")
    return task
