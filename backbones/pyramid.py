"""Backbones that give maps at several scales, for tasks that answer for each pixel or box."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import get_model_args
from torch import Tensor, nn

from flashtask.backbones.backbone import BACKBONES, Backbone
from flashtask.backbones.building import build as build_backbone
from flashtask.backbones.building import build_without_values, call_builder, preprocessing_of_module
from flashtask.backbones.inspection import default_layer_groups, run_without_values
from flashtask.backbones.timm_provider import (
    KnownWeights,
    build_with_weights,
    create_model,
    layer_groups,
    preprocessing_of,
)
from flashtask.backbones.torchvision_provider import MAPS
from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo
from flashtask.core.library_internals import extractor_graphs
from flashtask.core.preprocessing import Preprocessing

__all__ = ["build"]


def build(name: Any, *, pretrained: bool, in_chans: int, out_indices: Any, options: Mapping[str, Any]) -> Backbone:
    """What `flashtask.backbones.build_pyramid` promises."""
    indices = _indices(out_indices)
    entry = BACKBONES.entry(name) if isinstance(name, str) else None
    provider = entry.metadata.get("provider") if entry else None
    if entry and provider == "timm" and "weights" not in options:
        return _of_timm_name(entry.name, pretrained, in_chans, indices, options)
    if isinstance(name, nn.Module) or provider == "user" or not isinstance(name, str):
        module = name if isinstance(name, nn.Module) else call_builder(name, pretrained, in_chans, options)
        if isinstance(module, Backbone) and module.features.kind == "maps":
            return replace(module, name=entry.name if entry else module.name)
        if isinstance(module, nn.Module) and not _is_known(module):
            return _of_maps(module, entry.name if entry else type(module).__name__, in_chans, indices)
        backbone = build_backbone(module, pretrained=pretrained, in_chans=in_chans, options={})
    else:
        if provider == "torchvision" and pretrained and type(build_without_values(name).module).__name__ not in MAPS:
            raise _no_maps(name)  # before its weights are fetched
        backbone = build_backbone(name, pretrained=pretrained, in_chans=in_chans, options=options)
    if type(backbone.module).__name__ in MAPS and type(backbone.module).__module__.startswith("torchvision."):
        made = _of_torchvision(backbone, indices)
    elif getattr(backbone.module, "pretrained_cfg", None):
        made = _of_timm_backbone(backbone, in_chans, indices)
    else:
        raise _no_maps(backbone.name)
    return replace(made, description=backbone.description)


def _indices(out_indices: Any) -> tuple[int, ...] | None:
    if out_indices is None:
        return None
    is_list = isinstance(out_indices, Sequence) and not isinstance(out_indices, str) and len(out_indices) > 0
    if not is_list or not all(type(index) is int for index in out_indices):
        raise UsageError(
            f"out_indices must be a list of whole numbers, not {out_indices!r}", fix="out_indices=(1, 2, 3)"
        )
    return tuple(out_indices)


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torchvision.models.", "timm.models."))


# ---- timm


def _of_timm_name(
    name: str, pretrained: bool, in_chans: int, indices: tuple[int, ...] | None, options: Mapping[str, Any]
) -> Backbone:
    bare = name.removeprefix("timm/")
    with torch.device("meta"):
        body = create_model(bare, pretrained=False, in_chans=in_chans, **options)
    chosen = _chosen(body, indices, name)
    try:
        net = create_model(
            bare, pretrained=pretrained, in_chans=in_chans, features_only=True, out_indices=chosen, **options
        )
    except UsageError as error:
        raise _no_maps(name, error) from error
    return _finished(net, name, preprocessing_of(body, in_chans, options), _renamed(body, net))


def _of_timm_backbone(backbone: Backbone, in_chans: int, indices: tuple[int, ...] | None) -> Backbone:
    """From a model of timm's with weights of any origin: it is built again as a pyramid, with the same weights."""
    body = backbone.module
    config: Mapping[str, Any] = body.pretrained_cfg  # type: ignore[assignment]
    arguments = {k: v for k, v in get_model_args(body).items() if k not in ("num_classes", "in_chans", "global_pool")}
    chosen = _chosen(body, indices, backbone.name)
    known = KnownWeights(dict(body.state_dict()), backbone.name, num_classes=0)
    wanted = {**arguments, "features_only": True, "out_indices": chosen}
    net = build_with_weights(str(config["architecture"]), known, in_chans=in_chans, options=wanted)
    return _finished(net, backbone.name, backbone.preprocessing, _renamed(body, net))


def _chosen(body: nn.Module, indices: tuple[int, ...] | None, name: str) -> tuple[int, ...]:
    """The scales of timm's own list: of those with equal size the last, as its blocks of one stage would be."""
    info = getattr(body, "feature_info", None)
    if not info:
        raise _no_maps(name)
    count = len(info)
    if indices is None:
        reductions = [each["reduction"] for each in info]
        last = {reduction: index for index, reduction in enumerate(reductions)}
        return tuple(sorted(last.values()))
    return _within(indices, count, name)


def _within(indices: tuple[int, ...], count: int, name: str) -> tuple[int, ...]:
    found = [index + count if index < 0 else index for index in indices]
    if not all(0 <= index < count for index in found) or sorted(set(found)) != found:
        raise UsageError(
            f"out_indices={indices} does not fit {name!r}",
            why=f"it has {count} scales, each of which can be named once, the finest first",
            fix=f"out_indices={tuple(range(count))}",
        )
    return tuple(found)


