"""Backbones from timm: the model as timm builds it without a classifier, so that its keys are timm's own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, group_parameters
from torch import nn

from flashtask.backbones.backbone import Backbone
from flashtask.backbones.features import make_features_flat
from flashtask.backbones.layer_groups import default_layer_groups
from flashtask.backbones.matching import shown
from flashtask.backbones.timm_weights import KnownWeights, build_with_weights
from flashtask.backbones.weight_files import read_weights
from flashtask.backbones.weights import (
    LAYERS_CHANGED,
    NO_WEIGHTS,
    Loading,
    cache_only_without_network,
    for_channels,
    pretrained_errors,
    quiet_logs,
    watched_loading,
)
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing

__all__ = ["as_backbone", "build_model", "create_model", "layer_groups", "preprocessing_of"]

_LOGGERS = ("timm", "huggingface_hub")
_SHARED = ("shared_rel_pos.",)


def build_model(
    name: str, *, pretrained: bool = True, in_chans: int = 3, weights: Path | None = None, **options: Any
) -> Backbone:
    """Build `NAME` or `NAME.TAG` of timm.

    Args:
        name: architecture, with or without the tag of its weights.
        pretrained: load the weights, of the tag or timm's default ones.
        in_chans: channels of the images; timm adapts the first layer's weights.
        weights: a file whose weights are loaded instead of timm's own.
        options: arguments of `timm.create_model` (`img_size`, `drop_path_rate`, `cache_dir`, ...).

    Raises:
        UnknownNameError: the architecture has no weights of this tag.
        UsageError: it has no weights at all and `pretrained` is set, or an option is wrong.
        HubError: the weights could not be fetched.
        IntegrityError: `weights` is damaged, or holds another model.
    """
    _check_weights(name, pretrained and weights is None)
    if taken := {"num_classes", "features_only", "checkpoint_path"} & set(options):
        fixes = {"checkpoint_path": 'weights from a file: weights="FILE"', "features_only": f"build_pyramid({name!r})"}
        fix = next((fixes[option] for option in sorted(taken) if option in fixes), "")
        raise UsageError(f"{', '.join(sorted(taken))} is no option of a backbone: it gives pooled features", fix=fix)
    if weights is not None:
        known = KnownWeights(read_weights(weights), str(weights))
        module = build_with_weights(name, known, in_chans=in_chans, options=options)
    else:
        module = create_model(name, pretrained=pretrained, in_chans=in_chans, **options)
    return as_backbone(module, f"timm/{name}", preprocessing_of(module, in_chans, options))


def create_model(name: str, *, pretrained: bool, in_chans: int, num_classes: int = 0, **options: Any) -> nn.Module:
    """timm's own model, with what it logs and raises told as our errors."""
    context = cache_only_without_network() if pretrained else nullcontext()
    with quiet_logs(*_LOGGERS), watched_loading() as loading, pretrained_errors(f"timm/{name}", pretrained), context:
        sizes: dict[str, Any] = {} if options.get("features_only") else {"num_classes": num_classes}
        module = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **sizes, **options)
    if pretrained:
        _refuse_random_parts(name, loading)
    return module


def as_backbone(module: nn.Module, name: str, preprocessing: Preprocessing) -> Backbone:
    """A model of timm's without a classifier, with its features counted and its layers grouped."""
    num_features = make_features_flat(module, preprocessing.input_size, name)
    return Backbone(module, num_features, preprocessing, name, layer_groups(module))


def layer_groups(module: nn.Module) -> list[list[str]]:
    """Parameter names by timm's `group_matcher(coarse=False)`, from the input to the output.

    A model without a matcher gets one group for each of its blocks.
    """
    matcher = getattr(module, "group_matcher", None)
    if matcher is None:
        return default_layer_groups(module)
    found: Mapping[int, list[str]] = group_parameters(module, matcher(coarse=False))
    groups = [found[position] for position in sorted(found)]
    # What a matcher does not know comes last; these are used by all blocks, the first one on.
    shared = [name for name in groups[-1] if name.startswith(_SHARED)] if len(groups) > 1 else []
    groups[0] = [*groups[0], *shared]
    groups[-1] = [name for name in groups[-1] if name not in shared]
    return [group for group in groups if group]


def _check_weights(name: str, pretrained: bool) -> None:
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UnknownNameError(f"weights of timm/{architecture}", tag, [known for known in tags if known])
    config = get_pretrained_cfg(name)
    if pretrained and (config is None or not config.has_weights):
        raise UsageError(
            f"there are no pretrained weights for 'timm/{name}'",
            fix=NO_WEIGHTS,
        )


def _refuse_random_parts(name: str, loading: Loading) -> None:
    """Where a part of a model keeps its random values timm only logs it, and goes on."""
    config = get_pretrained_cfg(name)
    # Weights of JAX are copied layer by layer, by a loader of timm's that fails where one is missing.
    copies = config is not None and bool(config.custom_load)
    if loading.missing or not (loading.has_begun or copies):
        kept = f"these keep random values: {shown(loading.missing)}"
        raise UsageError(
            f"the pretrained weights of 'timm/{name}' do not fill the whole model",
            why=kept if loading.missing else "timm loaded none of them",
            fix=LAYERS_CHANGED,
        )


def preprocessing_of(module: nn.Module, in_chans: int, options: Mapping[str, Any]) -> Preprocessing:
    """What timm's record of the weights says about the images, for this number of channels."""
    config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    channels, height, width = config["input_size"]
    if (size := options.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    known = Preprocessing(
        input_size=(channels, height, width),
        mean=config["mean"],
        std=config["std"],
        crop_pct=min(config["crop_pct"], 1.0),  # some name more than the image, which would add a border
        interpolation=config["interpolation"],
        crop_mode=config["crop_mode"],
    )
    return for_channels(known, in_chans)
