"""What flashtask itself ships of one kind: where each name's code is, described by a section of zoo.yaml.

A user's own zoo file may add a head that is one of these with other options, and change what a task takes by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.registry import RegistryEntry
from flashtask.core.zoo import ZooFile, load_zoo, own_file_of, own_zoo_files

__all__ = ["ShippedSource"]


class ShippedSource:
    """flashtask's own names of a registry, imported when they are first asked for.

    Args:
        kind: backbone, head or task; the section of zoo.yaml with its plural describes the names.
        targets: `package.module:attribute` of each name.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind, self._targets = kind, dict(targets)
        self._section = f"{kind}s"
        self._checked: list[ZooFile] = []

    def names(self) -> Iterator[str]:
        """The names, in the order given, then those of the user's own zoo files."""
        self._check_own()
        own = (name for file in own_zoo_files() for name in getattr(file.zoo, self._section))
        return iter(dict.fromkeys([*self._targets, *own]))

    def spellings(self) -> Iterator[str]:
        """The same: these names are bare."""
        return self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name, with what zoo.yaml, or the user's own zoo file, says about it."""
        self._check_own()
        described = getattr(load_zoo(), self._section).get(name)
        file = own_file_of(self._section, name)
        if name not in self._targets and file is None:
            return None
        metadata = {"provider": "flashtask", **(described.model_dump(exclude={"override"}) if described else {})}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        source = getattr(described, "source", None)
        load = partial(_load, self._targets[source or name])
        if file is not None:
            metadata |= {"provider": "zoo", "zoo_file": str(file.path)}
        if source is not None:
            load = partial(_load_with_options, self._targets[source], described.options)
        return RegistryEntry(name, self.kind, metadata, load)

    def _check_own(self) -> None:
        for file in own_zoo_files():
            if not any(file is checked for checked in self._checked):
                for name, entry in getattr(file.zoo, self._section).items():
                    self._check(file, name, entry)
                self._checked.append(file)

    def _check(self, file: ZooFile, name: str, entry: Any) -> None:
        """A user's head names one of flashtask's that it is made from; a user's task is one of flashtask's.

        Raises:
            UsageError: with the file, line and column.
        """
        is_head = self.kind == "head"
        keys = (self._section, name, "source") if is_head else (self._section, name)
        wanted = entry.source if is_head else name
        if wanted in self._targets:
            return
        listed = f"choose one of: {', '.join(self._targets)}"
        if wanted is None:
            what = f"{'.'.join(keys)} is missing: a head of your own is one of flashtask's with other options"
            raise file.error(*keys, what=what, fix=listed)
        why = "" if is_head else "a new task is code: an installed package adds it by an entry point"
        fix = did_you_mean(wanted, self._targets) or listed
        raise self._unknown(file, keys, wanted, why, fix)

    def _unknown(self, file: ZooFile, keys: tuple[str, ...], name: str, why: str, fix: str) -> UsageError:
        what = f"{'.'.join(keys)}: flashtask has no {self.kind} named {name!r}"
        return file.error(*keys, what=what, why=why, fix=fix)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _load_with_options(target: str, options: Mapping[str, Any]) -> Any:
    """The builder with other defaults; what is given to it still wins."""
    return partial(_load(target), **options)