def _renamed(body: nn.Module, net: nn.Module) -> list[list[str]]:
    """The groups of the whole model under the names of the pyramid, which has `stages_0` for `stages.0`."""
    names = {name.removeprefix("model.").replace(".", "_"): name for name, _ in net.named_parameters()}
    groups = [
        [names.pop(key) for name in group if (key := name.replace(".", "_")) in names] for group in layer_groups(body)
    ]
    if names:
        return default_layer_groups(net)
    return [group for group in groups if group]


# ---- torchvision


def _of_torchvision(backbone: Backbone, indices: tuple[int, ...] | None) -> Backbone:
    from torchvision.models.feature_extraction import create_feature_extractor

    module = backbone.module
    stages = _stages(module, backbone.preprocessing.input_size)
    chosen = _within(indices, len(stages), backbone.name) if indices is not None else range(len(stages))
    nodes = {stages[index]: str(position) for position, index in enumerate(chosen)}
    net: nn.Module = create_feature_extractor(module, return_nodes=nodes, suppress_diff_warning=True)
    _give_lists(net, channels_last=_is_channels_last(module))
    own = {name for name, _ in net.named_parameters()}
    groups = [[name for name in group if name in own] for group in backbone.layer_groups]
    return _finished(net, backbone.name, backbone.preprocessing, [group for group in groups if group])


def _give_lists(net: Any, *, channels_last: bool) -> None:
    """Let torchvision's extractor give a list of maps (B, C, H, W): in its graphs, since copies of it lose hooks."""
    train, evaluation = extractor_graphs(net)
    for graph in (train, evaluation):
        end = next(node for node in reversed(graph.nodes) if node.op == "output")
        maps = list(end.args[0].values())
        if channels_last:
            with graph.inserting_before(end):
                maps = [graph.call_method("permute", (node, 0, 3, 1, 2)) for node in maps]
        end.args = (maps,)
    net.graph = train if net.training else evaluation


def _stages(module: nn.Module, input_size: tuple[int, int, int]) -> list[str]:
    """The last layer of each scale among those of the table `MAPS`, found by a run without values."""
    pattern = re.compile(MAPS[type(module).__name__])
    places = [(name, inner) for name, inner in module.named_modules() if pattern.fullmatch(name)]
    found: dict[int, str] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(inner: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                height = output.shape[1 if _is_channels_last(module) else 2]
                found[_reduction(input_size[1], height)] = name

        return hook

    hooks = [inner.register_forward_hook(note(name)) for name, inner in places]
    try:
        run_without_values(module, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[reduction] for reduction in sorted(found)]


def _is_channels_last(module: nn.Module) -> bool:
    return type(module).__name__ == "SwinTransformer"


# ---- all


def _of_maps(module: nn.Module, name: str, in_chans: int, indices: tuple[int, ...] | None) -> Backbone:
    """A user's module whose forward gives the list itself."""
    preprocessing = preprocessing_of_module(module, in_chans)
    if indices is not None:
        raise UsageError(f"the module {name!r} gives its own list of maps", fix="leave out_indices out")
    return _finished(module, name, preprocessing, default_layer_groups(module))


def _finished(net: nn.Module, name: str, preprocessing: Preprocessing, groups: list[list[str]]) -> Backbone:
    output = run_without_values(net, preprocessing.input_size)
    maps = list(output.values()) if isinstance(output, dict) else output
    if not isinstance(maps, list | tuple) or not all(isinstance(each, Tensor) and each.ndim == 4 for each in maps):
        raise _no_maps(name)
    height = preprocessing.input_size[1]
    declared: list[int] = getattr(getattr(net, "feature_info", None), "channels", list)()
    last = tuple(_has_channels_last(each, declared[i] if i < len(declared) else None) for i, each in enumerate(maps))
    if any(last) or not isinstance(output, list):
        net.register_forward_hook(_AsList(last))
    shapes = [each.permute(0, 3, 1, 2).shape if swap else each.shape for each, swap in zip(maps, last, strict=True)]
    channels = tuple(shape[1] for shape in shapes)
    info = FeatureInfo("maps", channels, tuple(_reduction(height, shape[2]) for shape in shapes))
    return Backbone(net, info.num_features, preprocessing, name, groups, features=info)


def _has_channels_last(output: Tensor, declared: int | None) -> bool:
    """By what timm says of its channels; else by the sides, which are equal for square images."""
    if declared is not None and (output.shape[1] == declared) != (output.shape[3] == declared):
        return bool(output.shape[3] == declared)
    return bool(output.shape[1] == output.shape[2] != output.shape[3])


def _reduction(size: int, small: int) -> int:
    """How many pixels became one: the power of two that explains the sizes, else their ratio."""
    power = 2 ** round(math.log2(size / small))
    if small in (size // power, math.ceil(size / power)):
        return int(power)
    return size // small if size % small == 0 else int(power)


class _AsList:
    """A forward hook that gives a list of maps (B, C, H, W) whatever the module gives them in."""

    def __init__(self, channels_last: tuple[bool, ...]) -> None:
        self.channels_last = channels_last

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> list[Tensor]:
        maps: Iterable[Tensor] = output.values() if isinstance(output, dict) else output
        return [m.permute(0, 3, 1, 2).contiguous() if s else m for m, s in zip(maps, self.channels_last, strict=True)]


def _no_maps(name: str, error: UsageError | None = None) -> UsageError:
    return UsageError(
        f"the backbone {name!r} has no maps at several scales",
        why="" if error is None else error.why,
        fix="take one that has, as build_pyramid('resnet50') or build_pyramid('convnext_tiny')",
    )
