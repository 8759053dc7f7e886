"""Backbones from timm: the model as timm builds it without a classifier, so that its keys are timm's own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, group_parameters
from torch import nn

from flashtask.backbones.backbone import Backbone
from flashtask.backbones.features import default_layer_groups, make_features_flat
from flashtask.backbones.weights import (
    LAYERS_CHANGED,
    NO_WEIGHTS,
    cache_only_without_network,
    for_channels,
    pretrained_errors,
    quiet_logs,
)
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing

__all__ = ["build_model", "layer_groups"]

_LOGGERS = ("timm", "huggingface_hub")
# What timm logs, and goes on, when a part of a model keeps its random values.
_RANDOM_PARTS = ("using random init", "missing keys", "cannot load weights", "not currently supported")


def build_model(name: str, *, pretrained: bool = True, in_chans: int = 3, **options: Any) -> Backbone:
    """Build `NAME` or `NAME.TAG` of timm.

    Args:
        name: architecture, with or without the tag of its weights.
        pretrained: load the weights, of the tag or timm's default ones.
        in_chans: channels of the images; timm adapts the first layer's weights.
        options: arguments of `timm.create_model` (`img_size`, `drop_path_rate`, `cache_dir`, ...).

    Raises:
        UnknownNameError: the architecture has no weights of this tag.
        UsageError: it has no weights at all and `pretrained` is set, or an option is wrong.
        HubError: the weights could not be fetched.
    """
    _check_weights(name, pretrained)
    if taken := {"num_classes", "features_only"} & set(options):
        raise UsageError(f"{', '.join(sorted(taken))} is no option of a backbone: it gives pooled features")
    context = cache_only_without_network() if pretrained else nullcontext()
    with quiet_logs(*_LOGGERS) as messages, pretrained_errors(f"timm/{name}", pretrained), context:
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **options)
    _refuse_random_parts(name, pretrained, messages)
    preprocessing = _preprocessing(module, in_chans, options)
    num_features = make_features_flat(module, preprocessing.input_size, f"timm/{name}")
    return Backbone(module, num_features, preprocessing, f"timm/{name}", layer_groups(module))


def layer_groups(module: nn.Module) -> list[list[str]]:
    """Parameter names by timm's `group_matcher(coarse=False)`, from the input to the output.

    A model without a matcher gets one group for each child.
    """
    matcher = getattr(module, "group_matcher", None)
    if matcher is None:
        return default_layer_groups(module)
    groups: Mapping[int, list[str]] = group_parameters(module, matcher(coarse=False))
    return [groups[position] for position in sorted(groups)]


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


def _refuse_random_parts(name: str, pretrained: bool, messages: list[str]) -> None:
    random_parts = [message for message in messages if any(sign in message.lower() for sign in _RANDOM_PARTS)]
    if pretrained and random_parts:
        raise UsageError(
            f"the pretrained weights of 'timm/{name}' do not fill the whole model",
            why=random_parts[0].splitlines()[0],
            fix=LAYERS_CHANGED,
        )


def _preprocessing(module: nn.Module, in_chans: int, options: Mapping[str, Any]) -> Preprocessing:
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
