"""One image file to one whole picture: complete decoding, orientation, and one meaning for every pixel mode.

What is decided here, for training and prediction alike:

- EXIF orientation is applied.
- Transparency (alpha channel, palette or colour key) is laid over white.
- More than 8 bits a channel (16-bit and floating-point files, `.npy` arrays) become bytes by the value range of the
  preprocessing; without one they are refused, because nobody declared what is white. Bytes stay as they are.
- Of an animation or a multi-page file the first frame counts.
- A file that cannot be decoded to its last byte is an error, never half an image.
- A JPEG that is much larger than needed may be decoded at a half, a quarter or an eighth of its size: the
  decoder then leaves out the finest detail, which the resize that follows would average away.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.core.preprocessing import ValueRange
from flashtask.data.layout import is_image_name, nearest_existing
from flashtask.data.value_range import Bounds, unknown_range
from flashtask.data.wide_images import (
    Array,
    UnknownRangeError,
    array_values,
    bounds_of_values,
    is_array_file,
    is_wide,
    picture_of_values,
    read_array,
    refuse_misread,
    wide_values,
)

__all__ = ["MAX_PIXELS", "LeastSize", "bounds_of_file", "in_mode", "is_image_name", "load_image", "load_scaled"]
__all__ += ["picture_of", "prepare_decoders"]

#: The most pixels that one file may decode to: above it Pillow itself warns of a decompression bomb.
MAX_PIXELS = 89_478_485

#: From the whole (width, height) of a picture to the least (width, height) that its decoding must have.
LeastSize = Callable[[tuple[int, int]], tuple[int, int]]

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# What an orientation tag (EXIF 0x0112) asks for; 1 and unknown values ask for nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those after which width and height have changed places.
_SIDEWAYS = (5, 6, 7, 8)


def load_image(
    path: str | os.PathLike[str],
    channels: int = 3,
    *,
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode one file completely, every pixel of it.

    Args:
        path: the image file; its content decides the format, not its name.
        channels: 3 gives mode RGB, 1 gives mode L; 8 bits a channel.
        value_range: of files with more than 8 bits, as in `Preprocessing`.
        max_pixels: width times height above which the file is refused before it is decoded.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    return load_scaled(path, channels, value_range=value_range, max_pixels=max_pixels)[0]


def load_scaled(
    path: str | os.PathLike[str],
    channels: int = 3,
    least: LeastSize | None = None,
    *,
    value_range: ValueRange | None = None,
    keep_grey: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one file to its last byte, at a fraction of its size where the format can and that is enough.

    Args:
        path: the image file; its content decides the format, not its name.
        channels: 3 gives mode RGB, 1 gives mode L; 8 bits a channel.
        least: how large the picture must stay; None decodes every pixel.
        value_range: of files with more than 8 bits, as in `Preprocessing`.
        keep_grey: leave a grey file in mode L although 3 channels are wanted, all of which would be equal.
        max_pixels: width times height above which the file is refused before it is decoded.

    Returns:
        The upright picture, and the (width, height) of the whole one.

    Raises:
        BadDataError: empty, not an image, cut short, damaged, too large, of a value range that is not known, or
            unreadable.
        MissingInputError: there is no such file.
        UsageError: `channels` is not 1 or 3, or Pillow was told to accept truncated images.
    """
    _require_channels(channels)
    name = os.fspath(path)
    with _opened(name) as file:
        image, whole = _decode(file, max_pixels, least, value_range)
        grey = channels == 1 or (keep_grey and image.mode == "L" and not image.has_transparency_data)
        return in_mode(image, "L" if grey else "RGB"), whole


def bounds_of_file(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Bounds | None:
    """The least and the greatest value of a file with more than 8 bits a channel; None for any other.

    A file with more than 8 bits is decoded to its last byte; of others only the header is read.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    with _opened(os.fspath(path)) as file:
        if is_array_file(file):
            return bounds_of_values(read_array(file, max_pixels))
        image = _pillow_image(file, max_pixels)
        if not is_wide(image):
            return None
        return bounds_of_values(wide_values(_verified(image, file), file))


def picture_of(item: Image.Image | Array, channels: int = 3, value_range: ValueRange | None = None) -> Image.Image:
    """A picture in memory as a file of it would be read.

    Args:
        item: an image of any of Pillow's modes, or an array (H, W) or (H, W, C) with 1 or 3 channels: uint8 as it is,
            other integers and floating point by the value range.
        channels: 3 gives mode RGB, 1 gives mode L.
        value_range: as in `Preprocessing`.

    Raises:
        BadDataError: of a value range that is not known, or an array that is no image.
        UsageError: `channels` is not 1 or 3.
    """
    _require_channels(channels)
    with _faults_of("the image in memory" if isinstance(item, Image.Image) else "the array", ""):
        if isinstance(item, Image.Image):
            as_it_is = value_range == "format" or not is_wide(item)
            image = item if as_it_is else picture_of_values(wide_values(item, None), value_range)
        else:
            image = picture_of_values(array_values(item, MAX_PIXELS), value_range)
        return in_mode(image, "RGB" if channels == 3 else "L")


def _require_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise UsageError(f"images are read with 1 or 3 channels, not {channels!r}")


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """A file to decode. What goes wrong meanwhile is an error that names it."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set",
            why="Pillow would fill the missing part of damaged images with grey or black",
            fix="PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False",
        )
    _require_regular_file(name)
    with _faults_of(f"the image {name!r}", name), open(name, "rb") as file:
        yield file


