"""`weights="my.pth"`: the weights of a file for a named architecture that is not timm's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from flashtask.backbones.backbone import Backbone
from flashtask.backbones.matching import adapt_channels, backbone_tensors, classifier_paths, load_tensors
from flashtask.backbones.torchvision_provider import first_convolution, whole_model
from flashtask.backbones.weight_files import WEIGHT_SUFFIXES, read_weights
from flashtask.core.errors import MissingInputError, UsageError

__all__ = ["load_file", "weights_file"]


def weights_file(name: Any, weights: Any, pretrained: bool) -> Path:
    """The file that the option `weights` names.

    Raises:
        UsageError: it is no file of weights, or goes with something that takes none.
        MissingInputError: there is no such file.
    """
    if not isinstance(name, str):
        raise UsageError(
            "weights from a file go with the name of an architecture",
            fix="load them yourself: module.load_state_dict(...)",
        )
    if not isinstance(weights, (str, os.PathLike)) or not str(weights).endswith((*WEIGHT_SUFFIXES, ".ckpt")):
        architecture = name.partition(".")[0]
        example = "IMAGENET1K_V1" if name.startswith("torchvision/") else "a1_in1k"
        raise UsageError(
            f"weights is no option that takes {weights!r}: it is a file ({', '.join(WEIGHT_SUFFIXES)}, .ckpt)",
            fix=f'known weights are part of the name: "{architecture}.{example}"',
        )
    if not pretrained:
        raise UsageError("pretrained=False contradicts weights", fix=f"leave one of them out: weights={str(weights)!r}")
    path = Path(weights).expanduser()
    if not path.is_file():
        raise MissingInputError(f"there is no file {path}", fix=f"ls -l {path.parent}")
    return path


def load_file(backbone: Backbone, path: Path, in_chans: int) -> None:
    """Load the weights of a file into a backbone that was built without any.

    Raises:
        IntegrityError: the file is damaged or hostile, or does not hold this model.
        UsageError: it holds the model more than once, or cannot be adapted to the channels.
    """
    module, file = backbone.module, str(path)
    tensors = backbone_tensors(read_weights(path), module.state_dict(), _classifier(backbone), file)
    adapt_channels(tensors, module, first_convolution(module), in_chans, file)
    load_tensors(module, tensors, file)


def _classifier(backbone: Backbone) -> tuple[str, ...]:
    """The layers that the architecture has behind its features, where that is known."""
    if backbone.name.startswith("torchvision/"):
        whole = whole_model(backbone.name.removeprefix("torchvision/").partition(".")[0])
        return classifier_paths(whole.state_dict(), backbone.module.state_dict())
    return _declared(backbone.module)


def _declared(module: nn.Module) -> tuple[str, ...]:
    config = getattr(module, "pretrained_cfg", None) or {}
    named = config.get("classifier") if isinstance(config, dict) else None
    return (named,) if isinstance(named, str) else tuple(named or ())
