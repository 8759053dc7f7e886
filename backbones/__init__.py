"""Feature extractors: the registry of backbones, with everything in the zoo, timm and torchvision.

Importing this, and listing the names, loads neither torch nor timm nor torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtask.backbones.backbone import BACKBONES
from flashtask.backbones.search import BACKBONE_FILTERS
from flashtask.backbones.sources import SOURCES

if TYPE_CHECKING:
    from torch import nn

    from flashtask.backbones.backbone import Backbone

__all__ = ["BACKBONES", "build_backbone", "build_pyramid"]

BACKBONES.add_filters(BACKBONE_FILTERS)
for _source in SOURCES:
    BACKBONES.add_source(_source)


def build_backbone(
    name: str | nn.Module | Callable[..., nn.Module | Backbone],
    *,
    pretrained: bool = True,
    in_chans: int = 3,
    gives: str = "pooled",
    **options: Any,
) -> Backbone:
    """Build a feature extractor by name or address, or wrap a user's module.

    Args:
        name: `resnet18` (the zoo's own entries, then timm), `resnet18.a1_in1k` (certain weights), `timm/NAME`,
            `torchvision/NAME`, a registered name; `hf-hub:org/name@revision`, `local-dir:FOLDER` (timm's layout),
            `checkpoint:FILE` (of a task) or a path to one of these; a module from images (B, C, H, W) to features, or a
            function `(pretrained, in_chans, **options)` that builds one.
        pretrained: load weights; if there are none, or they cannot be fetched, that is an error.
        in_chans: channels of the images, at least 1; weights for other channels are adapted.
        gives: `pooled`, one vector an image (B, F); `maps`, a list of maps (B, C, H, W), the finest first, as
            `build_pyramid` describes, with its `out_indices`; or `tokens`, those of a vision transformer (B, N, F),
            the `num_prefix_tokens` first. The keys of the weights are those of the library in all three.
        options: the builder's own arguments (`drop_path_rate`, `img_size`, ...); and `weights`, a file (safetensors,
            `.pth`, `.ckpt`) whose weights the architecture takes instead of its own.

    Raises:
        UnknownNameError: no backbone, or no set of weights, has this name.
        HubError: the weights could not be downloaded.
        MissingInputError: a file, or the package that holds the weights, is not there.
        IntegrityError: a file is damaged or hostile, or its weights are those of another model.
        UsageError: there are no weights for this architecture, it has no features of the kind, or an option is wrong.
    """
    from flashtask.backbones.building import build
    from flashtask.core.feature_info import check_kind

    check_kind(gives, "gives")
    if gives == "maps":
        return build_pyramid(name, pretrained=pretrained, in_chans=in_chans, **options)
    return build(name, pretrained=pretrained, in_chans=in_chans, options=options, gives=gives)


def build_pyramid(
    name: str | nn.Module | Callable[..., nn.Module | Backbone],
    *,
    pretrained: bool = True,
    in_chans: int = 3,
    out_indices: Any = None,
    **options: Any,
) -> Backbone:
    """Build a backbone that gives its maps at several scales, for tasks that answer for each pixel or box.

    The module gives a list of maps (B, channels[i], about H / reductions[i], about W / reductions[i]), the finest
    first. The size in its preprocessing is that of training; others will do for most models.

    Args:
        name: as for `build_backbone`, of a timm or torchvision model; or a module whose forward gives a list of maps.
        pretrained: load weights.
        in_chans: channels of the images.
        out_indices: which scales, from 0 (the finest); all by default. Negative ones count from the coarsest.
        options: the builder's own arguments.

    Raises:
        UsageError: the model has no maps (as most transformers with one scale), or no scale of such an index; and as
            `build_backbone`.
    """
    from flashtask.backbones.pyramid import build

    return build(name, pretrained=pretrained, in_chans=in_chans, out_indices=out_indices, options=options)
