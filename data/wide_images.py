"""Images of more than 8 bits a channel, and arrays: what their values are, and which bytes they become.

Pillow cuts 16-bit colour to its higher 8 bits without a word, and misreads some kinds of TIFF. The former is read whole
here, the latter is refused by name. A value range says which values are black and white; what is between becomes one
of 256 levels, before any resize.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import ValueRange
from flashtask.data.value_range import Bounds, why_unknown

__all__ = [
    "PIXELS_VARIABLE",
    "TooManyPixelsError",
    "UnknownRangeError",
    "Values",
    "array_values",
    "bounds_of_values",
    "is_array_file",
    "is_wide",
    "most_pixels",
    "picture_of_values",
    "read_array",
    "refuse_misread",
    "require_size",
    "wide_values",
]

Array = np.ndarray[Any, np.dtype[Any]]

#: The most pixels (width times height) that one file may decode to.
PIXELS_VARIABLE = "FLASHTASK_MAX_IMAGE_PIXELS"
_NPY = b"\x93NUMPY"
#: Extra samples of a TIFF pixel that may be ignored: some programs write a fourth beside RGB that has no meaning.
_MOST_EXTRA = 1


class UnknownRangeError(ValueError):
    """Values of more than 8 bits, and no range for them.

    Args:
        bounds: of the image.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        super().__init__(why_unknown(bounds))


class Values(NamedTuple):
    """The values of an image.

    Args:
        channels: (H, W) or (H, W, 3) of any integer or floating-point type.
        alpha: (H, W) uint8, or None for an opaque image.
    """

    channels: Array
    alpha: Array | None = None


# ---- arrays


def is_array_file(file: IO[bytes]) -> bool:
    """Whether a file begins as a `.npy` file does; it is at its beginning before and after."""
    start = file.read(len(_NPY))
    file.seek(0)
    return start == _NPY


def read_array(file: IO[bytes], max_pixels: int | None) -> Values:
    """The array of a `.npy` file. Memory is taken for what the file holds, never for what its header claims.

    Raises:
        ValueError: a damaged file, or an array that is no image.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("a .npy file of another version than 1.0, which numpy.save writes for images")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    _check_array(shape, dtype, max_pixels)
    start = file.tell()
    there, said = file.seek(0, os.SEEK_END) - start, math.prod(shape) * dtype.itemsize
    file.seek(start)
    if there != said:
        kind = "cut short" if there < said else "longer than its header says"
        raise ValueError(f"{kind}: {there:,} bytes of pixels, and {said:,} for {dtype} of shape {shape}")
    values = np.frombuffer(file.read(said), dtype).reshape(shape, order="F" if fortran else "C")
    return array_values(values, max_pixels)


def array_values(array: Array, max_pixels: int | None) -> Values:
    """An array (H, W) or (H, W, C) as the values of an image.

    Raises:
        ValueError: it is none, by its shape or type.
    """
    _check_array(array.shape, array.dtype, max_pixels)
    return Values(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _check_array(shape: tuple[int, ...], dtype: np.dtype[Any], max_pixels: int | None) -> None:
    if dtype.kind not in "uif":
        raise ValueError(f"an array of {dtype}, not of integers or floating-point numbers")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        first = len(shape) == 3 and shape[0] in (1, 3)
        hint = ": move the channels to the end, numpy.moveaxis(array, 0, -1)" if first else ""
        raise ValueError(f"an array of shape {shape}, not (height, width) or (height, width, 1 or 3 channels){hint}")
    if min(shape) < 1:
        raise ValueError(f"an array of shape {shape}, which has no pixels")
    require_size(shape[1], shape[0], max_pixels)


class TooManyPixelsError(ValueError):
    """A picture has more pixels than are allowed."""


def require_size(width: int, height: int, most: int | None) -> None:
    """Refuse a picture with too many pixels; None means `most_pixels()`.

    Raises:
        TooManyPixelsError: with the two numbers, and where the limit comes from.
    """
    limit = most_pixels() if most is None else most
    if limit is not None and width * height > limit:
        own = f"; PIL.Image.MAX_IMAGE_PIXELS or ${PIXELS_VARIABLE} allows more" if most is None else ""
        raise TooManyPixelsError(f"{width} x {height} pixels, more than the {limit:,} allowed{own}")


def most_pixels() -> int | None:
    """The most pixels that one file may decode to: Pillow's own limit, which an environment variable sets.

    Raises:
        UsageError: the variable is not a whole number.
    """
    _take_variable()
    return Image.MAX_IMAGE_PIXELS


@functools.cache
def _take_variable() -> None:
    """Let Pillow have the limit of the environment: it would refuse larger files itself."""
    text = os.environ.get(PIXELS_VARIABLE, "").strip()
    if not text:
        return
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**40):
        raise UsageError(
            f"{PIXELS_VARIABLE}={text[:40]!r} must be a number of pixels", fix=f"export {PIXELS_VARIABLE}=500000000"
        )
    Image.MAX_IMAGE_PIXELS = int(text)


# ---- images that Pillow opens


def is_wide(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a channel, also where Pillow would load 8 of them.

    Args:
        image: opened, and not yet loaded.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return True
    raw = _raw_mode(image)
    if isinstance(raw, int):
        return image.mode == "RGB" and raw > 255
    return raw is not None and ";16" in raw and image.mode in ("RGB", "RGBA")


def wide_values(image: Image.Image, file: IO[bytes] | None) -> Values:
    """The values of an image that `is_wide`.

    Args:
        image: opened, and for a file not yet loaded.
        file: that it was opened from; None for an image in memory.

    Raises:
        ValueError: a kind that cannot be read right.
        OSError: a file that is damaged.
    """
    key = image.info.get("transparency")
    if image.mode not in ("RGB", "RGBA"):
        image.load()
        return _with_key(_grey(image), key)
    if file is None:
        raise ValueError("16-bit colour, of which Pillow would load the higher 8 bits; give the path of the file")
    raw = _raw_mode(image)
    if isinstance(raw, int):
        return _ppm_colours(image, file, raw)
    assert raw is not None
    return _with_key(_sixteen_bit_colours(image, file, raw), key)


def _raw_mode(image: Image.Image) -> str | int | None:
    """How the pixels lie in the file, by Pillow's name; for PPM the value that is white. None once they are loaded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return None
    args = tiles[0].args
    if tiles[0].codec_name in ("ppm", "ppm_plain"):
        return int(args[-1])
    name = args[0] if isinstance(args, tuple) and args else args
    return name if isinstance(name, str) else None


