"""What backbones there are, without importing torch, timm or torchvision.

A library's names are read from its source files: each model is a function under `@register_model`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashtask.core.errors import MissingInputError
from flashtask.core.registry import RegistryEntry
from flashtask.core.zoo import load_zoo

__all__ = ["LibrarySource", "ZooSource", "library_names"]

_MODEL = re.compile(r"^@register_model\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def library_names(library: str) -> tuple[str, ...]:
    """The architectures of an installed library, sorted; read once from its `models` folder.

    Files of subfolders are read too for timm; torchvision's subfolders hold detection, segmentation, video,
    quantized and optical flow models, which are no backbones.

    Raises:
        MissingInputError: the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise MissingInputError(f"{library} is not installed", fix=f"pip install {library}")
    folder = Path(spec.origin).parent / "models"
    files = sorted(folder.rglob("*.py") if library == "timm" else folder.glob("*.py"))
    return tuple(sorted({name for file in files for name in _MODEL.findall(file.read_text("utf-8"))}))


class LibrarySource:
    """The models of one library as registry entries named `LIBRARY/NAME` or `LIBRARY/NAME.TAG`.

    Args:
        library: import name of the library, and its key under `providers` in zoo.yaml.
        builder: the module here whose `build_model(name, pretrained, in_chans, **options)` builds one.
        is_default: bare names mean this library's.
    """

    def __init__(self, library: str, *, builder: str, is_default: bool = False) -> None:
        self.library, self._builder, self._is_default = library, builder, is_default

    def names(self) -> Iterator[str]:
        """`LIBRARY/NAME` of every architecture."""
        return (f"{self.library}/{name}" for name in library_names(self.library))

    def spellings(self) -> Iterator[str]:
        """Bare names for the default library, canonical names for another."""
        return iter(library_names(self.library)) if self._is_default else self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of `NAME` (of the default library) or `LIBRARY/NAME`, each with or without `.TAG`."""
        prefix, slash, bare = name.rpartition("/")
        if prefix != self.library if slash else not self._is_default:
            return None
        if bare.partition(".")[0] not in library_names(self.library):
            return None
        return RegistryEntry(f"{self.library}/{bare}", "backbone", self._metadata(bare), partial(self._load, bare))

    def _metadata(self, bare: str) -> dict[str, Any]:
        provider = load_zoo().providers[self.library]
        architecture, _, tag = bare.partition(".")
        metadata = {
            "provider": self.library,
            "library_version": _installed_version(self.library),
            "library_licence": provider.licence,
            "url": provider.url,
            "credit": provider.credit,
            "architecture": architecture,
        }
        return {**metadata, "weights": tag} if tag else metadata

    def _load(self, bare: str) -> Callable[..., Any]:
        return partial(importlib.import_module(self._builder).build_model, bare)


class ZooSource:
    """The zoo's own backbones: a model of a library with its own weights, preprocessing or options."""

    def names(self) -> Iterator[str]:
        """The names under `backbones` in zoo.yaml."""
        return iter(load_zoo().backbones)

    def spellings(self) -> Iterator[str]:
        """The same: these names are bare."""
        return self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name under `backbones` in zoo.yaml."""
        own = load_zoo().backbones.get(name)
        if own is None:
            return None
        metadata = {"provider": "zoo", **own.model_dump(exclude_none=True)}
        return RegistryEntry(name, "backbone", metadata, partial(_load_own, name))


def _load_own(name: str) -> Callable[..., Any]:
    module = importlib.import_module("flashtask.backbones.packaged")
    builder: Callable[..., Any] = partial(module.build_model, name)
    return builder


def _installed_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
