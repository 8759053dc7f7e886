"""What `BACKBONES.search` can ask for: size, image size, licence, source, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.registry import Registry, RegistryEntry
from flashtask.core.search import METADATA_FILTERS, Filter

__all__ = ["BACKBONE_FILTERS"]

Entries = Sequence[RegistryEntry]


def _by_input_size(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
    """Those whose weights take images of this height and width: 224, (224, 192) or (3, 224, 192)."""
    sizes = [value, value] if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(sizes, (list, tuple)) or len(sizes) not in (2, 3) or not all(type(n) is int for n in sizes):
        raise UsageError(
            f"input_size cannot be {value!r}", why="it is pixels, or (height, width)", fix="input_size=224"
        )
    wanted = [*sizes[-2:]]
    return [entry for entry in entries if entry.known().get("input_size", [])[-2:] == wanted]


def _by_flag(fact: str) -> Filter:
    def keep(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
        if not isinstance(value, bool):
            raise UsageError(f"{fact} is True or False, not {value!r}", fix=f"{fact}=True")
        return [entry for entry in entries if entry.known().get(fact, False) is value]

    return keep


def _by_params(name: str, sign: int) -> Filter:
    def keep(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
        from flashtask.backbones.sizes import sizes_of

        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UsageError(f"{name} is a number of parameters above 0, not {value!r}", fix=f"{name}=10e6")
        sizes = sizes_of(entries)
        return [e for e in entries if e.name in sizes and sign * sizes[e.name].num_params <= sign * value]

    return keep


#: The cheap ones first: names, then what libraries say, then what must be built to be known.
BACKBONE_FILTERS: Mapping[str, Filter] = {
    **METADATA_FILTERS,
    "input_size": _by_input_size,
    "pretrained": _by_flag("pretrained"),
    "cached": _by_flag("cached"),
    "max_params": _by_params("max_params", 1),
    "min_params": _by_params("min_params", -1),
}
