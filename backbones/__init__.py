"""Feature extractors: the registry of backbones, with everything in the zoo, timm and torchvision.

Importing this, and listing the names, loads neither torch nor timm nor torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtask.backbones.sources import LibrarySource, ZooSource
from flashtask.core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from flashtask.backbones.backbone import Backbone

__all__ = ["BACKBONES", "build_backbone"]

BACKBONES: Registry[Callable[..., nn.Module | Backbone]] = Registry("backbone", group="flashtask.backbones")
BACKBONES.add_source(ZooSource())
BACKBONES.add_source(LibrarySource("timm", builder="flashtask.backbones.timm_provider", is_default=True))
BACKBONES.add_source(LibrarySource("torchvision", builder="flashtask.backbones.torchvision_provider"))


def build_backbone(name: str | nn.Module, *, pretrained: bool = True, in_chans: int = 3, **options: Any) -> Backbone:
    """Build a feature extractor by name, or wrap a module of the user's.

    Args:
        name: `resnet18` (the zoo's own entries, then timm), `resnet18.a1_in1k` (certain weights),
            `timm/NAME`, `torchvision/NAME`, a registered name, or a module from images (B, C, H, W) to
            features.
        pretrained: load weights; if there are none or they cannot be had, that is an error.
        in_chans: channels of the images, at least 1.
        options: the builder's own arguments (`drop_path_rate`, `img_size`, ...).

    Raises:
        UnknownNameError: no backbone, or no set of weights, has this name.
        HubError: the weights could not be downloaded.
        MissingInputError: the package that holds the weights is not installed.
        UsageError: there are no weights for this architecture, or an option is wrong.
    """
    from flashtask.backbones.building import build

    return build(name, pretrained=pretrained, in_chans=in_chans, options=options)
