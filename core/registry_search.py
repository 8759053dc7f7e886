"""Finding names in a registry: by a pattern, and by filters on what is known of each.

A filter that needs a library loads it; a pattern alone needs none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from flashtask.core.registry import Registry, RegistryEntry

__all__ = ["METADATA_FILTERS", "Filter", "by_licence", "by_source", "is_expression", "name_matcher", "search"]

#: Keeps those of some entries of a registry that a value admits. What is not known of an entry admits nothing.
Filter = Callable[["Registry[Any]", Sequence["RegistryEntry"], Any], list["RegistryEntry"]]

_SPECIAL = set("*+?[](){}|^$\\")


def is_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression, not a part of a name: it has one of `* + ? [ ] ( ) { } | ^ $ \\`."""
    return bool(_SPECIAL & set(pattern))


def name_matcher(pattern: str) -> Callable[[str], bool]:
    """A test for names: a part of them in any case, or a regular expression for the whole name.

    An expression may match the name with or without the library before the `/`: `resnet.*` admits `timm/resnet18`
    and not `timm/seresnet18`.

    Raises:
        UsageError: it is not a regular expression.
    """
    if not is_expression(pattern):
        part = pattern.lower()
        return lambda name: part in name.lower()
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression",
            why=str(error),
            fix="to find a part of a name, write it without special characters: resnet",
        ) from error
    return lambda name: bool(expression.fullmatch(name) or expression.fullmatch(name.rpartition("/")[2]))


def search(
    registry: Registry[Any], filters: Mapping[str, Filter], pattern: str, wanted: Mapping[str, Any]
) -> list[RegistryEntry]:
    """What `Registry.search` promises.

    Args:
        registry: where to look.
        filters: those that it has, the cheap ones first: that is the order in which they run.
        pattern: as `name_matcher` takes it.
        wanted: filter -> value.
    """
    for name in wanted:
        if name not in filters:
            raise UnknownNameError(f"filter of {registry.kind}s", name, filters)
    matches = name_matcher(pattern)
    entries = [registry.entry(name) for name in registry.names() if matches(name)]
    for name, keep in filters.items():
        if wanted.get(name) is not None:
            entries = keep(registry, entries, wanted[name])
    return entries


def by_source(registry: Registry[Any], entries: Sequence[RegistryEntry], value: Any) -> list[RegistryEntry]:
    """Those of a provider (timm, zoo, the name of a package), and those that are made from a model of it.

    Raises:
        UnknownNameError: nothing in the registry comes from there.
    """
    kept = [entry for entry in entries if str(value).lower() in _sources(entry)]
    if not kept:
        known = {source for name in registry.names() for source in _sources(registry.entry(name))}
        if str(value).lower() not in known:
            raise UnknownNameError(f"source of {registry.kind}s", str(value), sorted(known))
    return kept


def _sources(entry: RegistryEntry) -> set[str]:
    provider, library = str(entry.metadata.get("provider", "")), str(entry.metadata.get("source", ""))
    made_from = {library.partition("/")[0]} if "/" in library else set()
    return {source.lower() for source in {provider, provider.partition(" ")[0], *made_from} if source}


def by_licence(registry: Registry[Any], entries: Sequence[RegistryEntry], value: Any) -> list[RegistryEntry]:
    """Those whose weights have a licence, in any case; where the source names none, it is not known.

    Raises:
        UnknownNameError: nothing in the registry has this licence.
    """
    wanted = str(value).lower()
    kept = [entry for entry in entries if str(entry.known().get("licence", "")).lower() == wanted]
    if not kept:
        known = {str(registry.entry(name).known().get("licence", "")).lower() for name in registry.names()} - {""}
        if wanted not in known:
            raise UnknownNameError("licence", str(value), sorted(known))
    return kept


#: What can be asked of any registry.
METADATA_FILTERS: Mapping[str, Filter] = {"source": by_source, "licence": by_licence}
