"""One image to one whole picture: complete decoding, orientation, and one meaning for every pixel mode.

What is decided here, for training and prediction alike:

- EXIF orientation is applied, also that of a PIL image which still carries the tag.
- Transparency (alpha channel, palette or colour key) is laid over white.
- More than 8 bits a channel (16-bit and floating-point files, `.npy` arrays) become bytes by the value range of the
  preprocessing; without one they are refused, because nobody declared what is white. Bytes stay as they are.
- Of an animation or a multi-page file the first frame counts.
- A file that cannot be decoded to its last byte is an error, never half an image.
- A JPEG that is much larger than needed may be decoded at a half, a quarter or an eighth of its size: the
  decoder then leaves out the finest detail, which the resize that follows would average away.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.core.names import quoted_name
from flashtask.core.preprocessing import ValueRange
from flashtask.data.layout import is_image_name, is_registered, nearest_existing
from flashtask.data.value_range import Bounds, unknown_range
from flashtask.data.wide_images import (
    PIXELS_VARIABLE,
    Array,
    UnknownRangeError,
    array_values,
    bounds_of_values,
    is_array_file,
    is_wide,
    most_pixels,
    picture_of_values,
    read_array,
    refuse_misread,
    require_size,
    wide_values,
)

__all__ = ["Encoded", "LeastSize", "image_bounds", "in_mode", "is_image_name", "load_image"]
__all__ += ["image_orientation", "image_size", "load_scaled", "picture_hash", "prepare_decoders"]

#: From the whole (width, height) of a picture to the least (width, height) that its decoding must have.
LeastSize = Callable[[tuple[int, int]], tuple[int, int]]

#: What a picture is decoded from: the path of a file, the bytes of one, a PIL image, or an array (H, W) or (H, W, C)
#: with 1 or 3 channels: uint8 as it is, other integers and floating point by the value range.
Encoded = str | os.PathLike[str] | bytes | Image.Image | Array

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

# Of these an image that Pillow has opened is decoded from the file's content: for drafts, and for PNG's checksums.
_READ_AGAIN = ("JPEG", "MPO", "PNG")

# A PIL image reads its pixels when they are first asked for, and cannot do so in two threads at once; nor can two
# images of one open file. An image may change its file while it reads, so it has a lock of its own, taken first.
_IMAGES, _FILES = (tuple(threading.Lock() for _ in range(64)) for _ in range(2))


def load_image(
    path: str | os.PathLike[str],
    channels: int = 3,
    *,
    value_range: ValueRange | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decode one file completely, every pixel of it.

    Args:
        path: the image file; its content decides the format, not its name.
        channels: 3 gives mode RGB, 1 gives mode L; 8 bits a channel.
        value_range: of files with more than 8 bits, as in `Preprocessing`.
        max_pixels: width times height above which a file is refused before it is decoded; None: `most_pixels()`.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    return load_scaled(path, channels, value_range=value_range, max_pixels=max_pixels)[0]


def load_scaled(
    source: Encoded,
    channels: int = 3,
    least: LeastSize | None = None,
    *,
    name: str = "",
    value_range: ValueRange | None = None,
    keep_grey: bool = False,
    max_pixels: int | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one image to its last byte, at a fraction of its size where the format can and that is enough.

    A PIL image whose pixels have not been read yet gives the same pixels as its file. Any other gives those it has.

    Args:
        source: an image file, its bytes, a PIL image or an array; the content decides the format, not the name.
        channels: 3 gives mode RGB, 1 gives mode L; 8 bits a channel.
        least: how large the picture must stay; None decodes every pixel.
        name: what messages call it; by default the path.
        value_range: of images with more than 8 bits, as in `Preprocessing`.
        keep_grey: leave a grey file in mode L although 3 channels are wanted, all of which would be equal.
        max_pixels: width times height above which a file is refused before it is decoded; None: `most_pixels()`.

    Returns:
        The upright picture, and the (width, height) of the whole one.

    Raises:
        BadDataError: empty, not an image, cut short, damaged, too large, of a value range that is not known, or
            unreadable.
        MissingInputError: there is no such file.
        UsageError: `channels` is not 1 or 3, the limit of pixels is not a number, or Pillow accepts truncated images.
    """
    if channels not in (1, 3):
        raise UsageError(f"images are read with 1 or 3 channels, not {channels!r}")
    with _faults_of(source, name):
        image, whole = _decode(source, max_pixels, least, value_range)
        grey = channels == 1 or (keep_grey and image.mode == "L" and not image.has_transparency_data)
        return in_mode(image, "L" if grey else "RGB"), whole


