"""A decoder of segmentation_models_pytorch over the maps of any backbone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.feature_info import FeatureInfo

__all__ = ["SmpHead"]

#: The scales that these decoders know, in pixels of the image along one side.
_REDUCTIONS = (2, 4, 8, 16, 32)


class SmpHead(nn.Module):
    """A decoder, one convolution and an enlargement to the pixels of the image.

    Args:
        name: of the decoder.
        found: its module, its class and its usual arguments.
        features: of the backbone; a finest map of stride 4 is what transformers have there too.
        num_outputs: channels of the result.
        options: arguments of the decoder in place of the usual ones.

    Raises:
        UnknownNameError: an option that the decoder does not have.
        UsageError: the backbone has no maps of strides 4, 8, 16 and 32.

    Shape: maps (B, C, h, w), the finest first, to (B, num_outputs, H, W) in the pixels of the image.
    """

    takes = "maps"

    def __init__(
        self,
        name: str,
        found: tuple[str, str, Mapping[str, Any]],
        features: FeatureInfo,
        num_outputs: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        module, kind, usual = found
        by_reduction = dict(zip(features.reductions, range(len(features.reductions)), strict=True))
        if not set(_REDUCTIONS[1:]) <= set(by_reduction):
            raise UsageError(
                f"the head 'smp/{name}' needs maps of strides 4, 8, 16 and 32, and the backbone has those of "
                f"{', '.join(map(str, features.reductions))}",
                fix='head="fpn"',
            )
        self.places = [by_reduction.get(reduction) for reduction in _REDUCTIONS]
        channels = [3, *(0 if place is None else features.channels[place] for place in self.places)]
        decoder = getattr(import_module(f"segmentation_models_pytorch.decoders.{module}.decoder"), kind)
        known = [one for one in inspect.signature(decoder).parameters if one not in _GIVEN]
        for option in options:
            if option not in known:
                raise UnknownNameError(f"option of the head 'smp/{name}'", option, known)
        depth = {one: 5 for one in ("n_blocks", "encoder_depth") if one in inspect.signature(decoder).parameters}
        self.decoder = decoder(encoder_channels=channels, **depth, **{**usual, **options})
        self.reduction = features.reductions[0]
        self.out = nn.Conv2d(self._width(channels), num_outputs, 3, padding=1)

    def _width(self, channels: Sequence[int]) -> int:
        """The channels that the decoder gives, found on maps of a small image."""
        strides = (1, *_REDUCTIONS)
        made = [torch.zeros(1, count, 64 // by, 64 // by) for count, by in zip(channels, strides, strict=True)]
        with torch.no_grad():
            found: Tensor = self.decoder.eval()(made)
        self.decoder.train()
        return found.shape[1]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H, W) of maps."""
        size = [self.reduction * side for side in maps[0].shape[-2:]]
        given = [maps[0].new_zeros(len(maps[0]), 3, *size)]
        for place, reduction in zip(self.places, _REDUCTIONS, strict=True):
            empty = [side // reduction for side in size]
            given.append(maps[0].new_zeros(len(maps[0]), 0, *empty) if place is None else maps[place])
        return functional.interpolate(self.out(self.decoder(given)), size, mode="bilinear", align_corners=False)


#: Arguments that follow from the backbone.
_GIVEN = ("encoder_channels", "n_blocks", "encoder_depth")
