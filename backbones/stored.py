"""What files say about the backbone of their weights: a name and plain arguments, nothing to fetch or read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flashtask.backbones import BACKBONES
from flashtask.backbones.addresses import is_address
from flashtask.backbones.backbone import Backbone
from flashtask.backbones.model_args import check_model_args
from flashtask.core.errors import IntegrityError, UsageError

__all__ = ["check_stored_backbone", "stored_arguments"]


def stored_arguments(backbone: Any, built: Backbone, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a task under which its files name the backbone, where these are not those that were given.

    A backbone from a place gets the name with the commit or the whole path, and the description of what is there, so
    that it is built again when the place is gone.

    Args:
        backbone: the argument as it was given.
        built: what was built from it.
        options: the argument `backbone_options` as it was given.
    """
    if not isinstance(backbone, str):
        return {}
    changed: dict[str, Any] = {}
    if built.description:
        changed = {"backbone": built.name, "backbone_options": {**options, **built.description}}
    if isinstance(options.get("weights"), (str, os.PathLike)):
        path = os.path.abspath(os.path.expanduser(options["weights"]))
        changed["backbone_options"] = {**changed.get("backbone_options", options), "weights": path}
    return changed


def check_stored_backbone(name: Any, options: Any) -> None:
    """Make sure that building a backbone for a file's own weights neither reads another file nor asks the network.

    Args:
        name: as the file has it; a module that was given in its place is not looked at.
        options: the builder's arguments, as the file has them.

    Raises:
        IntegrityError: it would, or the arguments are not plain.
        UnknownNameError: no backbone has this name.
    """
    if not isinstance(name, str):
        return
    if not isinstance(options, Mapping):
        raise IntegrityError(f"backbone_options is {type(options).__name__}, not a table of arguments")
    entry = BACKBONES.entry(name)
    if entry.metadata.get("provider") == "user":
        return  # what its arguments mean is known to its own function alone
    # What stands under `weights` is looked at only where weights are fetched, and here they are not.
    rest = {key: value for key, value in options.items() if key not in ("architecture", "model_args", "weights")}
    try:
        check_model_args(rest)
        check_model_args(options.get("model_args") or {})
    except UsageError as error:
        raise IntegrityError(f"the arguments of its backbone were refused: {error.what}") from error
    if is_address(entry.name):
        held = options.get("architecture")
        if not isinstance(held, str) or is_address(BACKBONES.entry(held).name):
            raise IntegrityError(f"its backbone {name[:200]!r} is a place, and nothing says what it held")
