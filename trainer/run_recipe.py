"""The recipe of a run: what describes it in names and numbers, so that it can be run again, and what it cannot hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from flashtask.core.zoo import own_zoo_files
from flashtask.trainer.by_name import NOT_PLAIN, WATCHING, plain_setting, recipe_of_part
from flashtask.trainer.callbacks.names import CALLBACKS
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.hyperparameters import find_not_saved
from flashtask.trainer.loggers.base import LOGGERS
from flashtask.trainer.placement.accelerators import ACCELERATORS
from flashtask.trainer.placement.precision import MixedPrecision, Precision, ScaledPrecision, TruePrecision
from flashtask.trainer.placement.strategies import STRATEGIES
from flashtask.trainer.profiling.profilers import PROFILERS, PassThrough

__all__ = ["recipe_of", "told_of_recipe"]

#: What each section says in its own way, where a run writes, and what only `tune` reads.
_LEFT_OUT = (
    *("output_dir", "default_root_dir", "callbacks", "logger", "profiler", "plugins", "precision", "strategy"),
    *("accelerator", "seed", "max_epochs", "max_steps"),
)


def recipe_of(run: FitRun) -> dict[str, Any] | None:
    """The sections `task`, `data`, `model`, `trainer` and `finetune`; None for a module that has no recipe.

    `not_saved` names what the recipe cannot hold, such as an object of the user's: dotted key -> what it is. Where zoo
    files of the user's are in use, `zoo` names them.
    """
    module = run.module.recipe()
    if module is None:
        return None
    lost: dict[str, str] = {**module.get("not_saved", {}), **_replaced(run)}
    finetune = {"strategy": "no_freeze", "restore_best": False}
    if run.finetuning is not None:
        finetune = {"strategy": run.finetuning.recipe(), "restore_best": run.restores_best}
    own = [str(file.path) for file in own_zoo_files()]
    recipe = {
        **({"task": module["task"]} if "task" in module else {}),
        **({"zoo": own} if own else {}),
        "data": _data(run, module.get("data", {}), lost),
        "model": module["model"],
        "trainer": _settings(run, lost),
        "finetune": finetune,
    }
    if run.resume_from is not None:
        # The weights that it begins with are those of the first run, whatever this module was.
        lost.pop("model.weights", None)
        if "model.weights" in run.lost_before:
            lost["model.weights"] = run.lost_before["model.weights"]
    return {**recipe, "not_saved": lost} if lost else recipe


def told_of_recipe(recipe: Mapping[str, Any] | None) -> str:
    """What is said at the start of a run of what its recipe cannot hold; empty if there is nothing."""
    lost = (recipe or {}).get("not_saved")
    if not lost:
        return ""
    names = ", ".join(f"{key.rpartition('.')[2]}={what}" for key, what in lost.items())
    if all(key in WATCHING for key in lost):
        return f"recipe.yaml cannot hold {names}: a repeat goes without"
    return f"recipe.yaml cannot hold {names}: a repeat needs {'it' if len(lost) == 1 else 'them'} from Python"


def _replaced(run: FitRun) -> dict[str, str]:
    """What was put in place of a method or setting of a class: `model.loss = ...`, `trainer.loops = ...`."""
    lost = {"trainer.loops": "<your own>"} if run.trainer.has_own_loops else {}
    for section, owner in (("model", run.module), ("data", run.data)):
        if not type(owner).__module__.startswith("flashtask."):
            continue  # its own constructor may set them, and will do so again
        # What the constructor has set by its arguments stands in the recipe as these arguments.
        known = getattr(owner, "_set_by_arguments", {})
        names = [name for name in vars(owner) if name[:1] != "_" and hasattr(type(owner), name)]
        names = [name for name in names if name not in known or getattr(owner, name) is not known[name]]
        lost |= {f"{section}.{name}": "<set on the object>" for name in names if name not in _SET_BY_RUNS}
    return lost


#: Attributes with a value in the class that runs, files and the engine set on objects.
_SET_BY_RUNS = ("trainer", "provenance", "pretrained_from", "was_fitted", "default_precision", "training")


def _data(run: FitRun, of_module: Mapping[str, Any], lost: dict[str, str]) -> dict[str, Any]:
    """The section `data`: the constructor that makes the data again, with what the module was given for it."""
    data = getattr(run.data, "recipe", lambda: None)()
    made_by = getattr(run.module, "data_class", None)
    if data is None or type(run.data) is not made_by:
        lost["data"] = f"<{type(run.data).__name__}>"
        return {}
    ((constructor, arguments),) = data.items()
    arguments |= {name: value for name, value in of_module.items() if name not in arguments}
    lost |= {f"data.{constructor}.{where}": f"<{kind}>" for where, kind in find_not_saved(arguments)}
    return {constructor: {name: value for name, value in arguments.items() if not any(find_not_saved(value))}}


def _settings(run: FitRun, lost: dict[str, str]) -> dict[str, Any]:
    """What was said otherwise than it is by default, and what decides the numbers in any case."""
    trainer = run.trainer
    defaults = {name: p.default for name, p in inspect.signature(type(trainer)).parameters.items()}
    settings = {"max_epochs": trainer.epochs_of(run.module), "max_steps": trainer.max_steps}
    for name, given in trainer.arguments.items():
        # An attribute may have been changed since the trainer was made.
        value = plain_setting(getattr(trainer, name, given)) if name not in _LEFT_OUT else defaults[name]
        if value is NOT_PLAIN:
            lost[f"trainer.{name}"] = f"<{type(given).__name__}>"
        elif value != defaults[name]:
            settings[name] = value
    settings |= dict(_placement(run, lost)) | {"seed": run.seed} | dict(_named(trainer, lost))
    return {name: settings[name] for name in defaults if name in settings}


def _placement(run: FitRun, lost: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Precision, strategy and accelerator: by name, also where they were given as objects that have one."""
    given, place, precision = run.trainer.arguments, run.placement, run.trainer.precision
    if precision is None and type(place.precision) in _NAMED_PRECISIONS and not _brings_precision(run):
        yield "precision", str(run.module.default_precision)
    elif isinstance(precision, (str, int)):
        yield "precision", str(precision)
    elif type(place.precision) in _NAMED_PRECISIONS:
        yield "precision", place.precision.name
    else:
        lost["trainer.precision"] = f"<{type(place.precision).__name__}>"
    if isinstance(given["strategy"], str) and not given["plugins"]:
        if given["strategy"] != "auto":
            yield "strategy", given["strategy"]
    elif STRATEGIES.name_of(type(place.strategy)) is None:
        lost["trainer.strategy"] = f"<{type(place.strategy).__name__}>"
    elif place.strategy.name != "single":
        yield "strategy", place.strategy.name
    accelerator = run.trainer.accelerator
    if not isinstance(accelerator, str):
        if ACCELERATORS.name_of(type(place.accelerator)) is None:
            lost["trainer.accelerator"] = f"<{type(place.accelerator).__name__}>"
        else:
            yield "accelerator", place.accelerator.name
    elif accelerator != "auto":
        yield "accelerator", accelerator


