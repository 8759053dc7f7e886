"""Backbones from timm, without a classifier and with timm's own keys; their weights are fetched by timm, or in hand.

Weights in hand come from a folder, a file or the hub. timm adapts them as it does its own: other channel counts, image
sizes and formats of the original authors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from flashtask.backbones.backbone import Backbone
from flashtask.backbones.descriptions import CONFIG_FILE, TimmFolder
from flashtask.backbones.inspection import default_layer_groups, make_features_flat
from flashtask.backbones.weights import (
    LAYERS_CHANGED,
    NO_WEIGHTS,
    Loading,
    backbone_tensors,
    cache_only_without_network,
    classifier_paths,
    find_prefix,
    first_layers,
    missing_names,
    pretrained_errors,
    quiet_logs,
    read_weights,
    shown,
    watched_loading,
)
from flashtask.core.errors import FlashtaskError, IntegrityError, UnknownNameError, UsageError
from flashtask.core.preprocessing import TIMM_FIELDS, Preprocessing

__all__ = [
    "KnownWeights",
    "as_backbone",
    "build_from_folder",
    "build_model",
    "build_with_weights",
    "create_model",
    "layer_groups",
    "preprocessing_of",
]

_LOGGERS = ("timm", "huggingface_hub")
_SHARED = ("shared_rel_pos.",)
_SPARE_VALUES = 50_000_000


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
        raise UsageError(
            f"{', '.join(sorted(taken))} is not an option of a backbone, which gives pooled features", fix=fix
        )
    if weights is not None:
        known = KnownWeights(read_weights(weights), str(weights))
        module = build_with_weights(name, known, in_chans=in_chans, options=options)
    else:
        module = create_model(name, pretrained=pretrained, in_chans=in_chans, **options)
    return as_backbone(module, f"timm/{name}", preprocessing_of(module, in_chans, options))


def create_model(name: str, *, pretrained: bool, in_chans: int, num_classes: int = 0, **options: Any) -> nn.Module:
    """timm's own model, silent, and with its errors as ours."""
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
    return known.for_channels(in_chans)


# ---- weights that are in hand


@dataclass(frozen=True)
class KnownWeights:
    """Tensors and what timm must know of them.

    Args:
        tensors: by name.
        file: what messages call them.
        num_classes: outputs of their classifier; None if nobody says.
        preprocessing: of the images that they were trained with; None for that of the architecture.
        label_offset: outputs before the first class.
        model_args: the arguments of the model that they were saved from.
    """

    tensors: dict[str, Tensor]
    file: str
    num_classes: int | None = None
    preprocessing: Preprocessing | None = None
    label_offset: int = 0
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build_from_folder(
    folder: TimmFolder, *, num_classes: int = 0, in_chans: int, pretrained: bool = True, **options: Any
) -> nn.Module:
    """timm's model from a folder in its layout, with the folder's weights.

    Args:
        folder: of `read_timm_folder`.
        num_classes: 0 for the backbone, `folder.num_classes` for the classifier as it is.
        in_chans: channels of the images; `folder.in_chans` are those of the weights.
        pretrained: load the weights.
        options: further arguments for timm's builder, over those of the folder.

    Raises:
        IntegrityError: the weights are damaged, or not those of the model that the configuration describes.
        UsageError: an option is wrong.
    """
    known = KnownWeights(
        tensors=read_weights(folder.weights) if pretrained else {},
        file=str(folder.weights),
        num_classes=folder.num_classes,
        preprocessing=folder.preprocessing,
        label_offset=folder.label_offset,
        model_args=folder.model_args,
    )
    arguments = {**folder.model_args, **options}
    try:
        return build_with_weights(
            folder.architecture, known, num_classes=num_classes, in_chans=in_chans, options=arguments
        )
    except UsageError as error:
        if options:
            raise
        file = folder.weights.parent / CONFIG_FILE
        raise IntegrityError(f"{file} was refused: {error.what}", why=error.why) from error


