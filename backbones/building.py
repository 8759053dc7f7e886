"""Turns a backbone's name, or a user's module, into a `Backbone`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from flashtask.backbones import BACKBONES
from flashtask.backbones.addresses import is_address
from flashtask.backbones.backbone import Backbone
from flashtask.backbones.features import make_features_flat
from flashtask.backbones.layer_groups import default_layer_groups
from flashtask.backbones.weights import for_channels
from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.registry import check_options

__all__ = ["build", "call_builder"]


def build(name: Any, *, pretrained: bool, in_chans: int, options: Mapping[str, Any]) -> Backbone:
    """What `flashtask.backbones.build_backbone` promises."""
    if not is_whole(in_chans):
        raise UsageError(f"in_chans must be a whole number of at least 1, not {in_chans!r}")
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a backbone that is a module takes no options, but {', '.join(options)} was given")
        return _wrap(name, type(name).__name__, in_chans)
    if "weights" in options:
        return _with_weights(name, pretrained, in_chans, dict(options))
    canonical = BACKBONES.entry(name).name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    built = call_builder(name, pretrained, in_chans, options)
    if isinstance(built, Backbone):
        # A place knows its own name better: with the commit that was fetched.
        return built if is_address(canonical) else replace(built, name=canonical)
    if isinstance(built, nn.Module):
        return _wrap(built, canonical, in_chans)
    raise UsageError(f"the backbone {canonical!r} built a {type(built).__name__}, not a torch.nn.Module or Backbone")


def call_builder(name: Any, pretrained: bool, in_chans: int, options: Mapping[str, Any]) -> Any:
    """What the function behind a registered name, or a function of the user's, builds.

    Raises:
        UnknownNameError: it has no such option, or there is no such name.
        UsageError: it is neither a name nor a function.
    """
    if isinstance(name, str):
        builder = BACKBONES.get(name)
        check_options(f"backbone {name!r}", builder, options)
        if BACKBONES.entry(name).metadata.get("provider") == "user":
            return builder(**_arguments(name, builder, pretrained, in_chans, options))
        return builder(pretrained=pretrained, in_chans=in_chans, **options)
    if not callable(name):
        what = f"a backbone is a name, a module or a function, not a {type(name).__name__}"
        raise UsageError(what, fix='build_backbone("resnet18")')
    shown = getattr(name, "__name__", type(name).__name__)
    check_options(f"backbone {shown!r}", name, options)
    return name(**_arguments(shown, name, pretrained, in_chans, options))


def _arguments(
    name: str, function: Callable[..., Any], pretrained: bool, in_chans: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a function of the user's is called with: `pretrained` and `in_chans` if it has such parameters."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if in_chans != 3 and "in_chans" not in parameters and not takes_any:
        raise UsageError(
            f"the function {name!r} cannot be told in_chans={in_chans}", fix=f"def {name}(pretrained, in_chans): ..."
        )
    known = {"pretrained": pretrained, "in_chans": in_chans}
    return {**{key: value for key, value in known.items() if takes_any or key in parameters}, **options}


def _with_weights(name: Any, pretrained: bool, in_chans: int, options: dict[str, Any]) -> Backbone:
    """A named architecture with the weights of a file, under whatever prefix they stand there."""
    from flashtask.backbones.file_weights import load_file, weights_file

    path = weights_file(name, options.pop("weights"), pretrained)
    entry = BACKBONES.entry(name)
    if is_address(entry.name):
        raise UsageError(f"{name} has weights of its own: `weights` goes with the name of an architecture")
    if entry.metadata.get("provider") == "timm":
        from flashtask.backbones.timm_provider import build_model

        return build_model(entry.name.removeprefix("timm/"), in_chans=in_chans, weights=path, **options)
    built = build(name, pretrained=False, in_chans=in_chans, options=options)
    load_file(built, path, in_chans)
    return built


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
