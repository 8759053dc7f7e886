"""From a checkpoint back to a module, and back into a run."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from flashtask.core.checkpoint import MapLocation, error_context, read_checkpoint
from flashtask.core.errors import IntegrityError, UnknownInFileError, UnknownNameError, UsageError
from flashtask.core.files import PathLike
from flashtask.core.keywords import argument_fix
from flashtask.core.library_internals import mark_as_stepped
from flashtask.core.model_path import model_path
from flashtask.core.seeding import set_generator_states
from flashtask.trainer.callbacks.callback import state_name
from flashtask.trainer.checkpoints.content import ROWS
from flashtask.trainer.devices.precision import take_formats, take_recorded_precision
from flashtask.trainer.distribution.sharded_tensors import optimizer_state_as_held, state_as_held
from flashtask.trainer.finetuning.lora import restore_adapters
from flashtask.trainer.hyperparameters import as_collection, find_not_saved, with_kind
from flashtask.trainer.optimizers import redraw
from flashtask.trainer.results import results_here
from flashtask.trainer.run_record import environment, settings_of

if TYPE_CHECKING:
    from flashtask.trainer.datamodule import DataModule
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module

__all__ = [
    "data_from_checkpoint",
    "load_checkpoint_into",
    "load_weights",
    "module_from_checkpoint",
    "module_from_content",
    "restore_run",
]

M = TypeVar("M", bound="Module")
D = TypeVar("D", bound="DataModule")
#: Keys of a checkpoint that describe the hyper-parameters of the data module.
_OF_DATA = tuple(f"datamodule_hyper_parameters{part}" for part in ("", "_form", "_kinds"))
#: Characters of a message about settings that a file holds.
_LONGEST = 200


def module_from_checkpoint(
    cls: type[M], path: PathLike, map_location: MapLocation, strict: bool | None, given: Mapping[str, Any]
) -> M:
    """Build a module from the hyper-parameters of a checkpoint and load its weights, in eval mode."""
    path = model_path(path)
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder in timm's layout, not a checkpoint",
            fix=f"{cls.__name__}.from_pretrained({str(path)!r})",
        )
    return module_from_content(cls, read_checkpoint(path, map_location=map_location), path, strict=strict, given=given)


def data_from_checkpoint(cls: type[D], path: PathLike, given: Mapping[str, Any]) -> D:
    """A data module with the hyper-parameters that the one of a run had."""
    path = model_path(path)
    content = read_checkpoint(path)
    with error_context(path):
        stored = {name.removeprefix("datamodule_"): value for name, value in content.items() if name in _OF_DATA}
        data = cls(**_arguments(cls, stored, given, path))
        data.on_load_checkpoint(content)
        data.load_state_dict(content.get("datamodule") or {})
    return data


def module_from_content(
    cls: type[M],
    content: dict[str, Any],
    path: PathLike,
    *,
    strict: bool | None = None,
    given: Mapping[str, Any] | None = None,
) -> M:
    """The same from the content that `read_checkpoint` returned; `path` is for messages."""
    with error_context(path):
        cls.check_content(content, given or {}, path)
        state = _weights_in(content)
        arguments = _arguments(cls, content, given or {}, path)
        try:
            module = cls.rebuild(arguments, state)
        except UsageError as error:
            if given:
                raise  # it may be the user's own argument
            if isinstance(error, UnknownNameError):
                raise UnknownInFileError(error) from error
            what = f"{path}: its settings are refused: {error.what.removeprefix(f'{path}: ')}"
            raise IntegrityError(what if len(what) <= _LONGEST else what[:_LONGEST] + "...", why=error.why) from error
        module.configure_model()
        module.on_load_checkpoint(content)
        restore_adapters(module, content, path)
        if state:
            module.to(next(iter(state.values())).device)  # where `map_location` has put the weights
        take_formats(module, state)
        take_recorded_precision(module, content)
        load_weights(module, state, path, strict=module.strict_loading if strict is None else strict)
    return module.eval()


def _weights_in(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = content["state_dict"]
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise IntegrityError("its state_dict holds values that are not tensors")
    return state


def _arguments(cls: type[Any], content: Mapping[str, Any], given: Mapping[str, Any], path: PathLike) -> dict[str, Any]:
    """The arguments to build a module with: those of the checkpoint, and those given, which win."""
    accepted = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    stored, given = _with_collection(content, given, accepted)
    for name in given:
        if name not in accepted and not takes_any:
            raise UsageError(f"{cls.__name__} has no argument {name!r}", fix=argument_fix(name, accepted))
    arguments = {name: value for name, value in stored.items() if name in accepted or takes_any} | dict(given)
    needed = [
        p.name for p in accepted.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    form: Any = content.get("hyper_parameters_form")
    for where, kind in find_not_saved(arguments):
        inside = where.removeprefix(f"{form['argument']}.") if form is not None else where
        name = re.split(r"[.\[]", inside)[0]
        raise UsageError(
            f"{path}: the argument {where!r} of {cls.__name__} ({kind}) could not be stored",
            fix=f"{cls.__name__}.load_from_checkpoint({str(path)!r}, {name}=...)",
        )
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UsageError(
            f"{path} does not hold the arguments {', '.join(missing)} of {cls.__name__}",
            fix=f"pass them to load_from_checkpoint, or call self.save_hyperparameters() in {cls.__name__}.__init__",
        )
    whole = form["argument"] if form is not None and form["argument"] in arguments else None
    for place, kind in content.get("hyper_parameters_kinds", ()):
        is_inside = whole is not None and place[0] not in form["beside"]
        if place[0] not in given and (whole not in given if is_inside else place[0] in arguments):
            arguments = with_kind(arguments, [whole, *place] if is_inside else place, kind)
    if whole is not None and whole not in given:
        arguments[whole] = as_collection(arguments[whole], form["kind"])
    return arguments


def _with_collection(
    content: Mapping[str, Any], given: Mapping[str, Any], accepted: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stored and given arguments, with the values of a collection (`Net(hp)`) back in it, as a dictionary.

    A given name that is not an argument of the constructor but a key of the collection sets a value of the collection.
    """
    stored, form = dict(content.get("hyper_parameters", {})), content.get("hyper_parameters_form")
    if form is None or form["argument"] is None or form["argument"] in given:
        return stored, dict(given)
    held = {name: value for name, value in stored.items() if name not in form["beside"]}
    own = {name: value for name, value in given.items() if name not in accepted and name in held}
    rest = {name: value for name, value in given.items() if name not in own}
    return {**{n: stored[n] for n in form["beside"]}, form["argument"]: held | own}, rest


