"""The range of pixel values of images with more than 8 bits a channel: found, suggested, and said."""

from __future__ import annotations

from collections.abc import Iterable

from flashtask.core.errors import BadDataError
from flashtask.core.preprocessing import ValueRange

__all__ = ["Bounds", "about_another_scale", "about_range", "joined_bounds", "range_of_bounds", "suggested_range"]
__all__ += ["unknown_range"]

#: The least and the greatest value of an image, or of several.
Bounds = tuple[float, float]


def joined_bounds(all_bounds: Iterable[Bounds]) -> Bounds:
    """The least and the greatest value of several images."""
    lows, highs = zip(*all_bounds, strict=True)
    return min(lows), max(highs)


def suggested_range(bounds: Bounds) -> Bounds:
    """The range that values of these bounds most likely have: that of a whole number of bits, or 0 to 1."""
    low, high = bounds
    if low < 0:
        return bounds
    return (0, 1) if high <= 1 else (0, 2 ** max(8, int(high).bit_length()) - 1)


def range_of_bounds(bounds: Bounds, example: str) -> Bounds:
    """The bounds as a range.

    Args:
        bounds: of all images.
        example: one of them, for the message.

    Raises:
        BadDataError: all values are the same.
    """
    if bounds[0] < bounds[1]:
        return bounds
    raise BadDataError(
        f"every pixel of the training images with more than 8 bits is {bounds[0]:g}, such as in {example!r}",
        why="there is no range of values to scale",
        fix="value_range=(0, 4095), if the images are correct",
    )


def about_range(found: Bounds, used: ValueRange, wide: int, images: int) -> str:
    """One line on the range that is used.

    Args:
        found: over the training images.
        used: what is scaled to 0..255.
        wide: training images with more than 8 bits a channel.
        images: training images.
    """
    which = f"the {images:,} training images have" if wide == images else f"{wide:,} of {images:,} training images have"
    start = f"{which} more than 8 bits a channel: "
    rest = "" if wide == images else "; the others are read as they are"
    if used == found:
        low, high = suggested_range(found)
        return f"{start}values {_shown(found)} are scaled to 0..255{rest}; value_range=({low:g}, {high:g}) sets it"
    assert isinstance(used, tuple)
    beyond = ", and what is outside is clipped" if found[0] < used[0] or found[1] > used[1] else ""
    return f"{start}values {_shown(found)}; the model's range {_shown(used)} is scaled to 0..255{beyond}{rest}"


def about_another_scale(part: str, found: Bounds, used: ValueRange | None) -> str:
    """A warning if the images of a part have values on another scale than those that the range is of; else nothing.

    Args:
        part: `val`.
        found: over its images.
        used: what is scaled to 0..255.
    """
    if not isinstance(used, tuple):
        return ""
    low, high = used
    span = high - low
    if found[1] > high + span or found[0] < low - span:
        what = "most of them are black or white"
    elif found[1] < low + span / 64:
        what = "all of them are nearly black"
    else:
        return ""
    return f"warning: the {part} images have values {_shown(found)}, and {_shown(used)} is scaled to 0..255, so {what}"


def unknown_range(what: str, bounds: Bounds) -> BadDataError:
    """The error about an image whose range of values nobody has said.

    Args:
        what: `the image 'a.png'`.
        bounds: of its values.
    """
    low, high = suggested_range(bounds)
    return BadDataError(
        f"cannot read {what}",
        why=why_unknown(bounds),
        fix=f"from_folders(..., value_range=({low:g}, {high:g})); for a model that is trained already: "
        f"model.preprocessing = dataclasses.replace(model.preprocessing, value_range=({low:g}, {high:g}))",
    )


def why_unknown(bounds: Bounds) -> str:
    """Why an image cannot be read without a range."""
    low, high = suggested_range(bounds)
    shown = _shown(bounds)
    return f"more than 8 bits a channel (values {shown}), and no value range is known: --value-range {low:g},{high:g}"


def _shown(bounds: Bounds) -> str:
    return f"{bounds[0]:,.6g} to {bounds[1]:,.6g}"
