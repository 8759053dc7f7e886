"""`flashtask zoo`: what there is to build with. Listing names imports neither torch nor timm; some filters do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from flashtask.cli.own_zoo import check_zoo, use_option
from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.registry import RegistryEntry
from flashtask.core.registry_search import is_expression, name_matcher
from flashtask.core.zoo import load_zoo, own_file_of
from flashtask.tasks.own_zoo import REGISTRIES

__all__ = ["run_zoo"]

_KINDS = ("task", "head", "recipe", "checkpoint", "backbone")
_FILTERS = ("source", "licence", "input_size", "min_params", "max_params", "pretrained", "cached")
#: More models than this take long enough to count that it is said.
_MANY = 20


def run_zoo(words: Sequence[str], params: Mapping[str, Any]) -> None:
    """List what matches, show one entry, or check a zoo file.

    Args:
        words: nothing, a query, `show` and a name, or `check` and a file.
        params: the options of the command.

    Raises:
        UsageError: nothing matches (with near matches), or more words than one query.
    """
    if words and words[0] in ("show", "check"):
        if len(words) != 2:
            wanted, example = ("one name", "resnet18") if words[0] == "show" else ("one file", "my_zoo.yaml")
            raise UsageError(f"`flashtask zoo {words[0]}` needs {wanted}", fix=f"flashtask zoo {words[0]} {example}")
        if words[0] == "check":
            check_zoo(words[1])
            return
        use_option(params)
        _show(words[1], params["kind"], params["json"])
        return
    if len(words) > 1:
        raise UsageError(f"one query, not {len(words)}: {' '.join(words)}", fix=f"flashtask zoo {words[0]}")
    use_option(params)
    _list(words[0] if words else "", params)


def _list(query: str, params: Mapping[str, Any]) -> None:
    kind = params["kind"]
    if query.removesuffix("s") in _KINDS:
        kind, query = query.removesuffix("s"), ""
    filters = {name: params[name] for name in _FILTERS if params[name] not in (None, False)}
    if filters:
        found = _filtered(query, kind or "backbone", filters)
    else:
        matches = name_matcher(query)
        found = [entry for entry in _entries(kind) if matches(entry["name"])]
        if query and not found:
            raise _nothing_named(query, kind)
    if params["json"]:
        click.echo(json.dumps(found, indent=1))
    else:
        _print_table(found)


def _filtered(query: str, kind: str, filters: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of one kind that pass all filters; where none does although the name is there, that is said."""
    registry = REGISTRIES.get(kind)
    for name in filters:
        if registry is None or name not in registry.filters():
            has = ", ".join(f"--{known.replace('_', '-')}" for known in registry.filters()) if registry else "none"
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} cannot filter {kind}s", why=f"filters for {kind}s: {has}", fix="--kind backbone")
    assert registry is not None
    if query and not registry.search(query):
        raise _nothing_named(query, kind)
    counted = {name: filters.pop(name) for name in ("min_params", "max_params") if name in filters}
    entries = registry.search(query, **filters)
    if counted:
        _say_counting(entries)
        entries = registry.search(query, **filters, **counted)
    if not entries:
        print(f"no {kind} passes these filters", file=sys.stderr)
    return [_plain(entry) for entry in entries]


def _say_counting(entries: Sequence[Any]) -> None:
    from flashtask.backbones.search import remembered_sizes

    missing = len(entries) - len(remembered_sizes(entries))
    if missing > _MANY:
        print(f"counting the parameters of {missing} backbones; the numbers are cached", file=sys.stderr)


def _entries(kind: str | None) -> Iterator[dict[str, Any]]:
    """Every entry of a kind (of all kinds), as plain values with a name and a kind."""
    for one in _KINDS if kind is None else [kind]:
        if one in ("checkpoint", "recipe"):
            yield from _plain_entries(one)
        else:
            registry = REGISTRIES[one]
            yield from (_plain(registry.entry(name)) for name in registry.names())


def _plain_entries(kind: str) -> Iterator[dict[str, Any]]:
    """Checkpoints and recipes, which stand in the zoo alone."""
    for name, entry in getattr(load_zoo(), f"{kind}s").items():
        file = own_file_of(f"{kind}s", name)
        source = {} if file is None else {"zoo_file": str(file.path)}
        yield {"name": name, "kind": kind, **entry.model_dump(exclude_defaults=True, exclude={"override"}), **source}


def _plain(entry: RegistryEntry) -> dict[str, Any]:
    return {"name": entry.name, "kind": entry.kind, **entry.metadata}


def _nothing_named(name: str, kind: str | None) -> UsageError:
    listing = f"`flashtask zoo --kind {kind}` lists all" if kind else "`flashtask zoo` lists all"
    if is_expression(name):
        why = "with one of the characters * + ? [ ] ( ) { } | ^ $ it is a regular expression for the whole name"
        part = "".join(letter for letter in name if letter.isalnum() or letter in "_-/")
        return UsageError(f"no {kind or 'entry'} matches {name!r}", why=why, fix=f"'.*{part}.*', or {listing}")
    names = [entry["name"] for entry in _entries(kind)]
    close = did_you_mean(name, [*names, *(known.partition("/")[2] for known in names if "/" in known)])
    return UsageError(f"no {kind or 'entry'} named {name!r}", fix=f"{close} {listing}".strip())


def _show(name: str, kind: str | None, as_json: bool) -> None:
    registries = {k: r for k, r in REGISTRIES.items() if kind in (None, k) and name in r}
    found = [_everything(registry, name) for registry in registries.values()]
    for one in ("checkpoint", "recipe"):
        found += [entry for entry in _plain_entries(one) if entry["name"] == name and kind in (None, one)]
    if not found:
        raise _nothing_named(name, kind)
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    for entry in found:
        for key, value in entry.items():
            click.echo(f"{key}: {_readable(value)}")


def _everything(registry: Any, name: str) -> dict[str, Any]:
    """All that is known of one name: a backbone's library is loaded, and its parameters are counted."""
    entry = registry.entry(name)
    values = {"name": entry.name, "kind": entry.kind, **entry.known()}
    if entry.kind == "backbone":
        from flashtask.backbones.search import sizes_of

        size = sizes_of([entry]).get(entry.name)
        values |= vars(size) if size is not None else {}
    return values


def _readable(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return f"{value:,}" if type(value) is int else json.dumps(value)


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
