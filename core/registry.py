"""Names to things: the registries of backbones, heads and tasks, filled lazily, with errors for unknown names.

A name comes from the decorator, from a source that lists many names without importing their library (the zoo,
timm, torchvision), or from an installed package's entry points. Nothing is imported before its name is
asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar, cast, overload

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry_search import METADATA_FILTERS, Filter, search

__all__ = ["Aliases", "LazySource", "Registry", "RegistryEntry", "Source", "check_options", "imported"]

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


@dataclass(frozen=True)
class RegistryEntry:
    """What is known about one name without loading the code behind it.

    Args:
        name: the canonical name, the one that files store (`timm/resnet18` for `resnet18`).
        kind: what the registry holds: backbone, head, task.
        metadata: plain values: always `provider`, and `description`, `licence`, `source`, `weights` ... where
            they are known. What is not known without loading is not there.
        load: gives the object.
        facts: gives what is known once its library is loaded, as more metadata: `input_size`, `licence`, ...
    """

    name: str
    kind: str
    metadata: Mapping[str, Any]
    load: Callable[[], Any] = field(repr=False, compare=False)
    facts: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False, compare=False)

    def known(self) -> dict[str, Any]:
        """All that is known of it; its library is loaded for that."""
        return {**self.metadata, **self.facts()}


class Source(Protocol):
    """Many names at once, listed without loading any of them."""

    def names(self) -> Iterable[str]:
        """The canonical names."""
        ...

    def spellings(self) -> Iterable[str]:
        """The names as a user would write them, for near matches; one for each canonical name."""
        ...

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name in any spelling, or None if this source has no such name."""
        ...