@contextmanager
def _faults_of(what: str, name: str) -> Iterator[None]:
    """Every fault of an image as an error that names it.

    Args:
        what: as messages call it.
        name: of the file, empty for an image in memory.
    """
    try:
        yield
    except (MemoryError, UsageError):
        raise
    except UnknownRangeError as error:
        raise unknown_range(what, error.bounds) from error
    except Exception as error:  # Pillow's decoders raise nearly every built-in kind on damaged files
        raise _bad(what, _reason(name, error), is_file=bool(name)) from error


@functools.cache
def prepare_decoders() -> tuple[str, ...]:
    """Load Pillow's format plugins (once; unsafe in several threads) and name the formats that are read.

    The list is closed, because some of Pillow's other formats run external programs.
    """
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _require_regular_file(name: str) -> None:
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        if os.path.islink(name):
            raise _bad(f"the image {name!r}", f"a link to {os.readlink(name)!r}, which does not exist") from error
        if isinstance(error, FileNotFoundError):
            close = nearest_existing(Path(name))
            fix = f"did you mean {str(close)!r}?" if close else ""
            raise MissingInputError(f"no such image: {name!r}", fix=fix) from None
        raise _bad(f"the image {name!r}", error.strerror or str(error)) from error
    if not stat.S_ISREG(mode):
        raise _bad(f"the image {name!r}", "a folder" if stat.S_ISDIR(mode) else "not a regular file")


def _decode(
    file: IO[bytes], max_pixels: int, least: LeastSize | None, value_range: ValueRange | None
) -> tuple[Image.Image, tuple[int, int]]:
    if is_array_file(file):
        picture = picture_of_values(read_array(file, max_pixels), value_range)
        return picture, picture.size
    image = _verified(_pillow_image(file, max_pixels), file)
    width, height = image.size
    if value_range != "format" and is_wide(image):
        picture = picture_of_values(wide_values(image, file), value_range)
    else:
        if least is not None and isinstance(image, JpegImageFile):
            lies = _orientation(image) in _SIDEWAYS
            across, down = least((height, width) if lies else (width, height))
            image.draft(None, (down, across) if lies else (across, down))
        image.load()
        picture = image
    orientation = _orientation(image)  # in a PNG it may stand behind the pixels
    whole = (height, width) if orientation in _SIDEWAYS else (width, height)
    turn = _TURNS.get(orientation)
    return (picture if turn is None else picture.transpose(turn)), whole


def _pillow_image(file: IO[bytes], max_pixels: int) -> Image.Image:
    """The image of a file, its header read and no pixel decoded."""
    image = Image.open(file, formats=prepare_decoders())
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than the {max_pixels:,} allowed")
    refuse_misread(image)
    return image


def _verified(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """The image again, after the checksums of its pixels: Pillow skips those of PNG when it decodes them."""
    if image.format != "PNG":
        return image
    image.verify()
    file.seek(0)
    return Image.open(file, formats=("PNG",))


def _orientation(image: Image.Image) -> int:
    orientation: int = image.getexif().get(0x0112, 1)
    return orientation


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """A decoded picture with 8 bits a channel, as the rules at the top of this file say.

    Args:
        image: of any of Pillow's modes.
        mode: RGB or L.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_bytes(image))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode == "CMYK" and mode == "L":
        image = image.convert("RGB")
    return image.convert(mode)


def _to_bytes(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Grey values of a wider type, scaled to 0..255 by the range that the format declares."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point pixels outside 0..1, so that their range is unknown")
        highest = 1.0
    else:
        # Pillow opens 16-bit PNG and PGM as 32-bit integers in some versions, with values up to 65535.
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError("32-bit or signed integer pixels, whose range is unknown")
        highest = 65535.0
    scaled: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.rint(values * (255 / highest)).astype(np.uint8)
    return scaled


def _bad(what: str, reason: str, *, is_file: bool = True) -> BadDataError:
    fix = 'replace or remove the file; on_bad_image="skip" trains without such files' if is_file else ""
    return BadDataError(f"cannot read {what}", why=reason, fix=fix)


def _reason(name: str, error: Exception) -> str:
    if name and isinstance(error, UnidentifiedImageError):
        with open(name, "rb") as file:
            start = file.read(512).lstrip().lower()
        if not start:
            return "the file is empty" if os.path.getsize(name) == 0 else "the file holds only white space"
        if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<body")):
            return "a web page (HTML or XML), not an image"
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"decompression bomb: {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    return f"cut short: {text}" if "truncated" in text.lower() else text
