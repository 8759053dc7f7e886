"""Turns a head's name and options into a module, and checks both before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FEATURE_KINDS, FeatureInfo
from flashtask.core.registry import check_options
from flashtask.heads import HEADS, features_taken

__all__ = ["build"]


def build(
    name: str | nn.Module, features: int | FeatureInfo, num_outputs: int, options: Mapping[str, Any]
) -> nn.Module:
    """What `flashtask.heads.build_head` promises."""
    kind, takes = (features.kind if isinstance(features, FeatureInfo) else "pooled"), features_taken(name)
    if kind != takes:
        shown = name if isinstance(name, str) else type(name).__name__
        raise UsageError(
            f"the head {shown!r} takes {takes}, and the backbone gives {kind}",
            why=f"{takes}: {FEATURE_KINDS[takes]}; {kind}: {FEATURE_KINDS[kind]}",
            fix=f'a backbone built for it: build_backbone("...", gives="{takes}")',
        )
    num_features = features.num_features if isinstance(features, FeatureInfo) else features
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a head that is a module takes no options, but {', '.join(options)} was given")
        return name
    for what, value in (("num_features", num_features), ("num_outputs", num_outputs)):
        if not is_whole(value):
            raise UsageError(f"{what} of the head {name!r} must be a whole number of at least 1, not {value!r}")
    builder = HEADS.get(name)
    check_options(f"head {name!r}", builder, options, given=2)
    given: Any = num_features if takes == "pooled" else features
    head = builder(given, num_outputs, **options)
    if not isinstance(head, nn.Module):
        raise UsageError(f"the head {name!r} built a {type(head).__name__}, not a torch.nn.Module")
    return head
