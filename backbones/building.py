"""Turns a backbone's name, or a user's module, into a `Backbone`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashtask.backbones.backbone import BACKBONES, WEIGHT_SUFFIXES, Backbone, is_address
from flashtask.backbones.inspection import (
    built_without_values,
    default_layer_groups,
    make_features_flat,
    run_without_values,
)
from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.feature_info import FEATURE_KINDS, FeatureInfo
from flashtask.core.number_checks import is_whole
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.registry import check_options

__all__ = ["build", "build_without_values", "call_builder", "preprocessing_of_module"]


def build(name: Any, *, pretrained: bool, in_chans: int, options: Mapping[str, Any], gives: str = "pooled") -> Backbone:
    """What `flashtask.backbones.build_backbone` promises, for pooled features and tokens."""
    if gives == "tokens" and isinstance(name, str) and pretrained:
        _check_tokens(name)
    made = _built(name, pretrained, in_chans, options, flat=gives == "pooled")
    if made.features.kind == gives:
        return made
    if gives == "tokens" and made.features.kind == "pooled":
        return _as_tokens(made)
    raise UsageError(
        f"the backbone {made.name!r} gives {made.features.kind}, and {gives} are needed",
        why=f"{made.features.kind}: {FEATURE_KINDS[made.features.kind]}; {gives}: {FEATURE_KINDS[gives]}",
        fix=f"a head that takes {made.features.kind}",
    )


def _built(name: Any, pretrained: bool, in_chans: int, options: Mapping[str, Any], *, flat: bool = True) -> Backbone:
    """A backbone in the kind that its library has; a user's module is not `flat` if its tokens are wanted."""
    if not is_whole(in_chans):
        raise UsageError(f"in_chans must be a whole number of at least 1, not {in_chans!r}")
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a backbone that is a module takes no options, but {', '.join(options)} was given")
        return _wrap(name, type(name).__name__, in_chans, flat)
    if "weights" in options:
        return _with_weights(name, pretrained, in_chans, dict(options))
    canonical = BACKBONES.entry(name).name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    built = call_builder(name, pretrained, in_chans, options)
    if isinstance(built, Backbone):
        # The name of an address is more exact: it has the commit that was fetched.
        return built if is_address(canonical) else replace(built, name=canonical)
    if isinstance(built, nn.Module):
        return _wrap(built, canonical, in_chans, flat)
    raise UsageError(f"the backbone {canonical!r} built a {type(built).__name__}, not a torch.nn.Module or Backbone")