def image_bounds(source: Encoded, name: str = "", max_pixels: int | None = None) -> Bounds | None:
    """The least and the greatest value of an image with more than 8 bits a channel; None for any other.

    A file with more than 8 bits is decoded to its last byte; of others only the header is read.

    Args:
        source: as in `load_scaled`.
        name: what messages call it; by default the path.
        max_pixels: as in `load_scaled`.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    with _faults_of(source, name):
        if isinstance(source, np.ndarray):
            return bounds_of_values(array_values(source, max_pixels))
        if isinstance(source, Image.Image):
            if not is_wide(source):
                return None
            # The pixels of a copy, so that a picture that was not read yet is later decoded from its file.
            with _lock_of(_IMAGES, source), _lock_of(_FILES, getattr(source, "fp", None) or source):
                content = _unread_file(source, max_pixels, (*_READ_AGAIN, "TIFF", "PPM"))
                if content is None:
                    return bounds_of_values(wide_values(source, None))
            source = content
        with _opened(source) as file:
            if is_array_file(file):
                return bounds_of_values(read_array(file, max_pixels))
            image = _pillow_image(file, max_pixels)
            if not is_wide(image):
                return None
            return bounds_of_values(wide_values(_verified(image, file), file))


def picture_hash(image: Image.Image) -> str:
    """The SHA-256 of a PIL image's pixels, mode, size and orientation; one that was not read yet stays unread."""
    with _lock_of(_IMAGES, image), _lock_of(_FILES, getattr(image, "fp", None) or image):
        content = _unread_file(image, None, _READ_AGAIN)
        read = image if content is None else Image.open(io.BytesIO(content), formats=prepare_decoders())
        read.load()
    about = (read.mode, read.size, _orientation(read), read.getpalette(), read.info.get("transparency"))
    return hashlib.sha256(repr(about).encode() + read.tobytes()).hexdigest()


def image_size(source: Encoded, name: str = "", max_pixels: int | None = None) -> tuple[int, int]:
    """(width, height) of the upright picture; of most formats only the header is read.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with _faults_of(source, name):
        if isinstance(source, Image.Image):
            return _upright_size(source)
        with _opened(source) as file:
            if is_array_file(file):
                height, width = read_array(file, max_pixels).channels.shape[:2]
                return width, height
            return _upright_size(_pillow_image(file, max_pixels))


def image_orientation(source: Encoded, name: str = "") -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 for one that is stored upright.

    Raises:
        BadDataError, MissingInputError, UsageError: as `load_scaled`.
    """
    if isinstance(source, np.ndarray):
        return 1
    with _faults_of(source, name):
        if isinstance(source, Image.Image):
            return _orientation(source)
        with _opened(source) as file:
            return 1 if is_array_file(file) else _orientation(_pillow_image(file, None))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


