"""`flashtask push` and `flashtask pull`: a trained model to the hub, and from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from flashtask.cli.output import require_creatable
from flashtask.core.errors import UsageError
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
    if params["space"]:
        address = replace(address, kind="space")
    _check_options(params)
    path = model_path(model)
    from flashtask.core.hub.upload import require_login, upload_folder

    if not params["dry_run"] and not params["write"]:
        require_login(address)
    with _prepared(path, address, params) as folder:
        _list_files(folder, address)
        if params["write"]:
            click.echo(f"next: pip install gradio -r {folder / 'requirements.txt'}; python {folder / 'app.py'}")
            return
        if params["dry_run"]:
            click.echo("nothing was pushed (--dry-run)")
            return
        made = upload_folder(folder, address, private=params["private"], message=params["message"] or "")
    click.echo(f"pushed: {made.url}")
    click.echo(f"commit: {made.commit}")
    if address.kind == "model":
        click.echo(f"next: flashtask pull hf://{address.repository}@{made.commit}")


def _check_options(params: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing together.

    Raises:
        UsageError: with what to leave out.
    """
    if params["write"] and not params["space"]:
        raise UsageError("--write is for the files of a Space", fix="--space too; or model.save_pretrained(folder)")
    if params["space"] and params["onnx"]:
        raise UsageError("a Space holds model.onnx anyway", fix="leave out --onnx")


@contextmanager
def _prepared(path: Path, address: HubAddress, params: Mapping[str, Any]) -> Iterator[Path]:
    """The folder that is pushed, or that was asked for."""
    from flashtask.tasks.loading import load
    from flashtask.tasks.pretrained.pushing import prepared_folder
    from flashtask.tasks.pretrained.space import write_space

    if not params["space"]:
        with prepared_folder(path, address, load, params["licence"], onnx=params["onnx"]) as folder:
            yield folder
        return
    name = address.repository.partition("/")[2]
    with tempfile.TemporaryDirectory(prefix="flashtask-") as root:
        place = Path(params["write"]).expanduser() if params["write"] else Path(root, name)
        yield write_space(load(path), place, name, params["licence"])


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