def call_builder(name: Any, pretrained: bool, in_chans: int, options: Mapping[str, Any]) -> Any:
    """What the function behind a registered name, or a user's function, builds.

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
        what = f"a backbone must be a name, a module or a function, not {name!r}"
        is_number = isinstance(name, int)
        raise UsageError(what, fix=f'"resnet18", num_classes={name}' if is_number else 'build_backbone("resnet18")')
    shown = getattr(name, "__name__", type(name).__name__)
    check_options(f"backbone {shown!r}", name, options)
    return name(**_arguments(shown, name, pretrained, in_chans, options))


def _arguments(
    name: str, function: Callable[..., Any], pretrained: bool, in_chans: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments for a user's function: `pretrained` and `in_chans` if it has such parameters."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if in_chans != 3 and "in_chans" not in parameters and not takes_any:
        raise UsageError(
            f"in_chans={in_chans}, but the function {name!r} has no such parameter",
            fix=f"def {name}(pretrained, in_chans): ...",
        )
    known = {"pretrained": pretrained, "in_chans": in_chans}
    return {**{key: value for key, value in known.items() if takes_any or key in parameters}, **options}


def build_without_values(name: str) -> Backbone:
    """The backbone of a name with all its parameters on the meta device: shapes alone, without memory or time for them.

    Raises:
        UnknownNameError: no backbone has this name.
        UsageError: it cannot be built on the meta device.
    """
    return built_without_values(lambda: build(name, pretrained=False, in_chans=3, options={}))


def _with_weights(name: Any, pretrained: bool, in_chans: int, options: dict[str, Any]) -> Backbone:
    """A named architecture with the weights of a file, whatever prefix their names have there."""
    path = _weights_file(name, options.pop("weights"), pretrained)
    entry = BACKBONES.entry(name)
    if is_address(entry.name):
        raise UsageError(f"{name} already includes weights; `weights` is for the name of an architecture")
    if entry.metadata.get("provider") == "timm":
        from flashtask.backbones.timm_provider import build_model

        return build_model(entry.name.removeprefix("timm/"), in_chans=in_chans, weights=path, **options)
    from flashtask.backbones.weights import fill, read_weights

    built = build(name, pretrained=False, in_chans=in_chans, options=options)
    fill(built.module, read_weights(path), _classifier(built), in_chans, str(path))
    return built


def _weights_file(name: Any, weights: Any, pretrained: bool) -> Path:
    """The file that the option `weights` names.

    Raises:
        UsageError: it is not a file of weights, or the backbone takes none.
        MissingInputError: there is no such file.
    """
    if not isinstance(name, str):
        raise UsageError(
            "weights from a file are for the name of an architecture",
            fix="load them yourself: module.load_state_dict(...)",
        )
    if not isinstance(weights, (str, os.PathLike)) or not str(weights).endswith((*WEIGHT_SUFFIXES, ".ckpt")):
        architecture = name.partition(".")[0]
        example = "IMAGENET1K_V1" if name.startswith("torchvision/") else "a1_in1k"
        raise UsageError(
            f"weights must be a file ({', '.join(WEIGHT_SUFFIXES)}, .ckpt), not {weights!r}",
            fix=f'weights of a library are part of the name: "{architecture}.{example}"',
        )
    if not pretrained:
        raise UsageError("pretrained=False contradicts weights", fix=f"leave one of them out: weights={str(weights)!r}")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise MissingInputError(f"there is no file {path}", fix=f"ls -l {path.parent}")
    return path


def _classifier(backbone: Backbone) -> tuple[str, ...]:
    """The layers that the architecture has behind its features, where that is known."""
    if backbone.name.startswith("torchvision/"):
        from flashtask.backbones.torchvision_provider import classifier

        return classifier(backbone.name.removeprefix("torchvision/").partition(".")[0], backbone.module)
    config = getattr(backbone.module, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    return (named,) if isinstance(named, str) else tuple(named or ())


def _check_tokens(name: str) -> None:
    """Refuse a name that has no tokens before its weights are fetched.

    Raises:
        UsageError: it has none.
    """
    if BACKBONES.entry(name).metadata.get("provider") in ("timm", "torchvision"):
        built_without_values(lambda: build(name, pretrained=False, in_chans=3, options={}, gives="tokens"))


def _as_tokens(backbone: Backbone) -> Backbone:
    """A transformer of timm's without its pooling, which has no weights or takes them with it (attention pooling)."""
    module, size = backbone.module, backbone.preprocessing.input_size
    if callable(reset := getattr(module, "reset_classifier", None)):
        reset(0, "")
        output = run_without_values(module, size)
        if isinstance(output, Tensor) and output.ndim == 3:
            names = {name for name, _ in module.named_parameters()}
            groups = [[name for name in group if name in names] for group in backbone.layer_groups]
            info = _tokens(module, output)
            return replace(
                backbone,
                num_features=info.num_features,
                layer_groups=[group for group in groups if group],
                features=info,
            )
    raise UsageError(
        f"the backbone {backbone.name!r} has no tokens",
        why="only vision transformers of one scale have them, those of timm or modules that give (B, N, F)",
        fix="take one that has, as vit_small_patch16_224; or a head that takes pooled features or maps",
    )


def _tokens(module: nn.Module, output: Tensor) -> FeatureInfo:
    prefix = getattr(module, "num_prefix_tokens", 0)
    prefix = prefix if isinstance(prefix, int) else 0
    return FeatureInfo("tokens", (output.shape[2],), num_tokens=output.shape[1], num_prefix_tokens=prefix)


def _wrap(module: nn.Module, name: str, in_chans: int, flat: bool) -> Backbone:
    """A user's module; its own `preprocessing` and `num_features` count, and the latter is checked."""
    preprocessing = preprocessing_of_module(module, in_chans)
    if not flat:
        output = run_without_values(module, preprocessing.input_size)
        if isinstance(output, Tensor) and output.ndim == 3:
            info = _tokens(module, output)
            groups = default_layer_groups(module)
            return Backbone(module, info.num_features, preprocessing, name, groups, features=info)
    num_features = make_features_flat(module, preprocessing.input_size, name)
    declared = getattr(module, "num_features", num_features)
    if declared != num_features:
        raise UsageError(
            f"the backbone {name!r} declares num_features = {declared}, but gives {num_features} features",
            fix=f"self.num_features = {num_features}",
        )
    return Backbone(module, num_features, preprocessing, name, default_layer_groups(module))


def preprocessing_of_module(module: nn.Module, in_chans: int) -> Preprocessing:
    """A user's module may say in `preprocessing` how it wants its images; else the defaults hold."""
    given = getattr(module, "preprocessing", None)
    return given if isinstance(given, Preprocessing) else Preprocessing().for_channels(in_chans)
