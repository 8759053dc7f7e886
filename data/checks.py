"""What is looked at before training: every image decoded once, and files that are in two parts of the data.

A file that was decoded without fault is remembered by path, size and time of change, and not read again; so are the
least and the greatest value of one with more than 8 bits a channel. A JPEG has no checksum: one whose bits have changed
may decode to other pixels without an error. That is not found here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import PIL

from flashtask._version import __version__
from flashtask.core.errors import BadDataError, MissingInputError, UsageError, did_you_mean
from flashtask.core.known_files import known_notes, remember_notes
from flashtask.core.names import quoted_name
from flashtask.core.preprocessing import ValueRange
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.images import load_image, prepare_decoders
from flashtask.data.value_range import Bounds, why_unknown

__all__ = [
    "BAD_IMAGE_POLICIES",
    "BadImage",
    "Looked",
    "check_policy",
    "describe",
    "find_bad_images",
    "find_leaks",
    "look_at_images",
    "refuse_bad",
]

#: What `on_bad_image` may be: refuse the data, or leave bad images out and say so.
BAD_IMAGE_POLICIES = ("error", "skip")

#: Files that a message names at the most.
_SHOWN = 1000
_CHUNK = 2048


class BadImage(NamedTuple):
    """A file that cannot be used, and why."""

    path: str
    reason: str


def check_policy(on_bad_image: object) -> None:
    """Refuse what is not one of BAD_IMAGE_POLICIES.

    Raises:
        UsageError: it is not.
    """
    if on_bad_image not in BAD_IMAGE_POLICIES:
        raise UsageError(
            f"on_bad_image must be error or skip, not {on_bad_image!r}",
            fix=did_you_mean(str(on_bad_image), BAD_IMAGE_POLICIES) or 'on_bad_image="error"',
        )


class Looked(NamedTuple):
    """What `look_at_images` found.

    Args:
        bad: the files that cannot be used, in the order of the paths.
        bounds: by path, the least and the greatest value of each file with more than 8 bits a channel.
    """

    bad: list[BadImage]
    bounds: dict[str, Bounds]


def look_at_images(
    paths: Sequence[str],
    channels: int = 3,
    read: Callable[[str], object] | None = None,
    value_range: ValueRange | None = None,
    images: ImageSource = FILES,
) -> Looked:
    """Decode every file completely, in threads: which are bad, and which values those of more than 8 bits have.

    Files that were found good before, and have not changed since, are not read; bad ones are read each time.

    Args:
        paths: image files, or the names that `images` has for pictures.
        channels: as the images will be read.
        read: what decodes a picture of 8 bits, if it is to be kept; by default `load_image` with these channels.
        value_range: with `format`, files of more than 8 bits are read like others, and no bounds are looked for.
        images: where the pictures are read.
    """
    read = read or (lambda path: load_image(path, channels, value_range=value_range))
    measures = value_range != "format"
    how = "with bounds" if measures else "by the range of the format"
    check = f"decodes to {channels} channels, {how}: pillow {PIL.__version__}, flashtask {__version__}"
    check += images.description or ""
    stamps = images.stamps(paths)
    notes = known_notes(stamps, check)
    unknown = [path for path in dict.fromkeys(paths) if path not in notes]
    bad: list[BadImage] = []
    if unknown:
        prepare_decoders()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # In chunks, so that Ctrl-C does not wait for a million queued files, and what was found is not lost.
        for start in range(0, len(unknown), _CHUNK):
            chunk = unknown[start : start + _CHUNK]
            found = dict(zip(chunk, pool.map(lambda path: _look(path, read, measures, images), chunk), strict=True))
            bad += [one for one in found.values() if isinstance(one, BadImage)]
            good = {path: note for path, note in found.items() if isinstance(note, str)}
            remember_notes(stamps, check, good)
            notes |= good
    return Looked(bad, {path: _as_bounds(notes[path]) for path in paths if notes.get(path)})


def _look(path: str, read: Callable[[str], object], measures: bool, images: ImageSource) -> str | BadImage:
    """The note on a good picture: its bounds, or nothing for one of 8 bits."""
    if measures:
        with suppress(BadDataError, MissingInputError):  # reading it says why
            bounds = images.input(path).bounds()
            if bounds is not None:
                return f"{bounds[0]!r} {bounds[1]!r}"
    try:
        read(path)
    except BadDataError as error:
        return BadImage(path, error.why)
    except MissingInputError:
        return BadImage(path, "the file does not exist")
    return ""


def _as_bounds(note: str) -> Bounds:
    low, high = note.split()
    return float(low), float(high)


def find_bad_images(
    paths: Sequence[str],
    channels: int = 3,
    read: Callable[[str], object] | None = None,
    *,
    value_range: ValueRange | None = None,
) -> list[BadImage]:
    """Decode every file completely, in threads, and return all that cannot be used, in the order of `paths`.

    Args:
        paths: image files.
        channels: as the images will be read.
        read: as in `look_at_images`.
        value_range: of files with more than 8 bits, as in `Preprocessing`; without one they cannot be used.
    """
    looked = look_at_images(paths, channels, read, value_range)
    if value_range is not None:
        return looked.bad
    wide = [BadImage(path, why_unknown(bounds)) for path, bounds in looked.bounds.items()]
    order = {path: place for place, path in enumerate(paths)}
    return sorted(looked.bad + wide, key=lambda image: order[image.path])


def refuse_bad(bad: list[BadImage], count: int) -> None:
    """Refuse images among which some are bad.

    Args:
        bad: those, which may be none.
        count: of all images.

    Raises:
        BadDataError: naming up to 1,000 with their reasons and the number of all. Its `bad_images` holds every one.
    """
    if bad:
        error = BadDataError(
            f"{len(bad)} of {count} images cannot be read",
            why="\n    ".join(["nothing was trained; the files are:", *describe(bad)]),
            fix='replace or remove them, or leave them out with on_bad_image="skip"',
        )
        error.bad_images = bad  # type: ignore[attr-defined]
        raise error


def describe(bad: Sequence[BadImage], most: int = _SHOWN) -> list[str]:
    """One line a file, the first so many, and how many more there are."""
    shown = bad[:most]
    lines = [f"{quoted_name(image.path)}: {image.reason}" for image in shown]
    return lines + ([f"... and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else [])


def find_leaks(train: Sequence[str], other: Sequence[str], images: ImageSource = FILES) -> list[tuple[str, str]]:
    """Find pictures whose content (sha256) is in both: pairs (in `other`, in `train`), in the order of `other`.

    Only files of a size that occurs on both sides are read, and those once until they change. Files that cannot be
    read are left to `look_at_images`.
    """
    ours, theirs = images.sizes(train), images.sizes(other)
    common = set(ours.values()) & set(theirs.values())
    suspects = [path for path, size in theirs.items() if size in common]
    known = [path for path, size in ours.items() if size in common]
    first = dict(zip(images.hashes(known[::-1]), known[::-1], strict=True))
    found = dict(zip(suspects, images.hashes(suspects), strict=True))
    return [(path, first[found[path]]) for path in other if found.get(path) in first]
