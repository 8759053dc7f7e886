"""Resize and crop as Pillow computes them, as matrix products that a graph of any runtime holds.

Pillow resizes 8-bit pictures in whole numbers: the weights of its filter are rounded to 22 bits, and each of the two
passes, first along rows and then along columns, is rounded to a byte. ONNX's `Resize` has no such rounding, so scores
would differ. Here the same whole numbers are multiplied in float32, which holds them exactly: each weight is split into
a part for its upper bits and a part for its lower 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor, nn

from flashtask.core.preprocessing import Preprocessing

__all__ = ["Place", "Resize"]

#: Whether Pillow makes a picture that becomes much lower first lower, then narrower: the two roundings differ.
_LOSES_ROWS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13

#: Pillow's weights are whole multiples of 1 / 2**22.
_BITS = 22
_LOWER = 2.0**11
_UPPER = 2.0 ** (_BITS - 11)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return near.where(x < 1, far.where(x < 2, 0.0))


def _sinc(x: Tensor) -> Tensor:
    turned = x * math.pi
    return (turned.sin() / turned.where(x != 0, 1.0)).where(x != 0, 1.0)


def _lanczos(x: Tensor) -> Tensor:
    return (_sinc(x) * _sinc(x / 3)).where((x >= -3) & (x < 3), 0.0)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _hamming(x: Tensor) -> Tensor:
    x = x.abs()
    turned = x * math.pi
    value = turned.sin() / turned.where(x != 0, 1.0) * (0.54 + 0.46 * turned.cos())
    return value.where(x != 0, 1.0).where(x < 1, 0.0)


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos, "box": _box, "hamming": _hamming}


class Place(NamedTuple):
    """Where a picture lies in the input that was made of it; each (2,) int64, along height and width.

    Args:
        whole: pixels of the picture.
        resized: pixels of it after the resize.
        starts: rows and columns of the resized picture that are cut off before the input; below 0 so many are added.
        pixels: (H,) and (W,), the numbers of the picture's rows and columns.
    """

    whole: Tensor
    resized: Tensor
    starts: Tensor
    pixels: tuple[Tensor, Tensor]


class Resize(nn.Module):
    """Pictures of any size to the size that a backbone takes: what `data.decoding.Fitting` does, for tensors.

    Args:
        preprocessing: of the backbone.
        may_branch: whether the runtime computes a branch of a graph rightly; without, both are computed and one is
            taken.

    Shape: (N, C, H, W) float32 with whole numbers from 0 to 255 to (N, C, h, w) of the same kind, with their `Place`.
    """

    fill: Tensor

    def __init__(self, preprocessing: Preprocessing, *, may_branch: bool = True) -> None:
        super().__init__()
        self.may_branch = may_branch
        self.size = preprocessing.input_size[1:]
        self.mode, self.interpolation = preprocessing.crop_mode, preprocessing.interpolation
        down, across = (math.floor(side / preprocessing.crop_pct) for side in self.size)
        self.wanted = (down, across)
        fill = preprocessing.mean if self.mode == "border" else (0.0,) * preprocessing.input_size[0]
        self.register_buffer("fill", torch.tensor([round(255 * value) for value in fill]).float()[:, None, None])

    def forward(self, pictures: Tensor) -> tuple[Tensor, Place]:
        """The resized pictures, and where the picture lies in them."""
        whole = tuple(_number(pictures.shape[axis], pictures) for axis in (2, 3))
        resized = self._resized(*whole)
        starts = [_start(side, wanted, self.mode == "border") for side, wanted in zip(resized, self.size, strict=True)]
        down, across = (torch.arange(pictures.shape[axis], device=pictures.device) for axis in (2, 3))
        inside, weights = [], []
        for axis, pixels in enumerate((down, across)):
            rows = torch.arange(self.size[axis], device=pictures.device) + starts[axis]
            inside.append((rows >= 0) & (rows < resized[axis]))
            weights.append(self._weights(rows, pixels, whole[axis], resized[axis]))
        values = self._passes(pictures, weights, [one - side for one, side in zip(whole, resized, strict=True)])
        values = values.where(inside[0][:, None] & inside[1], self.fill)
        return values, Place(torch.stack(whole), torch.stack(resized), torch.stack(starts), (down, across))

    def _passes(self, pictures: Tensor, weights: Sequence[Tensor], lost: Sequence[Tensor]) -> Tensor:
        """Both passes, in the order in which Pillow takes them."""
        if not _LOSES_ROWS_FIRST:
            return _across_first(pictures, *weights)
        is_down_first = (lost[0] > 0) & (lost[0] > 2 * lost[1])
        if not torch.compiler.is_exporting():
            return (_down_first if is_down_first else _across_first)(pictures, *weights)
        if not self.may_branch:
            both = _down_first(pictures, *weights), _across_first(pictures, *weights)
            return both[0].where(is_down_first, both[1])
        found: Tensor = torch.cond(is_down_first, _down_first, _across_first, (pictures, *weights))
        return found

    def _resized(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """The sides after the resize, before crop and padding, as whole numbers (0-d int64)."""
        down, across = self.wanted
        if self.mode == "squash":
            return torch.full_like(height, down), torch.full_like(width, across)
        if self.mode == "center" and down == across:
            longer = torch.div(down * torch.maximum(height, width), torch.minimum(height, width), rounding_mode="floor")
            side = torch.full_like(longer, down)
            return longer.where(width <= height, side), side.where(width <= height, longer)
        ratios = (height.double() / down, width.double() / across)
        ratio = torch.maximum(*ratios) if self.mode == "border" else torch.minimum(*ratios)
        found = [(side.double() / ratio).round().clamp(min=1).long() for side in (height, width)]
        return found[0], found[1]

    def _weights(self, rows: Tensor, pixels: Tensor, whole: Tensor, side: Tensor) -> Tensor:
        """Pillow's weights (pixels, rows) of a pass, in units of 1 / 2**22, float64."""
        if self.interpolation == "nearest":
            nearest = ((rows.double() + 0.5) * (whole.double() / side.double())).floor().long()
            return (pixels[:, None] == nearest).double() * 2.0**_BITS
        # (pixel - middle) / scale, in whole numbers up to the division, so that float32 would do too.
        distance = (2 * pixels[:, None] + 1) * side - (2 * rows + 1) * whole
        weights = _FILTERS[self.interpolation](distance.double() / (2 * torch.maximum(whole, side)).double())
        total = weights.sum(dim=0)
        shares = weights / total.where(total != 0, 1.0) * 2.0**_BITS
        return shares.sign() * (shares.abs() + 0.5).floor()


