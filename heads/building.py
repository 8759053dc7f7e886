"""Turns a head's name and options into a module, and checks both before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.registry import check_options
from flashtask.heads import HEADS

__all__ = ["build"]


def build(name: str | nn.Module, num_features: int, num_outputs: int, options: Mapping[str, Any]) -> nn.Module:
    """What `flashtask.heads.build_head` promises."""
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a head that is a module takes no options, but {', '.join(options)} was given")
        return name
    for what, value in (("num_features", num_features), ("num_outputs", num_outputs)):
        if not is_whole(value):
            raise UsageError(f"{what} of the head {name!r} must be a whole number of at least 1, not {value!r}")
    builder = HEADS.get(name)
    check_options(f"head {name!r}", builder, options, given=2)
    head = builder(num_features, num_outputs, **options)
    if not isinstance(head, nn.Module):
        raise UsageError(f"the head {name!r} built a {type(head).__name__}, not a torch.nn.Module")
    return head