def build_with_weights(
    name: str, known: KnownWeights, *, num_classes: int = 0, in_chans: int, options: Mapping[str, Any]
) -> nn.Module:
    """timm's model `NAME` or `NAME.TAG` with weights that are in hand; without tensors, with random ones.

    The model is first made without values: what its description would need is compared with what the weights are, so
    a wrong description costs neither memory nor time.

    Args:
        name: architecture, with a tag for its preprocessing.
        known: the weights.
        num_classes: 0 for the backbone.
        in_chans: channels of the images.
        options: further arguments for timm's builder.

    Raises:
        IntegrityError: the weights are not those of the model.
        UsageError: an option is wrong.
    """
    config = _config(name, known)
    architecture = name.partition(".")[0]
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **options}
    if not known.tensors:
        return _created(architecture, config, arguments, known)
    # A pyramid has other names, and not all parts; timm loads the weights before it takes the model apart.
    is_pyramid = bool(arguments.get("features_only"))
    plain = {name: value for name, value in arguments.items() if name not in ("features_only", "out_indices")}
    with torch.device("meta"):
        body = _created(architecture, config, plain, known)
        source = config.num_classes + known.label_offset
        whole = _created(architecture, config, {**plain, "num_classes": source}, known)
    _compare_sizes(body, known)
    classifier = classifier_paths(whole.state_dict(), body.state_dict()) if num_classes == 0 else ()
    tensors = _under_own_names(known, list(body.state_dict()), classifier)
    channels = _channels(tensors, body, in_chans) or config.input_size[0]
    config = dataclasses.replace(
        config, state_dict=tensors, input_size=(channels, *config.input_size[1:]), label_offset=known.label_offset
    )
    with watched_loading() as loading:
        module = _created(architecture, config, arguments, known)
    record: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    record.pop("state_dict", None)
    record["input_size"] = (len(record["mean"]), *record["input_size"][1:])
    _refuse_leftovers(loading, classifier, known, body, may_leave=is_pyramid)
    return module


def _config(name: str, known: KnownWeights) -> PretrainedCfg:
    """timm's own record of the architecture, without any place to fetch from, and with what is known of the weights."""
    own = get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg(architecture=name.partition(".")[0])
    nowhere = dict.fromkeys(("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "label_offset"))
    changes: dict[str, Any] = {**nowhere, "custom_load": False}
    if known.num_classes is not None:
        changes["num_classes"] = known.num_classes
    if known.preprocessing is not None:
        changes |= {key: getattr(known.preprocessing, key) for key in TIMM_FIELDS}
        changes |= {"test_input_size": None, "test_crop_pct": None}
    return dataclasses.replace(own, **changes)


def _created(architecture: str, config: PretrainedCfg, arguments: Mapping[str, Any], known: KnownWeights) -> nn.Module:
    extra: dict[str, Any] = {"pretrained_model_args": dict(known.model_args)} if known.model_args else {}
    pretrained = config.state_dict is not None
    try:
        with quiet_logs(*_LOGGERS):
            module: nn.Module = timm.create_model(
                architecture, pretrained=pretrained, pretrained_cfg=config, **extra, **arguments
            )
    except FlashtaskError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if pretrained:
            raise IntegrityError(f"{known.file} does not fit timm's {architecture}", why=why) from error
        raise UsageError(f"timm's {architecture} cannot be built with these options", why=why) from error
    return module


def _compare_sizes(body: nn.Module, known: KnownWeights) -> None:
    planned = sum(tensor.numel() for tensor in (*body.parameters(), *body.buffers()))
    held = sum(tensor.numel() for tensor in known.tensors.values())
    if planned > 2 * held + _SPARE_VALUES:
        raise IntegrityError(
            f"{known.file} does not fit: the described model has {planned:,} values, and the file {held:,}"
        )


def _under_own_names(known: KnownWeights, wanted: list[str], classifier: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under timm's names; those in another format are left to timm, which knows some of these."""
    prefix = find_prefix(known.tensors, wanted, known.file)
    if prefix:
        return backbone_tensors(known.tensors, wanted, classifier, known.file)
    return dict(known.tensors)


def _channels(tensors: Mapping[str, Tensor], body: nn.Module, in_chans: int) -> int | None:
    """The image channels that the weights are for, from the shape of the layer that sees the image."""
    for layer in first_layers(body):
        own, given = body.get_parameter(f"{layer}.weight"), tensors.get(f"{layer}.weight")
        if given is not None and own.ndim == given.ndim == 4:
            channels, rest = divmod(given.shape[1] * in_chans, own.shape[1])
            return None if rest else channels
    return None


def _refuse_leftovers(
    loading: Loading, classifier: tuple[str, ...], known: KnownWeights, body: nn.Module, *, may_leave: bool
) -> None:
    """What timm only logs: parameters that the file has not, and tensors that the model has not."""
    heads = tuple(f"{path}." for path in classifier)
    missing = [name for name in loading.missing if not name.startswith(heads)]
    unknown = [name for name in loading.unexpected if not name.startswith(heads)]
    if not loading.has_begun:
        raise IntegrityError(f"{known.file} does not fit: timm took none of its weights")
    if missing and known.tensors.keys() >= set(missing):
        why = f"timm cannot adapt them to these options: {shown(missing)}"
        raise IntegrityError(f"{known.file} does not fill the whole model", why=why)
    if missing:
        raise missing_names(known.tensors, body.state_dict(), known.file)
    if unknown and not may_leave:
        raise IntegrityError(
            f"{known.file} does not fit: {len(unknown)} of its names are not in the model",
            why=f"unknown: {shown(unknown)}",
        )
