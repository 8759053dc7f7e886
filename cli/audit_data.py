"""`flashtask audit` and `flashtask show`: what is suspicious about data, and what a model gets to see of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.output import require_writable_file
from flashtask.cli.parts import build_data
from flashtask.cli.request import requested_recipe, require_data
from flashtask.core.errors import BadDataError

__all__ = ["audit", "show"]

_DEFAULT_OUTPUT = "batch.png"


def audit(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the folder, table or recipe that the user named, if any.
        params: the options of the command.

    Raises:
        click.exceptions.Exit: with the code of BadDataError, if something spoils a result.
    """
    backbone, html = params["backbone"], params["html"]
    recipe = requested_recipe(data, {**params, "backbone": None})
    require_data(recipe)
    if html:
        require_writable_file(Path(html))
    with redirect_stdout(sys.stderr):
        found = build_data(recipe).audit(_model(backbone), ignore=params["ignore"] or ())
        if html:
            found.save_html(html)
    click.echo(json.dumps(found.to_dict()) if params["json"] else str(found))
    if html:
        click.echo(f"\npage: {html}", err=params["json"])
    if found.spoils:
        raise click.exceptions.Exit(BadDataError.exit_code)


def _model(backbone: str | None, **options: Any) -> Any:
    if backbone is None:
        return None
    from flashtask.tasks.image_embedding import ImageEmbedder

    return ImageEmbedder(backbone, **options)


def show(data: str | None, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        data: the folder, table or recipe that the user named, if any.
        params: the options of the command.
    """
    backbone, output = params["backbone"], params["output"] or _DEFAULT_OUTPUT
    recipe = requested_recipe(data, {**params, "backbone": None})
    require_data(recipe)
    require_writable_file(Path(output))
    datamodule = build_data(recipe)
    if backbone is not None:
        datamodule.use_preprocessing(_model(backbone, pretrained=False).preprocessing)
    options = {"part": params["of"], "num_samples": params["num"], "epoch": params["epoch"], "seed": params["seed"]}
    datamodule.show_batch(output=output, **{name: value for name, value in options.items() if value is not None})
    click.echo(output)
