"""Classes of a user's own: what files say of them, and what a model can do where they, or their arguments, are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.tasks import TASKS
from flashtask.tasks.arguments import OF_THE_HEAD, OF_THE_TRAINING, OF_THE_WEIGHTS
from flashtask.trainer.hyperparameters import MissingArgument, find_not_saved

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["Lack", "class_in_file", "describe_class", "is_of_a_child", "require_same_prediction", "with_stand_ins"]

#: Methods that a prediction goes through, or that decide what it is made by; a loss and metrics are not among them.
_PREDICTING = (
    *(
        "forward",
        "__call__",
        "_features",
        "make_head",
        "postprocess",
        "predict",
        "predict_step",
        "predictions",
        "rebuild",
    ),
    "to_predictions",
)


@dataclass(frozen=True)
class Lack:
    """What a loaded model does not have, though it predicts without it.

    Args:
        what: in words.
        fix: a line of code that loads it with all.
        only_to_train: it can be validated and tested all the same.
    """

    what: str
    fix: str
    only_to_train: bool = False

    def require_none(self, stage: str) -> None:
        """Refuse a stage that needs it.

        Raises:
            UsageError: it does.
        """
        if stage != "predict" and (stage == "fit" or not self.only_to_train):
            name = {"fit": "training", "validate": "validation"}.get(stage, stage)
            why = "it cannot be stored in a file; this model was loaded without it and can only predict"
            raise UsageError(f"{name} needs {self.what}", why=why, fix=self.fix)


def describe_class(kind: type[Task]) -> dict[str, Any]:
    """What a file says of a task's class: the registered name; of a class without one its own, and what it changes.

    A class that neither is registered nor gives itself a `name` is a kind of the registered one that it is made from.
    """
    parents: list[type[Any]] = [parent for parent in kind.__mro__ if hasattr(parent, "make_metrics")]
    names = [TASKS.name_of(parent) for parent in parents]
    if names[0] is not None:
        return {"task": names[0]}
    level = next((level for level, name in enumerate(names) if name is not None), len(parents))
    own = parents[:level]
    is_named = level == len(parents) or any("name" in vars(one) for one in own)
    changed = [name for name in _PREDICTING if any(name in vars(one) for one in own)]
    task = kind.name if is_named else names[level]
    return {"task": task, "own_class": {"name": kind.__name__, "predicts_by": changed}}


def class_in_file(content: Mapping[str, Any]) -> str | None:
    """The name of the class of its own that a file was written by; None for a registered one."""
    own = content.get("own_class")
    if not isinstance(own, Mapping):
        return None
    name = own.get("name")
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else "TheClass"


def is_of_a_child(kind: type[Task], content: Mapping[str, Any]) -> bool:
    """Whether a file was written by a class of its own, and is to be used by the registered class behind it."""
    return class_in_file(content) not in (None, kind.__name__) and TASKS.name_of(kind) is not None


def require_same_prediction(content: Mapping[str, Any], path: Any, fix: str) -> None:
    """The class of its own that wrote a file predicts as the registered one does.

    Raises:
        UsageError: it does not, so that its parent would predict something else.
    """
    changed = content["own_class"].get("predicts_by")
    if changed:
        names = ", ".join(str(name)[:50] for name in changed[:5])
        raise UsageError(
            f"{path} was written by {class_in_file(content)}, a custom class for the task {content['task']!r}",
            why=f"it overrides how predictions are made ({names}), and a file holds no code",
            fix=fix,
        )


def with_stand_ins(kind: type[Task], content: dict[str, Any], path: Any) -> tuple[dict[str, Any], Lack | None]:
    """The content with something in place of arguments that no file could hold and that prediction may not need.

    Those that belong to training get their defaults; any other becomes an object that names itself when it is used.

    Returns:
        The content, and what the model will lack.
    """
    arguments = dict(content.get("hyper_parameters") or {})
    needed = (*OF_THE_WEIGHTS, *OF_THE_HEAD, "labels", "num_classes", "num_outputs")
    lost = {
        name: next(find_not_saved(value))[1]
        for name, value in arguments.items()
        if name not in needed and any(find_not_saved(value))
    }
    if not lost or content.get("hyper_parameters_form") is not None:
        return content, None
    given = ", ".join(f"{name}=..." for name in lost)
    fix = f"{kind.__name__}.load_from_checkpoint({str(path)!r}, {given})"
    named = ", ".join(f"{name} ({what[:100]})" for name, what in lost.items())
    for name, what in lost.items():
        if name in OF_THE_TRAINING:
            del arguments[name]
        else:
            arguments[name] = MissingArgument(name, what, fix)
    lack = Lack(named, fix, only_to_train=all(name in OF_THE_TRAINING for name in lost))
    return {**content, "hyper_parameters": arguments}, lack
