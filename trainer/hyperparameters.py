"""`save_hyperparameters()`: what a module or data module was made with, kept for logs and checkpoints."""

from __future__ import annotations

import argparse
import copy
import enum
import inspect
import os
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flashtask.core.errors import MissingInputError, UsageError

__all__ = [
    "Hyperparameters",
    "HyperparametersMixin",
    "MissingArgument",
    "as_collection",
    "find_not_saved",
    "hyperparameters_content",
    "nested_kinds",
    "plain_hyperparameters",
    "with_kind",
]


class Hyperparameters(dict[str, Any]):
    """A dictionary whose keys are attributes too: `hparams["lr"]` and `hparams.lr` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {name!r}; there are: {', '.join(self) or 'none'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class MissingArgument:
    """A placeholder for an argument that could not be stored; using it raises an error.

    Args:
        name: of the argument.
        kind: the name of its type.
        fix: how to load the module with it.
    """

    def __init__(self, name: str, kind: str, fix: str) -> None:
        self.__dict__.update(name=name, kind=kind, fix=fix)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Raise an error that names the argument.

        Raises:
            UsageError: always.
        """
        raise self._error()

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what Python asks of every object, such as how to copy it
            raise AttributeError(attribute)
        raise self._error()

    def _error(self) -> UsageError:
        held = vars(self)
        return UsageError(f"{held['name']} ({held['kind']}) could not be stored with the module", fix=held["fix"])


class HyperparametersMixin:
    """Adds `save_hyperparameters` and `hparams`."""

    _hparams: Any = None
    _hparams_initial: Any = None
    #: where a collection that was saved whole came from: {"argument", "kind", "beside"}
    _hparams_form: dict[str, Any] | None = None
    _not_logged: frozenset[str] = frozenset()
    _said_not_saved: frozenset[str] = frozenset()
    #: whether checkpoints hold the hyper-parameters; then what cannot be stored is warned of
    _hparams_are_stored = False

    @property
    def hparams_initial(self) -> Any:
        """A copy of the hyper-parameters as the last `save_hyperparameters` left them."""
        return copy.deepcopy(Hyperparameters() if self._hparams_initial is None else self._hparams_initial)

    @property
    def hparams(self) -> Any:
        """The saved hyper-parameters: a dictionary with attributes, or the OmegaConf object that was saved."""
        if self._hparams is None:
            object.__setattr__(self, "_hparams", Hyperparameters())
        return self._hparams

    @property
    def logged_hparams(self) -> dict[str, Any]:
        """The hyper-parameters that loggers show: all but those saved with `logger=False`."""
        return {str(name): value for name, value in dict(self.hparams).items() if name not in self._not_logged}

    def resolved_hyperparameters(self) -> dict[str, Any]:
        """Values that replace the arguments that they were resolved from, by name."""
        return {}

    def save_hyperparameters(self, *args: Any, ignore: str | Iterable[str] = (), logger: bool = True) -> None:
        """Keep the arguments of `__init__` (all of them, or those named), or one dict, Namespace or OmegaConf object.

        What a checkpoint cannot hold is warned of here; loading will ask for it by name.

        Args:
            args: names of arguments, or one object that holds the hyper-parameters; nothing means every argument.
            ignore: a name or names to leave out.
            logger: whether loggers show them.

        Raises:
            UsageError: a name that `__init__` does not have.
        """
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        frame = inspect.currentframe()
        arguments, depth = _init_arguments(frame.f_back if frame else None, self)
        if len(args) == 1 and not isinstance(args[0], str):
            names = self._save_collection(args[0], arguments, ignored)
        else:
            names = self._save_arguments(args, arguments, ignored)
        object.__setattr__(self, "_hparams_initial", _deep_copy_of(self.hparams))
        changed = set(names)
        logged = self._not_logged - changed if logger else self._not_logged | changed
        object.__setattr__(self, "_not_logged", frozenset(logged))
        if self._hparams_are_stored:
            self._warn_of_not_saved(stacklevel=depth + 3)

    def _save_collection(self, held: Any, arguments: dict[str, Any], ignored: set[str]) -> list[str]:
        argument = next((name for name, value in arguments.items() if value is held), None)
        form: dict[str, Any] = {"argument": argument, "kind": _kind_of(held), "beside": []}
        object.__setattr__(self, "_hparams_form", form)
        object.__setattr__(self, "_hparams", _copy_of(held, ignored))
        return [str(name) for name in self._hparams]

    def _save_arguments(self, wanted: tuple[str, ...], arguments: dict[str, Any], ignored: set[str]) -> list[str]:
        for name in wanted:
            if name not in arguments:
                raise UsageError(f"save_hyperparameters({name!r}): __init__ has no argument of that name")
        values = {name: copy.copy(arguments[name]) for name in wanted or arguments if name not in ignored}
        resolved = self.resolved_hyperparameters().items()
        values |= {n: v for n, v in resolved if n not in ignored and (not wanted or n in wanted)}
        self.hparams.update(values)
        if self._hparams_form is not None:
            self._hparams_form["beside"] += [n for n in values if n not in self._hparams_form["beside"]]
        return list(values)

    def _warn_of_not_saved(self, stacklevel: int) -> None:
        missing = [name for name, value in dict(self.hparams).items() if isinstance(value, MissingArgument)]
        for where, kind in find_not_saved(plain_hyperparameters(self)):
            if where not in self._said_not_saved and where not in missing:
                object.__setattr__(self, "_said_not_saved", self._said_not_saved | {where})
                warnings.warn(
                    f"the hyper-parameter {where} of {type(self).__name__} ({kind}) cannot be stored in a checkpoint: "
                    "load_from_checkpoint will ask for it by name",
                    stacklevel=stacklevel,
                )


