"""Backbones from torchvision's classification models: the last layer is swapped for one that does nothing.

torchvision compares a file of weights with its hash when it is downloaded and never again, and lets torch unpickle
whatever it finds. Here the file is compared each time, and read as tensors alone.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from timm.models import adapt_input_conv
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from flashtask.backbones.backbone import Backbone
from flashtask.backbones.inspection import built_without_values, make_features_flat
from flashtask.backbones.weights import (
    NO_WEIGHTS,
    classifier_paths,
    fix_without_network,
    pretrained_errors,
    quiet_logs,
)
from flashtask.core.errors import HubError, IntegrityError, UnknownNameError, UsageError
from flashtask.core.files import sha256_file
from flashtask.core.hub.address import hub_is_offline
from flashtask.core.preprocessing import Preprocessing

__all__ = ["LAYERS", "MAPS", "build_model", "classifier", "layer_groups", "load_resampled"]

# What one layer's parameter names begin with, for each family. Names that match nothing (final norms,
# position embeddings) belong to the layer before them.
_STAGED = r"features\.[0246]\b|features\.\d+\.\d+"
LAYERS: dict[str, str] = {
    "AlexNet": r"(features|classifier)\.\d+",
    "ConvNeXt": _STAGED,
    "DenseNet": r"features\.(conv0|denseblock\d+\.denselayer\d+|transition\d+)",
    "EfficientNet": r"features\.\d+\.\d+",
    "GoogLeNet": r"conv\d|inception\w+",
    "Inception3": r"Conv2d_\w+|Mixed_\w+",
    "MNASNet": r"layers\.\d+(\.\d+)?",
    "MaxVit": r"stem\.\d+|blocks\.\d+\.layers\.\d+|classifier\.3",
    "MobileNetV2": r"features\.\d+",
    "MobileNetV3": r"(features|classifier)\.\d+",
    "RegNet": r"stem|trunk_output\.block\d+\.block\d+-\d+",
    "ResNet": r"conv1|layer\d\.\d+",
    "ShuffleNetV2": r"conv\d|stage\d\.\d+",
    "SqueezeNet": r"features\.\d+",
    "SwinTransformer": _STAGED,
    "VGG": r"(features|classifier)\.\d+",
    "VisionTransformer": r"conv_proj|encoder\.layers\.\w+",
}
# Which layers give a map that a scale may end with, for each family that has maps.
MAPS: dict[str, str] = {
    "AlexNet": r"features\.\d+",
    "ConvNeXt": r"features\.\d+",
    "DenseNet": r"features\.(relu0|denseblock\d+)",
    "EfficientNet": r"features\.\d+",
    "GoogLeNet": r"conv\d|inception\w+",
    "Inception3": r"Conv2d_\w+|Mixed_\w+",
    "MNASNet": r"layers\.\d+",
    "MaxVit": r"stem|blocks\.\d+",
    "MobileNetV2": r"features\.\d+",
    "MobileNetV3": r"features\.\d+",
    "RegNet": r"stem|trunk_output\.block\d+",
    "ResNet": r"relu|layer\d",
    "ShuffleNetV2": r"conv\d|maxpool|stage\d",
    "SqueezeNet": r"features\.\d+",
    "SwinTransformer": r"features\.\d+",
    "VGG": r"features\.\d+",
}
# These two warn, and start slowly, unless an option says how to fill their weights.
_WITH_INIT_OPTION = ("googlenet", "inception_v3")
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


def build_model(name: str, *, pretrained: bool = True, in_chans: int = 3, **options: Any) -> Backbone:
    """Build `NAME` or `NAME.WEIGHTS` (`resnet50.IMAGENET1K_V1`) of torchvision.

    Args:
        name: architecture, with or without the name of its weights; torchvision's default ones otherwise.
        pretrained: load the weights.
        in_chans: channels of the images; the first convolution is adapted with its weights.
        options: arguments of torchvision's own builder.

    Raises:
        UnknownNameError: the architecture has no weights of this name.
        UsageError: it has no weights at all and `pretrained` is set, or an option is wrong.
        HubError: the weights could not be fetched.
    """
    architecture = name.partition(".")[0]
    weights = _find_weights(name, pretrained)
    if taken := {"num_classes"} & set(options):
        fix = f'the weights are part of the name: "torchvision/{architecture}.IMAGENET1K_V1"'
        raise UsageError(f"{', '.join(sorted(taken))} is not an option of a backbone", fix=fix)
    if not pretrained and architecture in _WITH_INIT_OPTION:
        options.setdefault("init_weights", True)
    with quiet_logs(), pretrained_errors(f"torchvision/{name}", pretrained), _as_tensors_alone():
        if pretrained and "image_size" in options:
            module = get_model(architecture, weights=None, **options)
            assert weights is not None  # looked for above
            load_resampled(module, weights.get_state_dict(check_hash=True))
        else:
            module = get_model(architecture, weights=weights if pretrained else None, **options)
    preprocessing = _preprocessing(module, weights).for_channels(in_chans)
    _take_off_classifier(module)
    if in_chans != 3:
        _adapt_first_convolution(module, in_chans)
    num_features = make_features_flat(module, preprocessing.input_size, f"torchvision/{name}")
    return Backbone(module, num_features, preprocessing, f"torchvision/{name}", layer_groups(module))


def load_resampled(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a vision transformer weights that were trained at another size: its position embeddings are resampled.

    Args:
        module: with its classifier, of its own `image_size` and `patch_size`.
        state: of the same architecture.
    """
    size, patch = module.image_size, module.patch_size
    assert isinstance(size, int)
    assert isinstance(patch, int)
    module.load_state_dict(interpolate_embeddings(size, patch, OrderedDict(state)))


