"""`flashtask cache`: what is kept between runs, how much of it, and how to be rid of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["cache"]

#: What the folders of the cache hold.
_KINDS = {
    "features": "features of frozen backbones",
    "checkpoints": "checkpoints that were downloaded",
    "data": "unpacked archives, images of Parquet files, files at addresses",
    "shards": "shards that were fetched from addresses",
    "hub": "hashes of the files in hub repositories",
    "backbone_sizes": "numbers of parameters",
    "files": "which files were checked, and their hashes",
}


def cache(words: Sequence[str], params: Mapping[str, Any]) -> None:
    """List what is kept, or remove it.

    Args:
        words: nothing, or `clear` and perhaps a kind.
        params: the options of the command.

    Raises:
        UsageError: other words.
        UnknownNameError: no kind has this name.
    """
    if not words:
        _list(params["json"])
        return
    if words[0] != "clear" or len(words) > 2:
        raise UsageError(
            f"there is no command `flashtask cache {' '.join(words)}`", fix="flashtask cache clear features"
        )
    if len(words) == 2 and words[1] not in _KINDS:
        raise UnknownNameError("kind of cached data", words[1], _KINDS)
    _clear(words[1:] or list(_KINDS))


def _list(as_json: bool) -> None:
    from flashtask.core.feature_store import FeatureStore

    store = FeatureStore()
    sizes = {kind: sum(_size(path) for path in _paths(kind)) for kind in _KINDS}
    entries = store.entries()
    if as_json:
        features = [{"key": one.key, "bytes": one.size, "used": one.used, **one.about} for one in entries]
        shown = {"folder": str(cache_folder()), "limit": store.limit, "bytes": sizes, "features": features}
        click.echo(json.dumps(shown, indent=1))
        return
    click.echo(f"{cache_folder()}: {_bytes(sum(sizes.values()))}")
    for kind, size in sizes.items():
        if size:
            limit = f", at most {_bytes(store.limit)}" if kind == "features" else ""
            click.echo(f"  {kind:<15} {_bytes(size):>9}  {_KINDS[kind]}{limit}")
    for one in entries:
        about = one.about
        click.echo(f"    {_bytes(one.size):>9}  {_age(one.used):>8}  {about.get('backbone')}, {about.get('what')}")


def _clear(kinds: Sequence[str]) -> None:
    freed = 0
    for kind in kinds:
        for path in _paths(kind):
            freed += _size(path)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    click.echo(f"removed {_bytes(freed)} of {', '.join(kinds)}")


def _paths(kind: str) -> list[Path]:
    if kind == "files":
        return sorted(cache_folder().glob("files.sqlite*"))
    folder = cache_folder() / kind
    return [folder] if folder.is_dir() else []


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _age(used: float) -> str:
    hours = (time.time() - used) / 3600
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