def _grey(image: Image.Image) -> Values:
    values: Array = np.asarray(image)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return Values(values)
    sample_format, bits = _first(tags.get(339), 1), _first(tags.get(258), 1)
    if sample_format == 1 and bits == 32:
        values = values.view(np.uint32)  # Pillow has no unsigned 32-bit pixels
    if tags.get(262) == 0:
        if sample_format != 1 or bits != 16:
            raise ValueError(f"a TIFF of {bits} bits in which the lowest value is white (MinIsWhite)")
        values = np.uint16(65535) - values
    return Values(values)


def _sixteen_bit_colours(image: Image.Image, file: IO[bytes], raw: str) -> Values:
    """Decoded twice: for the higher byte of each value, and as if the byte order were the other, for the lower."""
    if raw == "LA;16B":
        # Grey and alpha, 2 bytes each, are decoded as they lie.
        lying = _decoded_as(image, file, "RGBA").astype(np.uint16)
        return Values(lying[..., 0] << 8 | lying[..., 1], lying[..., 2].astype(np.uint8))
    if raw[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16"):
        raise ValueError(f"16-bit colour of the kind {raw}, whose alpha is multiplied into the colours")
    native = "L" if sys.byteorder == "little" else "B"
    other = {"L": "B", "B": "L"}[raw[-1].replace("N", native)]
    high = _decoded_as(image, file, raw)
    low = _decoded_as(image, file, raw[:-1] + other)
    values = high[..., :3].astype(np.uint16) << 8 | low[..., :3]
    return Values(values, high[..., 3] if image.mode == "RGBA" else None)


def _decoded_as(image: Image.Image, file: IO[bytes], raw: str) -> Array:
    """The bytes (H, W, C) that come out if the pixels of a file lie as another raw mode says."""
    file.seek(0)
    again = Image.open(file, formats=(str(image.format),))
    # A tile's arguments are a raw mode, or begin with it.
    again.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in again.tile
    ]
    return np.asarray(again)