def layer_groups(module: nn.Module) -> list[list[str]]:
    """Parameter names of each layer, from the input to the output, after the table `LAYERS`.

    torchvision registers layers in the order of the forward pass. A layer with vectors only (a norm) belongs
    to the layer before it.
    """
    pattern = re.compile(LAYERS[type(module).__name__])
    layers: dict[str, list[str]] = {}
    current = ""
    for name, _ in module.named_parameters():
        if match := pattern.match(name):
            current = match.group()
        layers.setdefault(current, []).append(name)
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    first = layers.pop("", [])  # a class token, registered before the first layer
    groups: list[list[str]] = []
    for layer in layers.values():
        if groups and all(shapes[name] == 1 for name in layer):
            groups[-1].extend(layer)
        else:
            groups.append(layer)
    groups[0][:0] = first
    return groups


def _find_weights(name: str, pretrained: bool) -> WeightsEnum | None:
    architecture, _, tag = name.partition(".")
    known = get_model_weights(architecture)
    if tag and tag not in known.__members__:
        raise UnknownNameError(f"weights of torchvision/{architecture}", tag, known.__members__)
    weights: WeightsEnum | None = known[tag or "DEFAULT"] if len(known) else None
    if not pretrained:
        return weights
    if weights is None:
        raise UsageError(
            f"there are no pretrained weights for 'torchvision/{name}'",
            fix=NO_WEIGHTS,
        )
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
    if hub_is_offline() and not file.exists():
        raise HubError(
            f"the pretrained weights of 'torchvision/{name}' could not be fetched",
            why=f"HF_HUB_OFFLINE is set and {file} does not exist",
            fix=fix_without_network(),
        )
    _check_cached_file(file)
    return weights


def _check_cached_file(file: Path) -> None:
    """Compare a downloaded file with the beginning of the sha256 in its name, if the file exists.

    Raises:
        IntegrityError: it is another file.
    """
    named = _HASH.search(file.name)
    if named is None or not file.exists():
        return
    digest = sha256_file(file)
    if not digest.startswith(named[1]):
        why = f"its sha256 begins with {digest[: len(named[1])]}, not {named[1]}"
        raise IntegrityError(f"{file} is not what its name says", why=why, fix=f"rm {file}")


@contextmanager
def _as_tensors_alone() -> Iterator[None]:
    """Inside, `torch.load` means `weights_only=True` whoever calls it."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _preprocessing(module: nn.Module, weights: WeightsEnum | None) -> Preprocessing:
    if weights is None:
        return Preprocessing()
    transforms = weights.transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    size = getattr(module, "image_size", crop)  # a vision transformer takes its own size only
    mean, std = transforms.mean, transforms.std
    if getattr(module, "transform_input", False):
        # The model itself would turn ImageNet's mean and std into these, for three channels only.
        module.transform_input = False  # type: ignore[assignment]
        mean = std = (0.5, 0.5, 0.5)
    return Preprocessing((3, size, size), mean, std, crop / resize, transforms.interpolation.value)


def _take_off_classifier(module: nn.Module) -> None:
    """Swap the last layer for an identity, and drop GoogLeNet's and Inception's auxiliary classifiers."""
    for auxiliary in ("aux1", "aux2", "AuxLogits"):
        if hasattr(module, auxiliary):
            setattr(module, auxiliary, None)
            module.aux_logits = False  # type: ignore[assignment]
    kind = nn.Conv2d if type(module).__name__ == "SqueezeNet" else nn.Linear
    last = [name for name, inner in module.named_modules() if isinstance(inner, kind)][-1]
    module.set_submodule(last, nn.Identity())


def classifier(architecture: str, backbone: nn.Module) -> tuple[str, ...]:
    """The names of the layers that torchvision's whole model has behind its features."""
    options = {"init_weights": False} if architecture in _WITH_INIT_OPTION else {}
    whole: nn.Module = built_without_values(lambda: get_model(architecture, weights=None, **options))
    return classifier_paths(whole.state_dict(), backbone.state_dict())


def _adapt_first_convolution(module: nn.Module, in_chans: int) -> None:
    name, old = next((name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_chans,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    weights: Mapping[str, torch.Tensor] = old.state_dict()
    new.load_state_dict({**weights, "weight": adapt_input_conv(in_chans, weights["weight"])})
    module.set_submodule(name, new)
