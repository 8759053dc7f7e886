"""`flashtask licence`: the licences of what a model is made of, and what follows from them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import click

from flashtask.cli.input_paths import checkpoint_source
from flashtask.core.licence_terms import conclusions
from flashtask.core.names import shown_name

__all__ = ["licence"]

_WIDTH = 80


def licence(ckpt: str, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        ckpt: a checkpoint of a task, a run folder, a folder in timm's layout, or an address.
        params: the options of the command.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is damaged.
        HubError: the hub cannot be reached.
    """
    checkpoint = checkpoint_source(ckpt)
    with redirect_stdout(sys.stderr):
        from flashtask.tasks.licences import licences_in, parts_of
        from flashtask.tasks.pretrained.source import find_source
        from flashtask.tasks.stored_task import content_of

        parts = list(parts_of(licences_in(content_of(find_source(checkpoint), "cpu"))))
    found = conclusions(parts)
    if params["json"]:
        click.echo(json.dumps({"parts": [part.to_dict() for part in parts], "conclusions": found}, indent=2))
        return
    rows = [(part.kind, part.terms.name, shown_name(part.name), part.terms.words()) for part in parts]
    widths = [max(map(len, column)) for column in [*zip(*rows, strict=True)][:2]]
    for kind, name, what, words in rows:
        head = f"{kind:<{widths[0]}}  {name:<{widths[1]}}  "
        _wrapped(f"{what}: {words}", head)
    click.echo("\nwhat follows (a summary, no legal advice):")
    for line in found:
        _wrapped(line, "- ", "  ")


def _wrapped(text: str, head: str, rest: str | None = None) -> None:
    indent = " " * len(head) if rest is None else rest
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    click.echo("\n".join(lines))
