"""`flashtask convert`: the annotations of DATA in another format."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from flashtask.cli.output import require_creatable

__all__ = ["convert"]


def convert(data: str, folder: str, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the folder or file that the user named.
        folder: where the annotations go.
        params: the options of the command.
    """
    require_creatable(Path(folder).expanduser().absolute())
    from flashtask.data.conversion import convert_annotations

    form = params["format"] or "coco"
    with redirect_stdout(sys.stderr):
        made = convert_annotations(data, folder, form, lossy=params["lossy"], copy_images=params["copy_images"])
    for remark in made.remarks:
        click.echo(remark, err=True)
    if params["json"]:
        click.echo(json.dumps(asdict(made)))
        return
    images = ", ".join(f"{part} {count:,}".strip() for part, count in made.images.items())
    click.echo(f"read {made.layout}: {made.objects:,} objects")
    click.echo(f"wrote {images} images as {form} to {made.folder}")
    for what, count in made.lost.items():
        click.echo(f"lost: {count:,} {what}")
