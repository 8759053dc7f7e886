"""Turns a backbone's name, or a user's module, into a `Backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from flashtask.backbones import BACKBONES
from flashtask.backbones.backbone import Backbone
from flashtask.backbones.features import default_layer_groups, make_features_flat
from flashtask.backbones.weights import for_channels
from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.registry import check_options

__all__ = ["build"]


def build(name: str | nn.Module, *, pretrained: bool, in_chans: int, options: Mapping[str, Any]) -> Backbone:
    """What `flashtask.backbones.build_backbone` promises."""
    if not isinstance(in_chans, int) or isinstance(in_chans, bool) or in_chans < 1:
        raise UsageError(f"in_chans must be a whole number of at least 1, not {in_chans!r}")
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a backbone that is a module takes no options, but {', '.join(options)} was given")
        return _wrap(name, type(name).__name__, in_chans)
    canonical = BACKBONES.entry(name).name
    builder = BACKBONES.get(name)
    check_options(f"backbone {name!r}", builder, options)
    built = builder(pretrained=pretrained, in_chans=in_chans, **options)
    if isinstance(built, Backbone):
        return replace(built, name=canonical)
    if isinstance(built, nn.Module):
        return _wrap(built, canonical, in_chans)
    raise UsageError(f"the backbone {name!r} built a {type(built).__name__}, not a torch.nn.Module or Backbone")


def _wrap(module: nn.Module, name: str, in_chans: int) -> Backbone:
    """A user's module; its own `preprocessing` and `num_features` count, and the latter is checked."""
    preprocessing = getattr(module, "preprocessing", None)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = for_channels(Preprocessing(), in_chans)
    num_features = make_features_flat(module, preprocessing.input_size, name)
    declared = getattr(module, "num_features", num_features)
    if declared != num_features:
        raise UsageError(
            f"the backbone {name!r} says num_features = {declared} and gives {num_features} features",
            fix=f"self.num_features = {num_features}",
        )
    return Backbone(module, num_features, preprocessing, name, default_layer_groups(module))