@contextmanager
def _faults_of(source: Encoded, name: str) -> Iterator[None]:
    """Around what reads an image: every fault of it becomes an error that names it."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set",
            why="Pillow would fill the missing part of damaged images with grey or black",
            fix="PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False",
        )
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    name = name or (quoted_name(path) if path is not None else "that was given")
    if path is not None:
        _require_regular_file(path, name)
    try:
        yield
    except (MemoryError, UsageError):
        raise
    except UnknownRangeError as error:
        raise unknown_range(f"the image {name}", error.bounds) from error
    except Exception as error:  # Pillow's decoders raise nearly every built-in kind on damaged files
        raise _bad(name, _reason(source, error), is_file=path is not None) from error


def prepare_decoders() -> tuple[str, ...]:
    """Load Pillow's format plugins (the first time; unsafe in several threads) and name the formats that are read.

    Of Pillow's own formats the list is closed, because some of the others run external programs. A format for which
    somebody has registered a plug-in with Pillow is read too.
    """
    Image.init()
    own = [name for name in Image.OPEN if name not in _FORMATS and is_registered(name)]
    return (*(name for name in _FORMATS if name in Image.OPEN), *own)


def _require_regular_file(path: str, name: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _bad(name, "a link that leads back to itself") from error
        if os.path.islink(path):
            raise _bad(name, f"a link to {os.readlink(path)!r}, which does not exist") from error
        if isinstance(error, FileNotFoundError):
            close = nearest_existing(Path(path))
            fix = f"did you mean {str(close)!r}?" if close else ""
            raise MissingInputError(f"no such image: {name}", fix=fix) from None
        raise _bad(name, error.strerror or str(error)) from error
    if not stat.S_ISREG(mode):
        raise _bad(name, "a folder" if stat.S_ISDIR(mode) else "not a regular file")


def _decode(
    source: Encoded, max_pixels: int | None, least: LeastSize | None, value_range: ValueRange | None
) -> tuple[Image.Image, tuple[int, int]]:
    """The upright picture, and the (width, height) of the whole one."""
    if isinstance(source, Image.Image):
        return _decode_pil(source, max_pixels, least, value_range)
    if isinstance(source, np.ndarray):
        picture = picture_of_values(array_values(source, max_pixels), value_range)
        return picture, picture.size
    with _opened(source) as file:
        return _decode_file(file, max_pixels, least, value_range)


def _opened(source: str | os.PathLike[str] | bytes) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _decode_file(
    file: IO[bytes], max_pixels: int | None, least: LeastSize | None, value_range: ValueRange | None
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
    return _upright(picture, orientation), (height, width) if orientation in _SIDEWAYS else (width, height)


def _pillow_image(file: IO[bytes], max_pixels: int | None) -> Image.Image:
    """The image of a file, its header read and no pixel decoded."""
    most_pixels()  # Pillow itself refuses twice as many
    image = Image.open(file, formats=prepare_decoders())
    require_size(*image.size, max_pixels)
    refuse_misread(image)
    return image


def _verified(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """The image again, after the checksums of its pixels: Pillow skips those of PNG when it decodes them."""
    if image.format != "PNG":
        return image
    image.verify()
    file.seek(0)
    return Image.open(file, formats=("PNG",))


def _decode_pil(
    image: Image.Image, max_pixels: int | None, least: LeastSize | None, value_range: ValueRange | None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `_decode`, of an image that the user goes on using: its size and mode stay what they are."""
    with _lock_of(_IMAGES, image), _lock_of(_FILES, getattr(image, "fp", None) or image):
        wide = value_range != "format" and is_wide(image)
        content = _unread_file(image, max_pixels, (*_READ_AGAIN, "TIFF", "PPM") if wide else _READ_AGAIN)
        if content is None or not (wide or isinstance(image, JpegImageFile)):
            if content is not None and image.format == "PNG":
                Image.open(io.BytesIO(content), formats=("PNG",)).verify()
            picture = picture_of_values(wide_values(image, None), value_range) if wide else image
            image.load()
            made = _upright(picture, _orientation(image))
            return made, made.size
        if wide:
            image.load()  # Pillow then closes the file that it has opened
        elif isinstance(image, JpegImageFile) and image.filename and image.format == "JPEG":
            # Pillow has opened the file, and would close it when it has read the pixels of this, its only picture.
            file, image.fp = image.fp, io.BytesIO(content)
            assert file is not None
            file.close()
    return _decode_file(io.BytesIO(content), max_pixels, least, value_range)


def _lock_of(locks: tuple[threading.Lock, ...], owner: object) -> threading.Lock:
    return locks[id(owner) // 64 % len(locks)]


def _unread_file(image: Image.Image, max_pixels: int | None, formats: tuple[str, ...]) -> bytes | None:
    """The content of the file of an image in one of some formats whose pixels have not been read; None of any other."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return None
    if image.fp is None or image.fp.closed:
        raise ValueError("the image was closed before its pixels were read; call image.load() while it is open")
    require_size(*image.size, max_pixels)
    if image.format not in formats or image.tell() or image.decoderconfig:
        return None  # the user has chosen another frame, or with a draft another size or mode
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return content


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


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


def _bad(name: str, reason: str, *, is_file: bool = True) -> BadDataError:
    fix = 'replace or remove the file; on_bad_image="skip" trains without such files'
    return BadDataError(f"cannot read the image {name}", why=reason, fix=fix if is_file else "")


def _reason(source: Encoded, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError) and isinstance(source, (str, os.PathLike, bytes)):
        with _opened(source) as file:
            head = file.read(512)
        start = head.lstrip().lower()
        if not start:
            return "the file holds only white space" if head else "the file is empty"
        if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<body")):
            return "a web page (HTML or XML), not an image"
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"decompression bomb: {error} PIL.Image.MAX_IMAGE_PIXELS or ${PIXELS_VARIABLE} allows more"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    return f"cut short: {text}" if "truncated" in text.lower() else text
