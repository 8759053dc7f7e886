"""The record of a run: recipe and settings, the announcement at its start, its summary, the source of weights."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from flashtask._version import __version__
from flashtask.core.zoo import own_zoo_files
from flashtask.trainer.by_name import NOT_PLAIN, WATCHING, plain_setting, recipe_of_part
from flashtask.trainer.callbacks.callback_registry import CALLBACKS
from flashtask.trainer.devices.accelerators import ACCELERATORS
from flashtask.trainer.devices.precision import MixedPrecision, Precision, ScaledPrecision, TruePrecision
from flashtask.trainer.distribution.process_strategies import STRATEGIES
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.hyperparameters import find_not_saved, plain_hyperparameters
from flashtask.trainer.loggers.logger_registry import LOGGERS
from flashtask.trainer.optimizers import target_rates
from flashtask.trainer.profiling.profilers import PROFILERS, PassThrough

if TYPE_CHECKING:
    from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
    from flashtask.trainer.datamodule import DataModule
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.trainer import Trainer

__all__ = [
    "PROVENANCE",
    "announce",
    "data_counts",
    "environment",
    "provenance_in",
    "provenance_of",
    "recipe_of",
    "settings_of",
    "summary_of",
    "told_of_recipe",
]

# ---- the recipe: what describes a run in names and numbers, so that it can be run again

#: What sections hold in a form of their own, where a run writes, and what only `tune` reads.
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
        **({"licences": module["licences"]} if "licences" in module else {}),
    }
    if run.resume_from is not None:
        # The weights that it begins with are those of the first run, whatever this module was.
        lost.pop("model.weights", None)
        if "model.weights" in run.lost_before:
            lost["model.weights"] = run.lost_before["model.weights"]
    return {**recipe, "not_saved": lost} if lost else recipe


def told_of_recipe(recipe: Mapping[str, Any] | None) -> str:
    """A sentence about what the recipe of a run cannot hold; empty if it holds everything."""
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
        # The recipe holds what the constructor sets as arguments of the constructor.
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
    """Settings that differ from their defaults, and those that always decide the numbers."""
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
    settings |= dict(_devices_and_precision(run, lost)) | {"seed": run.seed} | dict(_named(trainer, lost))
    return {name: settings[name] for name in defaults if name in settings}


def _devices_and_precision(run: FitRun, lost: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Precision, strategy and accelerator: by name, also where they were given as objects that have one."""
    given, place, precision = run.trainer.arguments, run.device_plan, run.trainer.precision
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
    """Whether a plugin or the strategy sets the precision, in place of the argument."""
    return bool(run.trainer.arguments["plugins"]) or run.strategy.precision_plugin is not None


