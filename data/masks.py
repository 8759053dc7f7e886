"""Masks as data has them: files of class numbers or colours, arrays, polygons and run lengths of COCO.

In a table a mask is a text: the path of a file, an address of the form `data:image/png;base64,...` for an array that
was in memory, or JSON with the regions of COCO. So tables stay plain columns, which processes share.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from flashtask._version import __version__
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.known_files import known_notes, remember_notes, stamps_of
from flashtask.core.names import quoted_name

__all__ = ["MaskContent", "as_mask_text", "default_colours", "look_at_masks", "overlay", "read_mask", "regions_text"]
__all__ += ["compressed", "draw_polygon", "rle_counts", "rle_mask", "run_lengths"]

_DATA = "data:image/png;base64,"
#: Different values of a mask, above which it holds no classes.
_MOST_VALUES = 256
_SHOWN = 8
#: Pixels of an enlarged polygon in one pixel, along each side; odd, so that one of them is the middle.
_FINER = 5


@dataclass(frozen=True)
class MaskContent:
    """What a mask holds.

    Args:
        size: (width, height).
        counts: pixels of each value: a class number, or a colour as 0xRRGGBB.
        is_colour: whether the values are colours.
        palette: the colours of numbers, as 0xRRGGBB, if the file has them.
    """

    size: tuple[int, int]
    counts: Mapping[int, int]
    is_colour: bool = False
    palette: tuple[int, ...] = ()

    def to_note(self) -> str:
        """The text that `from_note` reads."""
        return json.dumps([self.size, list(self.counts.items()), self.is_colour, self.palette])

    @classmethod
    def from_note(cls, note: str) -> MaskContent:
        """What `to_note` wrote."""
        size, counts, is_colour, palette = json.loads(note)
        return cls((size[0], size[1]), dict(counts), is_colour, tuple(palette))


def read_mask(text: str) -> tuple[np.ndarray[Any, Any], bool, tuple[int, ...]]:
    """The values (H, W) of a mask, whether they are colours (0xRRGGBB), and the palette of its file.

    Raises:
        BadDataError: it is not there, cannot be read, or is a JPEG, whose values are not exact.
    """
    if text.startswith("{"):
        return _drawn_regions(json.loads(text)), False, ()
    source: Any = io.BytesIO(base64.b64decode(text[len(_DATA) :])) if text.startswith(_DATA) else text
    try:
        if isinstance(source, str) and source.lower().endswith(".npy"):
            return _as_numbers(np.load(source, allow_pickle=False)), False, ()
        with Image.open(source) as image:
            if image.format == "JPEG":
                raise BadDataError(f"{_named(text)} is a JPEG, which does not keep values exactly", fix="use PNG")
            return _values_of(image)
    except FileNotFoundError:
        raise BadDataError(f"the mask does not exist: {_named(text)}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadDataError(f"cannot read the mask {_named(text)}", why=str(error)) from None


def _named(text: str) -> str:
    return "in memory" if text.startswith(("{", _DATA)) else quoted_name(text)


def _values_of(image: Image.Image) -> tuple[np.ndarray[Any, Any], bool, tuple[int, ...]]:
    if image.mode == "P":
        flat = np.array(image.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
        return np.array(image), False, tuple((flat @ [65536, 256, 1]).tolist())
    if image.mode in ("RGB", "RGBA"):
        pixels = np.array(image.convert("RGB")).astype(np.int32)
        if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all():
            return pixels[..., 0], False, ()  # grey, saved in three channels
        return pixels @ np.array([65536, 256, 1], dtype=np.int32), True, ()
    if image.mode == "1":
        return np.array(image).astype(np.uint8), False, ()
    return _as_numbers(np.array(image.convert("L") if image.mode == "LA" else image)), False, ()


def _as_numbers(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A mask (H, W) of whole numbers of 0 or more, as int32.

    Raises:
        ValueError: something else.
    """
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), not {values.shape}")
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise ValueError("its values are not whole numbers")
    if values.size and (values.min() < 0 or values.max() >= 2**31):
        raise ValueError("its values are not numbers of classes")
    return values.astype(np.int32)


