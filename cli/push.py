"""`flashtask push` and `flashtask pull`: a trained model to the hub, and from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flashtask.cli.output import require_creatable
from flashtask.core.hub.address import HubAddress, branch_address
from flashtask.core.model_path import model_path

__all__ = ["pull", "push"]


def push(model: str, repository: str, params: Mapping[str, Any]) -> None:
    """Run `flashtask push`.

    Args:
        model: a checkpoint, a run folder, or a pretrained folder.
        repository: `org/name`, also with a branch behind `@`.
        params: the options of the command.
    """
    address = branch_address(repository, params["revision"])
    path = model_path(model)
    from flashtask.core.hub.upload import require_login, upload_folder
    from flashtask.tasks.loading import load
    from flashtask.tasks.pretrained.pushing import prepared_folder

    if not params["dry_run"]:
        require_login(address)
    with prepared_folder(path, address, load, params["licence"]) as folder:
        _list_files(folder, address)
        if params["dry_run"]:
            click.echo("nothing was pushed (--dry-run)")
            return
        made = upload_folder(folder, address, private=params["private"], message=params["message"] or "")
    click.echo(f"pushed: {made.url}")
    click.echo(f"commit: {made.commit}")
    click.echo(f"next: flashtask pull hf://{address.repository}@{made.commit}")


def pull(address: str, folder: str | None) -> None:
    """Run `flashtask pull`.

    Args:
        address: `hf://org/name@revision`, or `org/name`.
        folder: where to; None for the repository's name in the current folder.
    """
    wanted = HubAddress.parse(address)
    place = Path(folder or wanted.repository.partition("/")[2]).expanduser()
    require_creatable(place.absolute())
    from flashtask.tasks.pretrained.pushing import pull as fetch_into

    commit = fetch_into(wanted, place)
    click.echo(f"pulled: {wanted.repository}@{commit}")
    click.echo(f"folder: {place}")
    click.echo(f"next: flashtask predict {place} IMAGE")


def _list_files(folder: Path, address: HubAddress) -> None:
    branch = f" ({address.revision})" if address.revision else ""
    click.echo(f"{address.repository}{branch}:")
    sizes = {name: os.path.getsize(folder / name) for name in sorted(os.listdir(folder))}
    for name, size in {**sizes, "in all": sum(sizes.values())}.items():
        click.echo(f"  {name:<20} {size:>14,} bytes")