def _named(trainer: Trainer, lost: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Callbacks, loggers and the profiler by name."""
    callbacks = [one for one in trainer.callbacks if one is not trainer.ema_callback and one.in_recipe]
    parts: dict[str, tuple[Any, Any]] = {"callbacks": (callbacks, CALLBACKS)}
    given = trainer.arguments["logger"]
    if given is False:
        yield "logger", False
    elif given is not True and given is not None:
        parts["logger"] = (trainer.given_loggers, LOGGERS)
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


# ---- settings: what decides a run's numbers beside its seed, compared when a run is resumed

_SETTINGS_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def settings_of(run: FitRun) -> dict[str, Any]:
    """Finetuning strategy, accumulation, gradient clipping and, where the loader has one, batch size of a fit run."""
    settings = {name: getattr(run.trainer, name) for name in _SETTINGS_OF_TRAINER}
    settings["strategy"] = run.freezing.finetuning.recipe() if run.freezing is not None else "no_freeze"
    of_all = run.batch_of_all
    size = getattr(run.loader, "batch_size", None) if of_all is None else of_all["samples"]
    return settings if size is None else {**settings, "batch_size": size}


# ---- the announcement before training

#: Of more phases than these, the first ones and the last are announced.
_MOST_PHASES = 6


def announce(run: FitRun) -> list[str]:
    """The lines printed before training: seed, device, formats, processes; what trains from which epoch on; rates."""
    layout = "channels_last" if run.memory_format is torch.channels_last else "contiguous"
    several = f", {run.strategy.world_size} processes ({run.strategy.name})" if run.strategy.world_size > 1 else ""
    lines = [f"seed {run.seed}, {run.device.type}, precision {_formats(run)}, {layout}{several}"]
    if remark := run.remark_on_batches:
        lines.append(remark)
    if run.freezing is None:
        return lines
    if run.solving is not None:
        return [*lines, f"finetuning {run.freezing.finetuning.name}: one pass, then the head is solved on the features"]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in target_rates(run.optimizers).items())
    return [*lines, f"finetuning {run.freezing.finetuning.name}, {rates}", *_describe_phases(run, run.freezing)]


def _formats(run: FitRun) -> str:
    training, inference = run.precision.name, run.inference_precision.name
    return training if training == inference else f"{training} for training steps, {inference} for evaluation"


def _describe_phases(run: FitRun, freezing: Freezing) -> list[str]:
    total = sum(p.numel() for p in run.module.parameters())
    strategy, last = freezing.finetuning, run.max_epochs
    lines = []
    for number, (start, phase) in enumerate(zip(strategy.starts, strategy.phases, strict=True)):
        when = f"from epoch {start}" if start is not None else f"after {strategy.phases[number - 1].end}"
        never = "; the run ends before" if start is not None and last is not None and start >= last else ""
        lines.append(f"  {when}: {freezing.count(number):,} of {total:,} parameters train ({phase.train}){never}")
    if len(lines) <= _MOST_PHASES:
        return lines
    return [*lines[: _MOST_PHASES - 1], f"  ... {len(lines) - _MOST_PHASES} more phases", lines[-1]]


# ---- summary.json


def summary_of(run: FitRun, checkpoint: ModelCheckpoint | None) -> dict[str, Any]:
    """Task, backbone, strategy, completed epochs, the best epoch's metrics, time, size and versions."""
    if checkpoint is not None and checkpoint.best_epoch is not None:
        best = dict(checkpoint.best_metrics)
    else:
        best = dict(run.history[-1]) if run.history else {}
    return {
        "task": run.module.describe().get("task"),
        "backbone": plain_hyperparameters(run.module).get("backbone"),
        "strategy": run.freezing.finetuning.name if run.freezing is not None else None,
        "epochs": len(run.history),
        "steps": run.global_step,
        "best": best,
        "seconds": round(run.seconds, 3),
        f"{run.module.sample_noun}_per_second": round(run.samples_seen / run.training_seconds, 2)
        if run.training_seconds
        else None,
        "parameters": sum(p.numel() for p in run.module.parameters()),
        "trainable_parameters": sum(p.numel() for p in run.module.parameters() if p.requires_grad),
        "seed": run.seed,
        "device": run.device.type,
        "precision": run.precision.name,
        "stopped": run.stop_reason or None,
        "versions": {
            "flashtask": __version__,
            "torch": str(torch.__version__),
            **{name: metadata.version(name) for name in ("torchmetrics", *run.module.libraries)},
            "python": platform.python_version(),
        },
    }


# ---- provenance: the run that made a module's weights, for checkpoints and model cards

#: What a checkpoint or a saved folder holds of the run that made its weights.
PROVENANCE = ("epoch", "global_step", "metrics", "environment", "recipe", "data_counts", "pretrained_from")


def environment(run: FitRun) -> dict[str, Any]:
    """What bit-equal results depend on besides the run itself: versions, threads, device, formats."""
    return {
        "flashtask": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": run.device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": run.precision.name,
        "memory_format": "channels_last" if run.memory_format is torch.channels_last else "contiguous",
    }


def data_counts(data: DataModule) -> dict[str, dict[str, int]]:
    """Samples of each class by part of the data (`train`, `val`), as far as the data module knows them."""
    counts: dict[str, dict[str, int]] = getattr(data, "counts", dict)()
    return counts


def provenance_in(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint holds of the run that wrote it; None if no run wrote it."""
    if "epoch" not in content:
        return None
    return {key: content.get(key) for key in PROVENANCE}


def provenance_of(run: FitRun) -> dict[str, Any]:
    """The same from a run, at its present state."""
    return {
        "epoch": int(run.history[-1]["epoch"]) if run.history else run.epoch,
        "global_step": run.global_step,
        "metrics": run.metrics_of_weights,
        "environment": environment(run),
        "recipe": run.recipe,
        "data_counts": data_counts(run.data),
        "pretrained_from": run.module.describe().get("pretrained_from"),
    }