def as_mask_text(mask: Any) -> str:
    """A mask in memory, (H, W) of whole numbers or (H, W, 3) of colours, or a path, as a table has it.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(mask, (str, os.PathLike)):
        return os.path.abspath(mask)
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy()
    try:
        if isinstance(mask, Image.Image):
            image = mask
        elif (values := np.asarray(mask)).ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
            image = Image.fromarray(values)
        else:
            numbers = _as_numbers(values[0] if values.ndim == 3 and values.shape[0] == 1 else values)
            is_small = not numbers.size or numbers.max() < 256
            image = Image.fromarray(numbers.astype(np.uint8) if is_small else numbers.astype(np.uint16))
    except (TypeError, ValueError) as error:
        raise UsageError("a mask must be an array (H, W) of whole numbers", why=str(error)) from None
    held = io.BytesIO()
    image.save(held, "PNG", compress_level=1)
    return _DATA + base64.b64encode(held.getvalue()).decode()


def look_at_masks(texts: Sequence[str]) -> dict[str, MaskContent | BadDataError]:
    """What each mask holds, or why it cannot be read; files that have not changed since are not read again."""
    check = f"values of a mask: pillow {PIL.__version__}, flashtask {__version__}"
    stamps = stamps_of([text for text in dict.fromkeys(texts) if not text.startswith(("{", _DATA))])
    found: dict[str, MaskContent | BadDataError] = {
        text: MaskContent.from_note(note) for text, note in known_notes(stamps, check).items()
    }
    unknown = [text for text in dict.fromkeys(texts) if text not in found]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        fresh = dict(zip(unknown, pool.map(_look, unknown), strict=True))
    remember_notes(stamps, check, {text: one.to_note() for text, one in fresh.items() if isinstance(one, MaskContent)})
    return found | fresh


def _look(text: str) -> MaskContent | BadDataError:
    try:
        values, is_colour, palette = read_mask(text)
    except BadDataError as error:
        return error
    different, counts = np.unique(values, return_counts=True)
    if len(different) > _MOST_VALUES:
        return BadDataError(
            f"{_named(text)} has {len(different):,} different values, more than there can be classes",
            why="it may number objects, or be a photograph",
            fix="write masks with a number for each class, or --task instance_segmentation",
        )
    numbers = dict(zip(different.tolist(), counts.tolist(), strict=True))
    return MaskContent((values.shape[1], values.shape[0]), numbers, is_colour, palette)


# ---- COCO


def regions_text(size: tuple[int, int], regions: Sequence[tuple[int, Any]]) -> str:
    """A mask of regions, as a table has it; later ones lie over earlier ones, and 0 is beside all.

    Args:
        size: (width, height).
        regions: class numbers with what COCO calls `segmentation`: polygons, or run lengths.
    """
    return json.dumps({"size": size, "regions": regions})


def _drawn_regions(content: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    width, height = content["size"]
    values = np.zeros((height, width), dtype=np.int32)
    for number, segmentation in content["regions"]:
        if isinstance(segmentation, Mapping):
            values[rle_mask(segmentation["counts"], (width, height))] = number
            continue
        for polygon in segmentation:
            draw_polygon(values, np.array(polygon, dtype=np.float64).reshape(-1, 2), number)
    return values


def draw_polygon(values: np.ndarray[Any, Any], points: np.ndarray[Any, Any], number: int) -> None:
    """Give a number to the pixels whose middle lies in a polygon (N, 2).

    Pillow fills all that an edge touches, so it draws an enlarged polygon, of which the middles are looked up.
    """
    limits = values.shape[::-1]
    first = np.clip(np.floor(points.min(axis=0)), 0, limits).astype(int)
    last = np.clip(np.ceil(points.max(axis=0)), 0, limits).astype(int)
    width, height = (last - first).tolist()
    if not width or not height:
        return
    drawn = Image.new("1", (width * _FINER, height * _FINER))
    ImageDraw.Draw(drawn).polygon(((points - first) * _FINER - 0.5).ravel().tolist(), fill=1)
    middles = np.array(drawn)[_FINER // 2 :: _FINER, _FINER // 2 :: _FINER]
    values[first[1] : last[1], first[0] : last[0]][middles] = number


def rle_mask(counts: str | Sequence[int], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The region (H, W) of COCO's run lengths: down the columns, zeros first.

    Args:
        counts: numbers, or their compressed text.
        size: (width, height).

    Raises:
        BadDataError: they are not of such a region.
    """
    numbers = run_lengths(counts, size)
    flat = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers)
    return flat.reshape(size).T


def run_lengths(counts: str | Sequence[int], size: tuple[int, int]) -> list[int]:
    """The numbers of pixels of a region, outside and inside in turn.

    Raises:
        BadDataError: they are not of a picture of this (width, height).
    """
    numbers = _uncompressed(counts) if isinstance(counts, str) else list(counts)
    if any(number < 0 for number in numbers) or sum(numbers) != size[0] * size[1]:
        raise BadDataError(f"run lengths of {sum(numbers):,} pixels do not fit an image of {size[0]} x {size[1]}")
    return numbers