def load_weights(module: Module, state: Mapping[str, torch.Tensor], path: PathLike, *, strict: bool = True) -> None:
    """Load weights, with an error that names the file, the first wrong names and the shapes.

    Raises:
        IntegrityError: names or shapes are not the module's.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong += [
        f"{name} holds {state[name].dtype}, not {own[name].dtype}".replace("torch.", "")
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    if wrong or (strict and (missing or unexpected)):
        details = [
            *wrong[:3],
            *(f"no {name}" for name in missing[:3]),
            *(f"unknown {n}" for n in unexpected[:3]),
        ]
        raise IntegrityError(
            f"{path}: its weights do not fit {type(module).__name__}",
            why=f"{len(wrong) + len(missing) + len(unexpected)} differences: {'; '.join(details)}",
            fix="build the module with the arguments that it was saved with",
        )
    module.load_state_dict(state_as_held(state, own), strict=strict)


def load_checkpoint_into(module: Module, content: dict[str, Any], path: PathLike) -> None:
    """Load the content that `read_checkpoint` returned into a module that knows its data (after `connect`).

    Raises:
        UsageError: the file's labels are not the module's, in the same order.
        IntegrityError: names or shapes of weights are not the module's.
    """
    with error_context(path):
        state = _weights_in(content)
        module.on_load_checkpoint(content)
        restore_adapters(module, content, path)
        load_weights(module, state, path, strict=module.strict_loading)


def restore_run(run: FitRun, path: PathLike, content: dict[str, Any]) -> None:
    """Restore a run to where the checkpoint was written: weights, optimizers, callbacks, random state, progress.

    Raises:
        UsageError: the file holds weights only, or another number of optimizers.
    """
    if "progress" not in content:
        raise UsageError(
            f"{path} holds weights only and cannot be resumed",
            fix="load its weights with load_from_checkpoint and begin a new run",
        )
    with error_context(path):
        _restore(run, path, content)


def _restore(run: FitRun, path: PathLike, content: dict[str, Any]) -> None:
    for callback in run.callbacks:
        callback.on_load_checkpoint(run.trainer, run.module, content)
    _check_preprocessing(run, content, path)
    load_checkpoint_into(run.module, content, path)
    _restore_optimizers(run, content, path)
    if (
        content["precision"]["name"] == run.precision.name
    ):  # else the difference is reported, and a gradient scaler starts afresh
        run.precision.load_state_dict(content["precision"]["state"])
    states = content["callbacks"]
    for callback in run.callbacks:
        if state_name(callback) in states:
            callback.load_state_dict(states[state_name(callback)])
    known = {state_name(one) for one in run.callbacks}
    if lost := [key for key, state in states.items() if state and key not in known]:
        run.trainer.say(f"resuming {Path(path).name} without what it holds of {', '.join(lost)}")
    progress = dict(content["progress"])
    for name in ROWS:
        if name in progress:  # a checkpoint of 0.1 has the history alone
            progress[name] = json.loads(bytes(progress[name].numpy().tobytes()))
    if (results := content.get("results_of_processes")) is not None:
        progress["results"] = results_here(results, run.strategy.global_rank, run.strategy.world_size)
    run.load_state_dict(progress)
    _report_differences(run, content, Path(path))
    _redraw_schedules(run, Path(path))
    states = content.get("random_of_processes", [content["random"]])
    if run.strategy.global_rank < len(states):
        set_generator_states(states[run.strategy.global_rank])


def _check_preprocessing(run: FitRun, content: dict[str, Any], path: PathLike) -> None:
    """The loaders of the run were made for the module as it is now, so the checkpoint must agree with it."""
    then, now = content.get("preprocessing"), run.module.describe().get("preprocessing")
    if then is None or now is None or getattr(run.module, "awaits_size", False):
        return  # or nothing was made for it: the user's own loaders give images of their own size
    # A file from before there were value ranges goes by that of the format, which does not matter for 8-bit images.
    then = {"value_range": "format", **then}
    if then["value_range"] == "format" and now.get("value_range") is None:
        then["value_range"] = None
    if then != now:
        different = ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])
        raise UsageError(
            f"{path} was written with another preprocessing: {different}",
            fix="resume with the backbone and the data.preprocessing of the first run"
            + (', and from_folders(value_range="format")' if then["value_range"] == "format" else ""),
        )


def _restore_optimizers(run: FitRun, content: dict[str, Any], path: PathLike) -> None:
    states, rates = content["optimizer_states"], content["lr_schedulers"]
    if len(states) != len(run.optimizers) or len(rates) != len(run.schedulers):
        raise UsageError(
            f"{path} was written with {len(states)} optimizers and {len(rates)} schedulers, "
            f"this run has {len(run.optimizers)} and {len(run.schedulers)}",
            fix="resume with the settings of the first run",
        )
    for optimizer, state in zip(run.optimizers, states, strict=True):
        try:
            optimizer.load_state_dict(optimizer_state_as_held(state, optimizer))
        except ValueError as error:
            raise _other_groups(path, state, optimizer, error) from error
    for optimizer in run.optimizers:
        # Schedulers look here whether the optimizer has stepped before they did; in the run that goes on, it has.
        mark_as_stepped(optimizer, content["global_step"] > 0)
    for rate, state in zip(run.schedulers, rates, strict=True):
        rate.scheduler.load_state_dict(_with_own_length(rate.scheduler, state))


def _with_own_length(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a schedule, with this run's length where torch would put back that of the run before."""
    if not isinstance(scheduler, OneCycleLR) or scheduler.total_steps == state.get("total_steps"):
        return state
    return {**state, **{name: vars(scheduler)[name] for name in ("total_steps", "_schedule_phases")}}


