"""Callbacks, loggers and profilers: given as objects, names or names with options, and written into recipes."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.registry import Registry, check_options

__all__ = ["NOT_PLAIN", "WATCHING", "Named", "NamedPart", "make_parts", "named_form", "plain_setting", "recipe_of_part"]

#: A name that a registry lists, alone or with options: `("early_stopping", {"patience": 3})`.
Named = str | tuple[str, Mapping[str, Any]] | Mapping[str, Mapping[str, Any] | None]
#: Keys of a recipe that a run may be repeated without: what they name watches a run and does not change it.
WATCHING = ("trainer.logger", "trainer.profiler")
#: What `plain_setting` gives for a value that a recipe cannot hold.
NOT_PLAIN = object()


class NamedPart:
    """Base of callbacks, loggers and profilers: keeps the arguments that it was made with, for the recipe of a run."""

    _made_with: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(named_arguments(vars(cls)["__init__"]))  # type: ignore[method-assign]


def _remembering(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def remembering(self: Any, *arguments: Any, **options: Any) -> None:
        # The class that was called comes first; what it gives to its parents is its own affair.
        if "_made_with" not in vars(self):
            self._made_with = (arguments, options)
        function(self, *arguments, **options)

    return remembering


# ---- what a user gives


def make_parts(given: object, registry: Registry[Any], kind: type[Any], argument: str, needed: UsageError) -> list[Any]:
    """The objects that an argument of the trainer means.

    Args:
        given: None, or one or a list of: an object, a name, `(name, {options})`, `{name: {options}}`.
        registry: of the names.
        kind: the class of the objects.
        argument: of the trainer, for messages.
        needed: what is raised for anything else.

    Raises:
        UnknownNameError: nothing, or no option, has this name.
        UsageError: something else; the class in place of an object is a common slip.
    """
    read = [one for item in _items(given, registry) for one in _read(item, kind, argument, needed)]
    return [_made(registry, *one) if isinstance(one, tuple) else one for one in read]


def named_form(given: object, registry: Registry[Any]) -> Any:
    """The form that a recipe of a run has: `[{name: {options}}, ...]`, without options that equal the default.

    Args:
        given: names as `make_parts` takes them; anything else is given back as it is.
        registry: of the names.

    Raises:
        UnknownNameError: nothing has one of the names.
    """
    items = _items(given, registry)
    if not all(isinstance(item, (str, Mapping)) or _is_pair(item) for item in items):
        return given
    pairs = [one for item in items for one in _read(item, NamedPart, "", UsageError(f"{item!r} has no names"))]
    return [{name: _said(registry.get(name), options)} for name, options in pairs]


def _said(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name not in known or value != known[name].default}


def _items(given: Any, registry: Registry[Any]) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        return [given]
    # `["csv", {"tensorboard": {}}]` names two; `["tensorboard", {"folder": "a"}]` is one with its options.
    is_one = _is_pair(given) and not (given[1] and all(name in registry for name in given[1]))
    return [given] if is_one else list(given)


def _is_pair(item: Any) -> bool:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return False
    return isinstance(item[0], str) and isinstance(item[1], Mapping)


def _read(item: Any, kind: type[Any], argument: str, needed: UsageError) -> list[Any]:
    """An object, or names with their options."""
    if isinstance(item, type) and issubclass(item, kind):
        made = f"{item.__name__}()" if argument == "profiler" else f"[{item.__name__}()]"
        raise UsageError(f"Trainer({argument}=...) takes no class: {item.__name__}", fix=f"{argument}={made}")
    if isinstance(item, kind):
        return [item]
    if isinstance(item, str):
        return [(item, {})]
    if _is_pair(item):
        return [(item[0], item[1])]
    if isinstance(item, Mapping) and all(options is None or isinstance(options, Mapping) for options in item.values()):
        return [(name, options or {}) for name, options in item.items()]
    raise needed


def _made(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> Any:
    kind = registry.get(name)
    check_options(f"{registry.kind} {name!r}", kind, options)
    return kind(**options)


# ---- what a recipe holds


def recipe_of_part(part: NamedPart, registry: Registry[Any]) -> dict[str, Any] | None:
    """`{name: {options}}` for an object of a registered class; None where no file can hold it.

    Options are the arguments that it was made with, unless an attribute of the same name has been changed since.
    """
    name = registry.name_of(type(part))
    if name is None or not isinstance(part, NamedPart):
        return None
    arguments, named = part._made_with
    signature = inspect.signature(type(part))
    bound = signature.bind(*arguments, **named).arguments
    options: dict[str, Any] = {}
    for key, given in bound.items():
        value, now = plain_setting(given), plain_setting(vars(part).get(key, given))
        # What is kept under the name of an argument may be what was made of it: a length of time, a path.
        value = now if type(now) is type(value) else value
        if value is NOT_PLAIN:
            return None
        if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            options |= value
            continue
        if value != signature.parameters[key].default:
            options[key] = value
    return {name: options}


def plain_setting(value: object) -> Any:
    """A value as YAML holds it, a path as text and a length of time in seconds; `NOT_PLAIN` if it cannot be held."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, timedelta):
        return {"seconds": value.total_seconds()}
    if isinstance(value, (list, tuple)):
        items = [plain_setting(one) for one in value]
        return NOT_PLAIN if any(one is NOT_PLAIN for one in items) else items
    if isinstance(value, Mapping) and all(type(key) in (int, float, str) for key in value):
        held = {key: plain_setting(one) for key, one in value.items()}
        return NOT_PLAIN if any(one is NOT_PLAIN for one in held.values()) else held
    return NOT_PLAIN