# ---- what a checkpoint holds


def plain_hyperparameters(module: HyperparametersMixin) -> dict[str, Any]:
    """Hyper-parameters in a form that JSON holds; what it cannot hold becomes `{"not_saved": "<type>"}`."""
    hparams = _container_of(module.hparams) if _is_omegaconf(module.hparams) else module.hparams
    return {str(key): _plain(value) for key, value in dict(hparams).items()}


def hyperparameters_content(module: HyperparametersMixin) -> dict[str, Any]:
    """What a checkpoint holds of the hyper-parameters.

    Returns:
        `hyper_parameters`: their plain form. `hyper_parameters_form`: None, or for a collection that was saved whole
        (`save_hyperparameters(hp)`) the constructor `argument` it was given as (or None), its `kind` (`dict`,
        `attributes`, `namespace` or `omegaconf`) and the names of other arguments that were saved `beside` it.
        `hyper_parameters_kinds`: see `nested_kinds`; left out where there are none.
    """
    kinds = nested_kinds(module)
    return {
        "hyper_parameters": plain_hyperparameters(module),
        "hyper_parameters_form": module._hparams_form,
        **({"hyper_parameters_kinds": kinds} if kinds else {}),
    }


def nested_kinds(module: HyperparametersMixin) -> list[tuple[list[Any], str]]:
    """Collections with attributes among the hyper-parameters: (keys that lead to it, `attributes` or `omegaconf`).

    What is inside another one comes before it.
    """
    hparams = module.hparams
    return [] if _is_omegaconf(hparams) else [found for key, value in hparams.items() for found in _kinds(value, [key])]