def _number(value: Any, like: Tensor) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.int64, device=like.device)


def _start(side: Tensor, wanted: int, is_padded: bool) -> Tensor:
    """Where the input begins in the resized picture; below 0 where it begins beside it."""
    canvas = side.clamp(min=wanted) if is_padded else side
    # Halves go to the even number, and the smaller half is padded first.
    cut = ((canvas - wanted).double() / 2).round().long()
    start = cut.where(canvas >= wanted, -_half(wanted - canvas))
    return start - _half(canvas - side)


def _half(count: Tensor) -> Tensor:
    return torch.div(count, 2, rounding_mode="floor")


def _across_first(pictures: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _product(_product(pictures, across).mT, down).mT.contiguous()


def _down_first(pictures: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _product(_product(pictures.mT, down).mT, across).contiguous()


def _product(values: Tensor, weights: Tensor) -> Tensor:
    """A pass of Pillow's (..., n) x (n, m): products of whole numbers, rounded and clipped to bytes."""
    upper = (weights / _LOWER).round()
    lower = weights - upper * _LOWER
    both = values @ torch.cat([upper, lower], dim=1).float()
    high, low = both[..., : weights.shape[1]], both[..., weights.shape[1] :]
    # floor((high * 2**11 + low + 2**21) / 2**22) without numbers that float32 does not hold.
    whole = (high / _UPPER).floor()
    rest = (high - whole * _UPPER) * _LOWER + low + 2.0 ** (_BITS - 1)
    return (whole + (rest / 2.0**_BITS).floor()).clamp(0, 255)
