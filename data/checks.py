"""What is looked at before training: every image decoded once, and files that are in two parts of the data.

A file that was decoded without fault is remembered by path, size and time of change, and not read again; so are its
fingerprint, and the least and the greatest value of one with more than 8 bits a channel. A JPEG has no checksum: one
whose bits have changed may decode to other pixels without an error. That is not found here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import PIL

from flashtask._version import __version__
from flashtask.core.errors import BadDataError, FlashtaskError, MissingInputError, UsageError, did_you_mean
from flashtask.core.known_files import known_notes, remember_notes
from flashtask.core.names import quoted_name
from flashtask.core.preprocessing import ValueRange
from flashtask.data.decoding import Decoding, Seen
from flashtask.data.fingerprint import Fingerprint, fingerprint
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.images import prepare_decoders
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
    "reason_of",
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
        fingerprints: of the other files, by path; empty if they were not asked for.
    """

    bad: list[BadImage]
    bounds: dict[str, Bounds]
    fingerprints: dict[str, Fingerprint]


#: Decodes one file of 8 bits and shows the picture to its second argument.
Read = Callable[[str, Seen | None], object]


def look_at_images(
    paths: Sequence[str],
    channels: int = 3,
    read: Read | None = None,
    value_range: ValueRange | None = None,
    images: ImageSource = FILES,
    *,
    measures: bool = True,
) -> Looked:
    """Decode every file completely, in threads: which are bad, what do they look like, which values do wide ones have.

    Files that were found good before, and have not changed since, are not read; bad ones are read each time.

    Args:
        paths: image files, or the names that `images` has for pictures.
        channels: as the images will be read.
        read: what decodes a picture of 8 bits, if it is to be kept; by default all of its pixels, which are dropped.
        value_range: with `format`, files of more than 8 bits are read like others, and no bounds are looked for.
        images: where the pictures are read.
        measures: also take the fingerprints of pictures of 8 bits.
    """
    decoding = Decoding(channels, value_range=value_range)
    read = read or (lambda path, seen: images.input(path).read(decoding, seen=seen))
    finds_bounds = value_range != "format"
    how = f"{'with bounds' if finds_bounds else 'by the range of the format'}, what it looks like, how sharp it is"
    check = f"decodes to {channels} channels, {how}: pillow {PIL.__version__}, flashtask {__version__}"
    check += images.description or ""
    stamps = images.stamps(paths)
    notes = {path: note.split("|") for path, note in known_notes(stamps, check).items()}
    unknown = [path for path in dict.fromkeys(paths) if path not in notes or (measures and notes[path] == ["", ""])]
    bad: list[BadImage] = []
    if unknown:
        prepare_decoders()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # In chunks, so that Ctrl-C does not wait for a million queued files, and what was found is not lost.
        for start in range(0, len(unknown), _CHUNK):
            chunk = unknown[start : start + _CHUNK]
            look = partial(_look, read=read, images=images, finds_bounds=finds_bounds, measures=measures)
            found = dict(zip(chunk, pool.map(look, chunk), strict=True))
            bad += [one for one in found.values() if isinstance(one, BadImage)]
            good = {path: note for path, note in found.items() if isinstance(note, list)}
            remember_notes(stamps, check, {path: "|".join(note) for path, note in good.items()})
            notes |= good
    known = {path: notes[path] for path in paths if path in notes}
    bounds = {path: _as_bounds(first) for path, (first, _) in known.items() if first}
    return Looked(bad, bounds, {path: Fingerprint.from_note(second) for path, (_, second) in known.items() if second})


def _look(path: str, read: Read, images: ImageSource, finds_bounds: bool, measures: bool) -> list[str] | BadImage:
    """The note on a good picture: the bounds of one with more than 8 bits, and the fingerprint of any other."""
    if finds_bounds:
        with suppress(BadDataError, MissingInputError):  # reading it says why
            bounds = images.input(path).bounds()
            if bounds is not None:
                return [f"{bounds[0]!r} {bounds[1]!r}", ""]
    taken: list[Fingerprint] = []
    try:
        read(path, (lambda picture, whole: taken.append(fingerprint(picture, whole))) if measures else None)
    except (BadDataError, MissingInputError) as error:
        return BadImage(path, reason_of(error))
    return ["", taken[0].to_note() if taken else ""]


def reason_of(error: FlashtaskError) -> str:
    """Why a picture cannot be had, in one line that need not name it.

    Args:
        error: of reading it.
    """
    if isinstance(error, MissingInputError):
        return "the file does not exist"
    if isinstance(error, BadDataError):
        return error.why or error.what
    return f"{error.what}: {error.why}" if error.why else error.what


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
        read: what decodes a file of 8 bits, if it is to be kept.
        value_range: of files with more than 8 bits, as in `Preprocessing`; without one they cannot be used.
    """
    reads = None if read is None else lambda path, seen: read(path)
    looked = look_at_images(paths, channels, reads, value_range, measures=False)
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