def _kinds(value: Any, place: list[Any]) -> Iterator[tuple[list[Any], str]]:
    if _is_omegaconf(value):
        yield place, "omegaconf"
    elif isinstance(value, (Mapping, list, tuple)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _kinds(part, [*place, key])
        if isinstance(value, Hyperparameters):
            yield place, "attributes"


def with_kind(value: Any, place: Sequence[Any], kind: str) -> Any:
    """Plain hyper-parameters with the part at a place turned into a collection of its kind; see `nested_kinds`."""
    if not place:
        return as_collection(value, kind)
    key, *rest = place
    if isinstance(value, Mapping):
        return {**value, key: with_kind(value[key], rest, kind)}
    parts = list(value)
    parts[key] = with_kind(parts[key], rest, kind)
    return type(value)(parts)


def _plain(value: Any) -> Any:
    if isinstance(value, MissingArgument):
        return {"not_saved": vars(value)["kind"]}
    if _is_omegaconf(value):
        value = _container_of(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, (list, tuple)):
        plain = [_plain(part) for part in value]
        return tuple(plain) if isinstance(value, tuple) else plain
    if isinstance(value, Mapping) and all(isinstance(_plain(key), (bool, int, float, str)) for key in value):
        return {_plain(key): _plain(part) for key, part in value.items()}
    return {"not_saved": type(value).__name__}


def find_not_saved(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Every place in plain hyper-parameters that could not be stored, at any depth: ("head_options.act", "ReLU")."""
    if isinstance(value, dict):
        if set(value) == {"not_saved"}:
            yield where, value["not_saved"]
            return
        for key, part in value.items():
            yield from find_not_saved(part, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from find_not_saved(part, f"{where}[{index}]")


def as_collection(values: Any, kind: str) -> Any:
    """Hyper-parameters as the kind of object that they were saved from.

    Raises:
        MissingInputError: it was an OmegaConf object, and OmegaConf is not installed.
    """
    if kind == "namespace":
        return argparse.Namespace(**values)
    if kind == "attributes":
        return Hyperparameters(values)
    if kind == "omegaconf":
        try:
            from omegaconf import OmegaConf
        except ImportError as error:
            raise MissingInputError(
                "the hyper-parameters are an OmegaConf object, and OmegaConf is not installed",
                fix="pip install omegaconf",
            ) from error
        return OmegaConf.create(values if isinstance(values, list) else dict(values))
    return dict(values)


# ---- where the values come from


def _is_omegaconf(held: Any) -> bool:
    return type(held).__module__.startswith("omegaconf")


def _container_of(held: Any) -> Any:
    """The dictionary or list of an OmegaConf object; interpolations stay as they were written."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(held, resolve=False)


def _kind_of(held: Any) -> str:
    if isinstance(held, argparse.Namespace):
        return "namespace"
    if _is_omegaconf(held):
        return "omegaconf"
    if isinstance(held, Mapping):
        return "attributes" if isinstance(held, Hyperparameters) else "dict"
    raise UsageError(
        f"save_hyperparameters takes names, or a dict, Namespace or OmegaConf object, not {type(held).__name__}"
    )


def _copy_of(held: Any, ignored: set[str]) -> Any:
    if _is_omegaconf(held):
        held = copy.deepcopy(held)
        for name in ignored & {str(key) for key in held}:
            del held[name]
        return held
    values = vars(held) if isinstance(held, argparse.Namespace) else held
    return Hyperparameters({key: value for key, value in values.items() if key not in ignored})


def _deep_copy_of(hparams: Any) -> Any:
    """A copy that later changes do not reach; a value that cannot be copied is the same object in both."""
    if _is_omegaconf(hparams):
        return copy.deepcopy(hparams)
    copied = Hyperparameters()
    for name, value in hparams.items():
        try:
            copied[name] = copy.deepcopy(value)
        except Exception:  # whatever a value's own method raises
            copied[name] = value
    return copied


def _init_arguments(frame: types.FrameType | None, owner: object) -> tuple[dict[str, Any], int]:
    """The arguments of every `__init__` of `owner` on the stack, and how many there are.

    Those of subclasses win over their parents'.
    """
    found: dict[str, Any] = {}
    depth = 0
    while frame is not None and frame.f_code.co_name == "__init__":
        info = inspect.getargvalues(frame)
        if not info.args or info.locals.get(info.args[0]) is not owner:
            break
        values = {name: info.locals[name] for name in info.args[1:] if name in info.locals}
        if info.keywords:
            values.update(info.locals.get(info.keywords, {}))
        found.update({k: v for k, v in values.items() if k != "__class__"})
        frame = frame.f_back
        depth += 1
    if not found and frame is None:  # pragma: no cover - only without a Python stack
        warnings.warn("save_hyperparameters was called outside __init__", stacklevel=3)
    return found, depth
