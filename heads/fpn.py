"""The head for maps that is small and robust: a feature pyramid, summed at its finest scale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo

__all__ = ["FPNHead", "block", "check_width", "enlarged"]

#: The finest map that is used, in pixels of the image along one side.
_FINEST = 4


class FPNHead(nn.Module):
    """The semantic branch of a panoptic feature pyramid network (Kirillov et al., arXiv:1901.02446).

    Args:
        features: of the backbone.
        num_outputs: channels of the result.
        width: channels of the pyramid, at least 1.
        dropout: share of channels set to 0 before the last layer in training, in [0, 1).

    Shape: maps (B, C, h, w), the finest first, to (B, num_outputs, H, W) in the pixels of the image.
    """

    takes = "maps"

    def __init__(self, features: FeatureInfo, num_outputs: int, *, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        check_width("fpn", width, dropout)
        reductions = features.reductions
        self.first = next((place for place, one in enumerate(reductions) if one >= _FINEST), len(reductions) - 1)
        self.reduction = reductions[self.first]
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in features.channels[self.first :])
        self.smooth = nn.ModuleList(block(width, width) for _ in self.laterals)
        self.dropout = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(width, num_outputs, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H, W) of maps."""
        used = list(maps)[self.first :]
        size = used[0].shape[-2:]
        above: Tensor | None = None
        total: Tensor | None = None
        for lateral, smooth, one in reversed(list(zip(self.laterals, self.smooth, used, strict=True))):
            same = lateral(one)
            if above is not None:
                same = same + functional.interpolate(above, one.shape[-2:], mode="nearest")
            above = same
            part = functional.interpolate(smooth(same), size, mode="bilinear", align_corners=False)
            total = part if total is None else total + part
        return enlarged(self.out(self.dropout(total)), self.reduction)


def block(before: int, after: int) -> nn.Sequential:
    """A convolution, a norm that does not depend on the batch, and ReLU."""
    groups = next(number for number in (32, 16, 8, 4, 2, 1) if after % number == 0)
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(groups, after), nn.ReLU())


def enlarged(maps: Tensor, factor: int) -> Tensor:
    """Maps (B, C, h, w) as (B, C, factor * h, factor * w)."""
    if factor == 1:
        return maps
    size = [factor * side for side in maps.shape[-2:]]
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def check_width(name: str, width: object, dropout: float) -> None:
    """Refuse options that no head can be built with.

    Raises:
        UsageError: a width below 1, or a dropout outside [0, 1).
    """
    if type(width) is not int or width < 1:
        raise UsageError(f"the head {name!r}: width must be a whole number of at least 1, not {width!r}")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}")