def rle_counts(region: np.ndarray[Any, Any], before: int = 0, after: int = 0) -> str:
    """The compressed run lengths of a region (H, W), as COCO writes them.

    Args:
        region: bool.
        before: pixels outside that come before, where the region is some columns of a picture.
        after: pixels that come after.
    """
    flat = np.concatenate([[False], region.T.ravel(), [False]])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
    numbers = np.diff(np.concatenate([[0], edges, [region.size]])).tolist()
    numbers[0] += before
    numbers[-1] += after
    return compressed(numbers)


def compressed(numbers: Sequence[int]) -> str:
    """COCO's text of run lengths; a last one of no pixels is left out."""
    numbers = numbers[:-1] if len(numbers) > 1 and numbers[-1] == 0 else numbers
    letters = []
    for place, number in enumerate(numbers):
        rest = number - (numbers[place - 2] if place > 2 else 0)
        while True:
            part, rest = rest & 31, rest >> 5
            is_last = rest == (-1 if part & 16 else 0)
            letters.append(chr(48 + (part if is_last else part | 32)))
            if is_last:
                break
    return "".join(letters)


def _uncompressed(text: str) -> list[int]:
    numbers: list[int] = []
    number = shift = 0
    for letter in text:
        part = ord(letter) - 48
        number |= (part & 31) << shift
        shift += 5
        if not part & 32:
            if part & 16:
                number -= 1 << shift
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number = shift = 0
    return numbers


# ---- pictures


def default_colours(count: int) -> tuple[str, ...]:
    """Colours of so many classes, `#rrggbb`: those of Pascal VOC, of which the first is black."""
    found = []
    for number in range(count):
        parts, rest = [0, 0, 0], number
        for bit in range(7, -1, -1):
            for channel in range(3):
                parts[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        found.append("#{:02x}{:02x}{:02x}".format(*parts))
    return tuple(found)


def overlay(
    image: Image.Image,
    classes: np.ndarray[Any, Any],
    labels: Sequence[str],
    colours: Sequence[str],
    *,
    has_legend: bool = True,
) -> Image.Image:
    """A picture with classes in colours, their borders drawn, and a legend of those that occur below it.

    Classes whose colour is black are not tinted: they are the background. What belongs to no class is darkened.

    Args:
        image: any size.
        classes: (H, W) numbers of classes; it is stretched over the picture.
        labels: by number.
        colours: by number, `#rrggbb`.
        has_legend: whether there is one.
    """
    size = image.size
    if classes.shape != size[::-1]:
        classes = np.array(Image.fromarray(classes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    table = np.zeros((256, 3), dtype=np.float32)
    for number, colour in enumerate(colours):
        table[number] = tuple(bytes.fromhex(colour[1:]))
    strength = np.full(256, 0.5, dtype=np.float32)
    strength[: len(colours)] = [0.0 if colour == "#000000" else 0.4 for colour in colours]
    borders = np.zeros(classes.shape, dtype=bool)
    borders[:-1] |= classes[:-1] != classes[1:]
    borders[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    share = np.where(borders & (strength[classes] > 0), 1.0, strength[classes])[..., None]
    pixels = np.array(image.convert("RGB"), dtype=np.float32) * (1 - share) + table[classes] * share
    made = Image.fromarray(pixels.round().astype(np.uint8))
    there = np.bincount(classes.ravel(), minlength=256)[: len(labels)] / max(1, classes.size)
    lines = [(labels[number], colours[number], there[number]) for number in np.argsort(-there) if there[number]]
    return _with_legend(made, lines[:_SHOWN]) if has_legend else made


def _with_legend(image: Image.Image, lines: Sequence[tuple[str, str, float]]) -> Image.Image:
    text = max(12, image.height // 24)
    row, font = round(1.4 * text), ImageFont.load_default(text)
    made = Image.new("RGB", (image.width, image.height + row * len(lines) + 6), "white")
    made.paste(image)
    pen = ImageDraw.Draw(made)
    for number, (label, colour, share) in enumerate(lines):
        top = image.height + 4 + row * number
        pen.rectangle((4, top, 4 + text, top + text), fill=colour, outline="black")
        pen.text((10 + text, top - text * 0.1), f"{label}  {share:.1%}", "black", font)
    return made