def _redraw_schedules(run: FitRun, path: Path) -> None:
    """A schedule over the whole run is drawn again where this run has another length than the one before.

    The rates in the checkpoint are those of the run before, which are 0 where it had come to its end.
    """
    for rate in run.schedulers:
        changed = None if run.done else redraw(rate.scheduler)
        if changed is not None:
            length = "this run" if run.total_steps is None else f"the {run.total_steps} steps of this run"
            run.trainer.say(
                f"resuming {path.name}: the learning-rate schedule is drawn again for {length}, "
                f"so the next step has the rate {changed[1]:g}, not {changed[0]:g}"
            )
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    if groups and not run.done and not any(float(group["lr"]) for group in groups):
        kinds = ", ".join(type(rate.scheduler).__name__ for rate in run.schedulers) or "the optimizer"
        run.trainer.say(
            f"resuming {path.name}: the learning rate of {kinds} is 0 here, so the next step trains nothing"
        )


def _other_groups(path: PathLike, state: dict[str, Any], optimizer: Optimizer, error: ValueError) -> UsageError:
    """The error for an optimizer state whose parameter groups are not those of a run."""
    what = f"{path}: the optimizer's parameter groups are not this run's"
    names = [[group.get("name") for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if names[0] == list(dict.fromkeys(names[1])) and names[0] != names[1]:
        return UsageError(
            what,
            why="that run decayed the weights of norms and the biases too, as earlier versions of flashtask did",
            fix="continue it with the version that began it, or begin a run from its weights: flashtask.load(path)",
        )
    return UsageError(what, why=str(error), fix="resume with the finetuning strategy and optimizer of the first run")


def _class_in(described: Mapping[str, Any]) -> str | None:
    """The class of the module as a checkpoint names it: the user's own class, else the registered task."""
    own: Mapping[str, Any] = described.get("own_class") or {}
    return own.get("name") or described.get("task")


def _report_differences(run: FitRun, content: dict[str, Any], path: Path) -> None:
    now = {**environment(run), "seed": run.seed, **settings_of(run), "class": _class_in(run.module.describe())}
    then = {**content["environment"], "seed": content["seed"], **content["settings"], "class": _class_in(content)}
    # What a checkpoint does not hold (the settings of a module without a recipe) is not compared.
    different = [f"{key} {then[key]} -> {now[key]}" for key in now if key in then and then[key] != now[key]]
    if different:
        run.trainer.say(f"resuming {path.name}: results will not be bit-equal ({'; '.join(different)})")