_NAMED_PRECISIONS = (Precision, TruePrecision, MixedPrecision, ScaledPrecision)


def _brings_precision(run: FitRun) -> bool:
    """Whether a plugin or the strategy says the precision, in place of the argument."""
    return bool(run.trainer.arguments["plugins"]) or run.strategy.precision_plugin is not None


def _named(trainer: Any, lost: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Callbacks, loggers and the profiler by name."""
    parts: dict[str, tuple[Any, Any]] = {"callbacks": (trainer.callbacks, CALLBACKS)}
    given = trainer.arguments["logger"]
    if given is False:
        yield "logger", False
    elif given is not True and given is not None:
        parts["logger"] = (trainer.loggers, LOGGERS)
    if type(trainer.profiler) is not PassThrough:
        parts["profiler"] = ([trainer.profiler], PROFILERS)
    for name, (objects, registry) in parts.items():
        written = [(one, recipe_of_part(one, registry)) for one in objects]
        if unknown := [type(one).__name__ for one, form in written if form is None]:
            lost[f"trainer.{name}"] = ", ".join(f"<{kind}>" for kind in unknown)
        forms = [form for _, form in written if form is not None]
        if name == "logger":
            forms = [form for form in forms if form != {"csv": {}}] or forms  # it is there in any case
        if forms:
            yield name, forms
