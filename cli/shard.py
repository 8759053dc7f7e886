"""`flashtask shard`: DATA as tar files that are read without unpacking them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.output import require_creatable
from flashtask.cli.parts import build_data
from flashtask.cli.request import requested_recipe, require_data

__all__ = ["shard"]

_MEGABYTE = 10**6


def shard(data: str, folder: str, params: Mapping[str, Any]) -> None:
    """Run the command: split DATA, check its images, and write them.

    Args:
        data: the folder, table or recipe that the user named.
        folder: where the shards go.
        params: the options of the command.
    """
    recipe = requested_recipe(data, {**params, "backbone": None})
    require_data(recipe)
    from flashtask.data.shard_writer import DEFAULT_SHARD_BYTES, require_new_folder

    require_creatable(require_new_folder(folder))
    size = params["shard_size"]
    with redirect_stdout(sys.stderr):
        made = build_data(recipe)
        place = made.save_shards(folder, shard_bytes=DEFAULT_SHARD_BYTES if size is None else size * _MEGABYTE)
    files = [path.stat().st_size for path in Path(place).glob("*.tar")]
    about = {"folder": str(place), "sizes": made.sizes(), "shards": len(files), "bytes": sum(files)}
    if params["json"]:
        click.echo(json.dumps(about))
        return
    images = ", ".join(f"{part} {count:,}" for part, count in made.sizes().items())
    click.echo(f"wrote {images} to {len(files)} shard(s), {sum(files) / _MEGABYTE:,.1f} MB")
    click.echo(f"next: flashtask finetune {shlex.quote(folder)}")