def _ppm_colours(image: Image.Image, file: IO[bytes], white: int) -> Values:
    """Pairs of bytes, scaled to 0..65535 as Pillow does for grey."""
    tile = image.tile[0]  # type: ignore[attr-defined]
    if tile.codec_name != "ppm":
        raise ValueError("colours of more than 8 bits as text (P3); write the binary kind (P6)")
    file.seek(tile.offset)
    count = 3 * image.width * image.height
    data = file.read(2 * count)
    if len(data) != 2 * count:
        raise ValueError(f"cut short: {len(data):,} bytes of pixels of {2 * count:,}")
    values = np.frombuffer(data, ">u2").reshape(image.height, image.width, 3)
    return Values(np.rint(np.minimum(values, white) * (65535 / white)).astype(np.uint16))


def _with_key(values: Values, key: Any) -> Values:
    """With a colour key of PNG, one value or three, as alpha."""
    if values.alpha is not None or not isinstance(key, (int, tuple)):
        return values
    hit = values.channels == np.array(key)
    return Values(values.channels, np.where(hit.all(-1) if hit.ndim == 3 else hit, 0, 255).astype(np.uint8))


def refuse_misread(image: Image.Image) -> None:
    """Refuse the kinds of TIFF that Pillow opens and reads as something else.

    Args:
        image: opened, of any format.

    Raises:
        ValueError: naming the kind.
    """
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    bits = _first(tags.get(258), 1)
    extra = len(tags.get(338) or ())
    if extra > _MOST_EXTRA:
        raise ValueError(f"a TIFF of {tags.get(277)} bands, of which Pillow would drop the last; images have 1 or 3")
    if tags.get(284) == 2 and bits > 8 and tags.get(277, 1) > 1:
        raise ValueError(f"a planar TIFF (one plane for each channel) of {bits} bits")
    if bits == 8 and _first(tags.get(339), 1) == 2:
        raise ValueError("a TIFF of signed 8-bit values")


def _first(value: Any, default: int) -> int:
    """A tag's value, or the first of its values."""
    return int((value[0] if isinstance(value, tuple) else value) if value else default)


# ---- ranges


def bounds_of_values(values: Values) -> Bounds | None:
    """The least and the greatest value; None for bytes, which need no range.

    Raises:
        ValueError: values that are no numbers.
    """
    if values.channels.dtype == np.uint8:
        return None
    low, high = float(values.channels.min()), float(values.channels.max())
    if not np.isfinite((low, high)).all():  # a NaN anywhere is the least and the greatest
        raise ValueError("pixels that are NaN or infinite")
    return low, high


def picture_of_values(values: Values, value_range: ValueRange | None) -> Image.Image:
    """The picture, in mode L, LA, RGB or RGBA.

    Raises:
        UnknownRangeError: the values are of more than 8 bits, and there is no range.
        ValueError: they are no numbers, or outside the range that their type has (`format`).
    """
    bounds = bounds_of_values(values)
    if bounds is None:
        image = Image.fromarray(np.ascontiguousarray(values.channels))
    elif value_range is None:
        raise UnknownRangeError(bounds)
    else:
        ends = _of_type(values.channels, bounds) if isinstance(value_range, str) else value_range
        image = Image.fromarray(_bytes(values.channels, *ends))
    if values.alpha is not None:
        image.putalpha(Image.fromarray(values.alpha))
    return image


def _of_type(values: Array, bounds: Bounds) -> tuple[float, float]:
    """The range of a type: what `format` means for an array."""
    if values.dtype == np.uint16:
        return 0, 65535
    if values.dtype.kind == "f" and bounds[0] >= 0 and bounds[1] <= 1:
        return 0, 1
    raise UnknownRangeError(bounds)


def _bytes(values: Array, low: float, high: float) -> Array:
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        found: Array = _table(low, high)[values]
        return found
    out = np.empty(values.shape, np.uint8)
    step = max(1, 2**18 // values[0].size)
    for start in range(0, len(values), step):  # so that floats take memory for some rows at a time
        out[start : start + step] = _scaled(values[start : start + step], low, high)
    return out


@functools.lru_cache(maxsize=8)
def _table(low: float, high: float) -> Array:
    """The byte of each 16-bit value."""
    return _scaled(np.arange(2**16), low, high)


def _scaled(values: Array, low: float, high: float) -> Array:
    scaled: Array = np.rint((np.clip(values.astype(np.float64), low, high) - low) * (255 / (high - low)))
    return scaled.astype(np.uint8)
