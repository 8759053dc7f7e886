"""Backbones from a hub repository, a folder in timm's layout, or a checkpoint of a task.

What is found there is described by a registered name (`timm/resnet18`) and plain arguments. Checkpoints store this
description, so a model that was trained on such a backbone loads when the repository, folder or file is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashtask.backbones.backbone import BACKBONES, CHECKPOINT_PREFIX, FOLDER_PREFIX, HUB_PREFIX, Backbone, is_address
from flashtask.backbones.building import build
from flashtask.backbones.descriptions import TimmFolder, check_model_args, fetch_timm_folder, read_timm_folder
from flashtask.backbones.timm_provider import as_backbone, build_from_folder
from flashtask.backbones.weights import fill
from flashtask.core.checkpoint import read_checkpoint
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.hub.address import HubAddress
from flashtask.core.preprocessing import stored_preprocessing

__all__ = ["build_from_address"]


def build_from_address(
    name: str,
    *,
    pretrained: bool = True,
    in_chans: int = 3,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> Backbone:
    """Build the backbone at an address. The name of one from the hub has the commit that was fetched.

    Args:
        name: `hf-hub:org/name@revision`, `local-dir:FOLDER` or `checkpoint:FILE`.
        pretrained: use the weights; without, only the configuration is fetched from the hub.
        in_chans: channels of the images; the first layer's weights are adapted.
        architecture: what is at the address, as checkpoints store it; without `pretrained` nothing is then read.
        model_args: the arguments that belong to it.
        options: further arguments of the architecture's builder, over those at the address.

    Raises:
        HubError: the repository cannot be reached or read.
        MissingInputError: there is no such folder or checkpoint, or a file is missing in the folder.
        IntegrityError: a file is damaged or hostile, or it is another architecture than stored.
        UsageError: the backbone of the checkpoint was a module and not a name.
    """
    address = HubAddress.parse(name) if name.startswith(HUB_PREFIX) else None
    if architecture is not None and not pretrained:
        if address is not None and not address.is_pinned:
            name = f"{HUB_PREFIX}{address.repository}"
        return _as_described(name, architecture, model_args or {}, in_chans, options)
    if name.startswith(CHECKPOINT_PREFIX):
        path = Path(name.removeprefix(CHECKPOINT_PREFIX))
        return _from_checkpoint(name, path, pretrained, in_chans, architecture, options)
    path = Path(name.removeprefix(FOLDER_PREFIX))
    if address is not None:
        snapshot = fetch_timm_folder(address, weights=pretrained)
        name, path = f"{HUB_PREFIX}{address.repository}@{snapshot.commit}", snapshot.folder
    folder = read_timm_folder(path, needs_weights=pretrained)
    _compare(name, folder, architecture, model_args)
    return _from_timm(name, folder, pretrained, in_chans, options)


def _from_checkpoint(
    name: str, path: Path, pretrained: bool, in_chans: int, architecture: str | None, options: Mapping[str, Any]
) -> Backbone:
    content = read_checkpoint(path)
    arguments = content.get("hyper_parameters", {})
    kind, stored = arguments.get("backbone"), dict(arguments.get("backbone_options") or {})
    if not isinstance(kind, str):
        raise UsageError(
            f"{path} does not say how its backbone is built: it was given as a module",
            fix="give the module, and load its weights: flashtask.read_checkpoint(path)['state_dict']",
        )
    found, found_args = _resolved(kind, stored, path)
    if architecture not in (None, found):
        raise _other_architecture(str(path), found, str(architecture))
    backbone = _as_described(name, found, found_args, in_chans, options)
    if pretrained:
        state = {
            key.removeprefix("backbone."): tensor
            for key, tensor in content["state_dict"].items()
            if key.startswith("backbone.")
        }
        fill(backbone.module, state, (), in_chans, str(path))
    preprocessing = stored_preprocessing(content["preprocessing"])
    return replace(backbone, preprocessing=preprocessing.for_channels(in_chans))


def _from_timm(name: str, folder: TimmFolder, pretrained: bool, in_chans: int, options: Mapping[str, Any]) -> Backbone:
    module = build_from_folder(folder, in_chans=in_chans, pretrained=pretrained, **options)
    preprocessing = folder.preprocessing.for_channels(in_chans)
    if (size := options.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
        preprocessing = replace(preprocessing, input_size=(in_chans, height, width))
    description = {"architecture": f"timm/{folder.architecture}", "model_args": folder.model_args}
    return replace(as_backbone(module, name, preprocessing), description=description)


def _as_described(
    name: str, architecture: str, model_args: Mapping[str, Any], in_chans: int, options: Mapping[str, Any]
) -> Backbone:
    """A backbone from its stored description alone, with random weights: no file is read and nothing is fetched."""
    if not isinstance(architecture, str) or is_address(BACKBONES.entry(architecture).name):
        raise IntegrityError(f"the backbone {name!r} is described by {architecture!r}, which is not a registered name")
    try:
        plain = check_model_args(model_args)
    except UsageError as error:
        raise IntegrityError(f"the description of the backbone {name!r} was refused: {error.what}") from error
    built = build(architecture, pretrained=False, in_chans=in_chans, options={**plain, **options})
    return replace(built, name=name, description={"architecture": architecture, "model_args": plain})


def _resolved(kind: str, stored: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The registered name and the arguments that a checkpoint's backbone was built by."""
    rest = {key: value for key, value in stored.items() if key != "weights"}
    if not is_address(kind):
        return kind, rest
    architecture, model_args = rest.pop("architecture", None), rest.pop("model_args", {})
    if not isinstance(architecture, str):
        raise IntegrityError(
            f"{path}: its backbone {kind!r} is an address, and the file does not describe the model that was there"
        )
    return architecture, {**model_args, **rest}


def _compare(name: str, folder: TimmFolder, architecture: str | None, model_args: Mapping[str, Any] | None) -> None:
    if architecture not in (None, f"timm/{folder.architecture}"):
        raise _other_architecture(name, f"timm/{folder.architecture}", str(architecture))
    if model_args is not None and dict(model_args) != folder.model_args:
        raise _other_architecture(name, f"a model of {folder.model_args}", f"one of {dict(model_args)}")


def _other_architecture(name: str, found: str, wanted: str) -> IntegrityError:
    return IntegrityError(
        f"{name} holds {found}, not {wanted}",
        why="it was changed since the description was stored",
        fix="leave `architecture` and `model_args` out of the backbone's options to use what is there now",
    )
