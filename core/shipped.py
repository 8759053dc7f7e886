"""What flashtask itself ships of one kind: where each name's code is, described by a section of zoo.yaml."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from flashtask.core.registry import RegistryEntry
from flashtask.core.zoo import load_zoo

__all__ = ["ShippedSource"]


class ShippedSource:
    """flashtask's own names of a registry, imported when they are first asked for.

    Args:
        kind: backbone, head or task; the section of zoo.yaml with its plural describes the names.
        targets: `package.module:attribute` of each name.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind, self._targets = kind, dict(targets)

    def names(self) -> Iterator[str]:
        """The names, in the order given."""
        return iter(self._targets)

    def spellings(self) -> Iterator[str]:
        """The same: these names are bare."""
        return self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a shipped name, with what zoo.yaml says about it."""
        if name not in self._targets:
            return None
        described = getattr(load_zoo(), f"{self.kind}s").get(name)
        metadata = {"provider": "flashtask", **(described.model_dump() if described else {})}
        return RegistryEntry(name, self.kind, metadata, partial(_load, self._targets[name]))


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
