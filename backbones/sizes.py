"""How large backbones are: counted once on the meta device, and remembered in the cache folder.

What is remembered belongs to one version of a library. A model of the user's, or of another package, is counted each
time, for nothing says when it changes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashtask.core.cache import cache_folder
from flashtask.core.errors import StorageError
from flashtask.core.files import atomic_write_text
from flashtask.core.registry import RegistryEntry

__all__ = ["BackboneSize", "remembered_sizes", "sizes_of"]

_FORMAT = 1
_MAX_BYTES = 8 << 20
_SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True)
class BackboneSize:
    """The size of a backbone without a classifier.

    Args:
        num_params: its parameters; shared ones count once.
        num_features: it gives for an image.
        num_layers: groups for milestones and layer-wise rates.
    """

    num_params: int
    num_features: int
    num_layers: int


def sizes_of(entries: Iterable[RegistryEntry]) -> dict[str, BackboneSize]:
    """The size of each backbone; one that cannot be built on the meta device is left out.

    Args:
        entries: of `BACKBONES`.
    """
    sizes: dict[str, BackboneSize] = {}
    files: dict[Path, list[RegistryEntry]] = {}
    for entry in entries:
        if (file := _file(entry)) is not None:
            files.setdefault(file, []).append(entry)
        elif (size := _measure(entry.name)) is not None:
            sizes[entry.name] = size
    for file, listed in files.items():
        sizes |= _remembering(file, [entry.name for entry in listed])
    return sizes


def remembered_sizes(entries: Iterable[RegistryEntry]) -> dict[str, BackboneSize]:
    """Those sizes that are known without building anything."""
    files = {entry.name: _file(entry) for entry in entries}
    known: dict[Path, dict[str, BackboneSize]] = {file: _read(file) for file in set(files.values()) if file}
    return {name: known[file][name] for name, file in files.items() if file and name in known[file]}


def _remembering(file: Path, names: list[str]) -> dict[str, BackboneSize]:
    known = _read(file)
    missing = [name for name in names if name not in known]
    last = time.monotonic()
    try:
        for name in missing:
            if (size := _measure(name)) is not None:
                known[name] = size
            if time.monotonic() - last > _SECONDS_BETWEEN_WRITES:
                _write(file, known)
                last = time.monotonic()
    finally:
        if missing:
            _write(file, known)  # after Ctrl-C too: what was counted stays
    return {name: known[name] for name in names if name in known}


def _measure(name: str) -> BackboneSize | None:
    from flashtask.backbones.without_values import build_without_values

    try:
        backbone = build_without_values(name)
    except Exception:  # code of other packages may raise anything; what cannot be built has no known size
        return None
    num_params = sum(parameter.numel() for parameter in backbone.module.parameters())
    return BackboneSize(num_params, backbone.num_features, len(backbone.layer_groups))


def _file(entry: RegistryEntry) -> Path | None:
    """Where the sizes of an entry's library are kept; None for what does not come from a versioned library."""
    version = entry.metadata.get("library_version")
    if version in (None, "unknown"):
        return None
    return cache_folder() / "backbone_sizes" / f"{entry.metadata['provider']}-{version}.json"


def _read(file: Path) -> dict[str, BackboneSize]:
    """What a file holds; one that is not there, or not whole, holds nothing and is written anew."""
    try:
        with file.open("rb") as opened:
            content: Any = json.loads(opened.read(_MAX_BYTES))
        if content["format"] != _FORMAT:
            return {}
        sizes = {str(name): BackboneSize(**values) for name, values in content["sizes"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    is_whole = all(type(number) is int and number >= 0 for size in sizes.values() for number in asdict(size).values())
    return sizes if is_whole else {}


def _write(file: Path, sizes: dict[str, BackboneSize]) -> None:
    merged = {**_read(file), **sizes}  # another process may have counted meanwhile
    content = {"format": _FORMAT, "sizes": {name: asdict(size) for name, size in sorted(merged.items())}}
    with suppress(StorageError, OSError):  # a home that cannot be written costs counting again, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(content))
