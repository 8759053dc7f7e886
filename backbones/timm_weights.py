"""timm's models with weights that are in hand: from a folder, a file or the hub, but never by timm's own fetching.

timm adapts them as it does its own: other channel counts, image sizes and formats of the original authors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from flashtask.backbones.matching import backbone_tensors, classifier_paths, find_prefix, missing_names, shown
from flashtask.backbones.timm_folder import TimmFolder, read_weights
from flashtask.backbones.weights import Loading, quiet_logs, watched_loading
from flashtask.core.errors import FlashtaskError, IntegrityError, UsageError
from flashtask.core.preprocessing import TIMM_FIELDS, Preprocessing

__all__ = ["KnownWeights", "build_from_folder", "build_with_weights", "first_layers"]

_LOGGERS = ("timm",)
_SPARE_VALUES = 50_000_000


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
        label_offset=_label_offset(folder),
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
        file = folder.weights.parent / "config.json"
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


def first_layers(module: nn.Module) -> tuple[str, ...]:
    """The layers of a timm model that see the image, as timm itself names them."""
    from timm.models._input import get_model_traits

    config = getattr(module, "pretrained_cfg", None) or {}
    first = get_model_traits(module).get("first_conv", config.get("first_conv")) or ()
    return (first,) if isinstance(first, str) else tuple(first)


def _label_offset(folder: TimmFolder) -> int:
    described = folder.config.get("pretrained_cfg", folder.config)
    offset = described.get("label_offset") or 0
    if type(offset) is not int or not 0 <= offset <= 10:
        raise IntegrityError(f"{folder.weights.parent / 'config.json'} was refused: label_offset is {offset!r:.40}")
    return offset


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
            f"{known.file} does not fit: the model that is described has {planned:,} values, and the file {held:,}"
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
            f"{known.file} does not fit: {len(unknown)} of its names are not the model's",
            why=f"unknown: {shown(unknown)}",
        )