class Registry(Generic[T]):
    """A mapping from names to objects of one kind, with near matches for what it does not have.

    Args:
        kind: what it holds, as messages call it: backbone, head, task.
        group: the entry point group by which installed packages add names, e.g. `flashtask.backbones`.
        is_in_zoo: `flashtask zoo` lists the names of such a group.
    """

    def __init__(self, kind: str, *, group: str | None = None, is_in_zoo: bool = True) -> None:
        self.kind, self.group = kind, group
        self._listed_by = f"flashtask zoo --kind {kind}" if group and is_in_zoo else ""
        self._filters: dict[str, Filter] = dict(METADATA_FILTERS)
        self._entries: dict[str, RegistryEntry] = {}
        self._sources: list[Source] = []
        self._removed: set[str] = set()
        self._loaded: dict[str, tuple[RegistryEntry, T]] = {}

    @overload
    def register(self, name: C, /) -> C: ...
    @overload
    def register(self, name: str, obj: C, /, *, override: bool = ..., **metadata: Any) -> C: ...
    @overload
    def register(self, name: str | None = ..., /, *, override: bool = ..., **metadata: Any) -> Callable[[C], C]: ...
    def register(self, name: Any = None, obj: Any = None, /, *, override: bool = False, **metadata: Any) -> Any:
        """Add a function or class: `@R.register`, `@R.register("name")`, `@R.register(licence="MIT")`,
        or `R.register("name", obj)`.

        Args:
            name: what it is asked for by; the object's own `__name__` without one.
            obj: what is registered, when not used as a decorator.
            override: replace what the name means now; without it a taken name is an error.
            metadata: plain values for `entry(name)`; a `description` is otherwise the docstring's first line.

        Raises:
            UsageError: the name is taken, or it is no name.
        """
        if callable(name):
            return self._add_object(name.__name__, name, override, metadata)
        if obj is not None:
            return self._add_object(name, obj, override, metadata)
        return lambda decorated: self._add_object(name or decorated.__name__, decorated, override, metadata)

    def add_source(self, source: Source) -> None:
        """Add a source of many names; names registered one by one and earlier sources win."""
        self._sources.append(source)

    def add_filters(self, filters: Mapping[str, Filter]) -> None:
        """Add what `search` can ask for besides `source` and `licence`: filters run in this order, cheap ones first."""
        self._filters.update(filters)

    def get(self, name: str) -> T:
        """The object behind a name, loaded once.

        Raises:
            UnknownNameError: nothing has this name.
            UsageError: an installed package promises it and cannot be loaded.
        """
        entry = self.entry(name)
        loaded = self._loaded.get(entry.name)
        if loaded is None or loaded[0] != entry:  # a zoo file that came since may have changed what the name means
            loaded = self._loaded[entry.name] = (entry, cast(T, entry.load()))
        return loaded[1]

    def entry(self, name: str) -> RegistryEntry:
        """What is known about a name, without loading it.

        Raises:
            UnknownNameError: nothing has this name.
        """
        found = self._find(name)
        if found is None:
            error = UnknownNameError(self.kind, str(name), self._spellings(), listed_by=self._listed_by)
            if not error.fix and self.group:
                error.fix = f"install a package with an entry point {name!r} in {self.group!r}, or register one"
            raise error
        return found

    def name_of(self, obj: object) -> str | None:
        """The name that gives this object, None if there is none; what the registry's sources list is loaded for it."""
        registered = (entry.name for entry in self._entries.values() if entry.load() is obj)
        home = f"{getattr(obj, '__module__', '')}:{getattr(obj, '__qualname__', '')}"
        promised = (name for name, points in self._points.items() if any(point.value == home for point in points))
        listed = (name for source in self._sources for name in source.names() if self.get(name) is obj)
        return next((name for found in (registered, promised, listed) for name in found if self.get(name) is obj), None)

    def names(self) -> list[str]:
        """Every canonical name, once: what was registered first, then each source's names in its order."""
        names = [*self._entries, *self._points]
        for source in self._sources:
            names.extend(source.names())
        return [name for name in dict.fromkeys(names) if name not in self._removed]

    def search(self, pattern: str = "", **filters: Any) -> list[RegistryEntry]:
        """The entries whose name matches a pattern and that pass every filter, in the order of `names`.

        Args:
            pattern: a part of a name in any case; with one of the signs `* + ? [ ] ( ) { } | ^ $ \\` a regular
                expression for the whole name (`resnet.*`), with or without the library before it.
            filters: `source="timm"`, `licence="apache-2.0"`; backbones have more. What is not known of an entry
                passes no filter.

        Raises:
            UnknownNameError: no filter, source or licence of this name.
            UsageError: the pattern is no regular expression, or a filter cannot take its value.
        """
        return search(self, self._filters, pattern, filters)

    def filters(self) -> list[str]:
        """The names of the filters that `search` takes."""
        return list(self._filters)

    def keys(self) -> list[str]:
        """The same as `names`, as a dictionary calls it."""
        return self.names()

    def remove(self, name: str) -> None:
        """Forget a name, wherever it came from; `register` brings it back.

        Raises:
            UnknownNameError: nothing has this name.
        """
        canonical = self.entry(name).name
        self._entries.pop(canonical, None)
        self._loaded.pop(canonical, None)
        self._removed.add(canonical)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self)} names)"

    def _add_object(self, name: Any, obj: Any, override: bool, metadata: dict[str, Any]) -> Any:
        values = {"provider": "user", **metadata}
        if "description" not in values and (text := inspect.getdoc(obj)):
            values["description"] = text.splitlines()[0]
        self._add(name, RegistryEntry(name, self.kind, values, lambda: obj), override)
        return obj

    def _add(self, name: Any, entry: RegistryEntry, override: bool) -> None:
        if not isinstance(name, str) or not name or name != name.strip():
            raise UsageError(
                f"the name of a {self.kind} must be a text, not {name!r}", fix='@REGISTRY.register("my_name")'
            )
        if not override and name in self:
            raise UsageError(
                f"there is a {self.kind} named {name!r} already (from {self._find_provider(name)})",
                fix=f"choose another name, or replace it: register({name!r}, ..., override=True)",
            )
        self._removed.discard(name)
        self._loaded.pop(name, None)
        self._entries[name] = entry

    def _find(self, name: str) -> RegistryEntry | None:
        found = self._entries.get(name) or self._find_point(name) or self._find_shipped(name)
        return None if found is None or found.name in self._removed else found

    def _find_shipped(self, name: str) -> RegistryEntry | None:
        return next((found for source in self._sources if (found := source.find(name))), None)

    def _find_provider(self, name: str) -> str:
        return str(self.entry(name).metadata.get("provider"))

    def _spellings(self) -> list[str]:
        spellings = [*self._entries, *self._points]
        for source in self._sources:
            spellings.extend(source.spellings())
        return [name for name in dict.fromkeys(spellings) if name not in self._removed]

    @cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        points: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group) if self.group else ():
            points.setdefault(point.name, []).append(point)
        return points

    def _find_point(self, name: str) -> RegistryEntry | None:
        points = self._points.get(name)
        if not points:
            return None
        distribution = " and ".join(_distribution(point) for point in points)
        metadata = {"provider": distribution, "source": points[0].value, **_credit(points[0])}
        return RegistryEntry(name, self.kind, metadata, lambda: self._load_points(name, points))

    def _load_points(self, name: str, points: list[EntryPoint]) -> Any:
        packages = " and ".join(_distribution(point) for point in points)
        rival = self._find_shipped(name)
        if len(points) > 1 or rival:
            others = f" and {rival.metadata['provider']}" if rival else ""
            raise UsageError(
                f"the {self.kind} {name!r} is provided by {packages}{others}",
                why="a name must have one meaning",
                fix=f"pip uninstall {points[-1].dist.name if points[-1].dist else packages}",
            )
        try:
            return points[0].load()
        except Exception as error:
            raise UsageError(
                f"the {self.kind} {name!r} of the installed package {packages} cannot be loaded",
                why=f"{type(error).__name__}: {error}",
                fix=f"pip install --upgrade {points[0].dist.name if points[0].dist else packages}",
            ) from error


