"""`flashtask zoo`: what there is to build with. Listing imports neither torch nor timm."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from flashtask.core.errors import UsageError, did_you_mean

__all__ = ["list_zoo"]

_KINDS = ("task", "head", "checkpoint", "backbone")


def list_zoo(words: Sequence[str], params: Mapping[str, Any]) -> None:
    """List what matches, or show one entry.

    Args:
        words: nothing, a query, or `show` and a name.
        params: the options of the command.

    Raises:
        UsageError: nothing matches (with near matches), or more words than one query.
    """
    kind = params["kind"]
    if words and words[0] == "show":
        if len(words) != 2:
            raise UsageError("`flashtask zoo show` needs one name", fix="flashtask zoo show resnet18")
        _show(words[1], kind, params["json"])
        return
    if len(words) > 1:
        raise UsageError(f"one query, not {len(words)}: {' '.join(words)}", fix=f"flashtask zoo {words[0]}")
    query = words[0] if words else ""
    if query.removesuffix("s") in _KINDS:
        kind, query = query.removesuffix("s"), ""
    found = [entry for entry in _entries(kind) if query.lower() in entry["name"].lower()]
    if query and not found:
        raise _nothing_named(query, kind)
    if params["json"]:
        click.echo(json.dumps(found, indent=1))
    else:
        _print_table(found)


def _entries(kind: str | None) -> Iterator[dict[str, Any]]:
    """Every entry of a kind (of all kinds), as plain values with a name and a kind."""
    for one in _KINDS if kind is None else [kind]:
        if one == "checkpoint":
            yield from _checkpoints()
        else:
            registry = _registries()[one]
            yield from (_entry(registry, name) for name in registry.names())


def _checkpoints() -> Iterator[dict[str, Any]]:
    from flashtask.core.zoo import load_zoo

    for name, checkpoint in load_zoo().checkpoints.items():
        yield {"name": name, "kind": "checkpoint", **checkpoint.model_dump(exclude_none=True)}


def _registries() -> dict[str, Any]:
    from flashtask.backbones import BACKBONES
    from flashtask.heads import HEADS
    from flashtask.tasks import TASKS

    return {"backbone": BACKBONES, "head": HEADS, "task": TASKS}


def _entry(registry: Any, name: str) -> dict[str, Any]:
    entry = registry.entry(name)
    return {"name": entry.name, "kind": entry.kind, **entry.metadata}


def _nothing_named(name: str, kind: str | None) -> UsageError:
    names = [entry["name"] for entry in _entries(kind)]
    close = did_you_mean(name, [*names, *(known.partition("/")[2] for known in names if "/" in known)])
    listing = f"flashtask zoo --kind {kind}" if kind else "flashtask zoo"
    return UsageError(f"no {kind or 'entry'} named {name!r}", fix=f"{close} `{listing}` lists all".strip())


def _show(name: str, kind: str | None, as_json: bool) -> None:
    registries = _registries()
    found = [_entry(registry, name) for k, registry in registries.items() if kind in (None, k) and name in registry]
    found += [entry for entry in _checkpoints() if entry["name"] == name and kind in (None, "checkpoint")]
    if not found:
        raise _nothing_named(name, kind)
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    for entry in found:
        for key, value in entry.items():
            click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


def _print_table(entries: Iterable[Mapping[str, Any]]) -> None:
    rows = [(entry["name"], entry["kind"], _remark(entry)) for entry in entries]
    width = max((len(name) for name, _, _ in rows), default=0)
    columns = _columns()
    for name, kind, remark in rows:
        before = f"{name:<{width}}  {kind:<10}  "
        click.echo(f"{before}{_cut(remark, columns - len(before)) if columns else remark}".rstrip())


def _columns() -> int | None:
    """How wide the table may be: the terminal, or what COLUMNS says; None where neither does."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return None


def _cut(text: str, width: int) -> str:
    """What fits of a text; names are never cut, so there may be no room for it at all."""
    if len(text) <= width:
        return text
    return text[: width - 3].rstrip() + "..." if width > 3 else ""


def _remark(entry: Mapping[str, Any]) -> str:
    return str(entry.get("description") or entry.get("provider") or "")