def _credit(point: EntryPoint) -> dict[str, str]:
    """Who made the package of an entry point and under which licence, where the package names them."""
    if point.dist is None:
        return {}
    fields = {
        "credit": ("Author", "Author-email", "Maintainer-email"),
        "library_licence": ("License-Expression", "License"),
        "url": ("Home-page", "Project-URL"),
    }
    found = {}
    for key, names in fields.items():
        values = [value for name in names for value in point.dist.metadata.get_all(name) or () if value != "UNKNOWN"]
        if values:
            text = str(values[0])
            found[key] = text.rpartition(", ")[2] if key == "url" else text  # "Homepage, https://..."
    return found


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


class LazySource:
    """Names of this package whose modules are imported when a name is asked for.

    Args:
        kind: what the registry holds.
        package: that the modules are in.
        targets: name -> (`module:attribute`, description).
    """

    def __init__(self, kind: str, package: str, targets: Mapping[str, tuple[str, str]]) -> None:
        self.kind, self.package, self._targets = kind, package, dict(targets)

    def names(self) -> Iterable[str]:
        """Every name, in the order of `targets`; nothing is imported for it."""
        return self._targets

    spellings = names

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name; nothing is imported for it."""
        if name not in self._targets:
            return None
        target, description = self._targets[name]
        metadata = {"provider": "flashtask", "description": description}
        return RegistryEntry(name, self.kind, metadata, partial(imported, f"{self.package}.{target}"))


def imported(target: str) -> Any:
    """The object that `package.module:attribute` names; its module is imported here if it was not before."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class Aliases:
    """Further spellings of registered names: a source of a registry that lists nothing of its own."""

    def __init__(self, registry: Registry[Any], names: Mapping[str, str]) -> None:
        self.registry, self._names = registry, dict(names)

    def names(self) -> Iterable[str]:
        """None: what is spelled otherwise is listed already."""
        return ()

    def spellings(self) -> Iterable[str]:
        """The further spellings, for near matches."""
        return self._names

    def find(self, name: str) -> RegistryEntry | None:
        """The entry for a spelling of its name."""
        return self.registry.entry(self._names[name]) if name in self._names else None


def check_options(owner: str, builder: Callable[..., object], options: Mapping[str, Any], *, given: int = 0) -> None:
    """Refuse an option that a builder has no parameter for, with near matches.

    Args:
        owner: what messages call it: `head 'mlp'`.
        builder: function or class; one with `**kwargs` checks its options itself.
        options: by name.
        given: how many of its first parameters are not options.

    Raises:
        UnknownNameError: there is no such option.
    """
    parameters = list(inspect.signature(builder).parameters.values())[given:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            error = UnknownNameError(f"option of the {owner}", option, known)
            error.fix = getattr(builder, "instead", {}).get(option) or error.fix
            raise error
