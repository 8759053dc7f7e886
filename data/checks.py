"""What is looked at before training: every image decoded once, and files that are in two parts of the data.

A file that was decoded without fault is remembered by path, size and time of change, and not read again. A JPEG has no
checksum: one whose bits have changed may decode to other pixels without an error. That is not found here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import PIL

from flashtask._version import __version__
from flashtask.core.errors import BadDataError, MissingInputError, UsageError, did_you_mean
from flashtask.core.known_files import content_hashes, known_sound, remember_sound, stamps_of
from flashtask.core.names import quoted_name
from flashtask.data.images import load_image, prepare_decoders

__all__ = [
    "BAD_IMAGE_POLICIES",
    "BadImage",
    "check_images",
    "check_policy",
    "describe",
    "find_bad_images",
    "find_leaks",
]

#: What `on_bad_image` may be: refuse the data, or leave bad images out and say so.
BAD_IMAGE_POLICIES = ("error", "skip")

_SHOWN = 20
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


def find_bad_images(
    paths: Sequence[str], channels: int = 3, read: Callable[[str], object] | None = None
) -> list[BadImage]:
    """Decode every file completely, in threads, and return all that fail, in the order of `paths`.

    Files that were found good before, and have not changed since, are not read; bad ones are read each time.

    Args:
        paths: image files.
        channels: as the images will be read.
        read: what decodes a file, if it is to be kept; by default `load_image` with these channels.
    """
    read = read or (lambda path: load_image(path, channels))
    check = f"decodes to {channels} channels: pillow {PIL.__version__}, flashtask {__version__}"
    stamps = stamps_of(paths)
    known = known_sound(stamps, check)
    unknown = [path for path in paths if path not in known]
    if not unknown:
        return []
    prepare_decoders()
    bad: list[BadImage] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # In chunks, so that Ctrl-C does not wait for a million queued files, and what was found is not lost.
        for start in range(0, len(unknown), _CHUNK):
            reasons = list(pool.map(lambda path: _fault(path, read), chunk := unknown[start : start + _CHUNK]))
            bad += [BadImage(p, r) for p, r in zip(chunk, reasons, strict=True) if r is not None]
            good = [p for p, r in zip(chunk, reasons, strict=True) if r is None and p in stamps]
            remember_sound({path: stamps[path] for path in good}, check)
    return bad


def check_images(
    paths: Sequence[str], on_bad_image: str = "error", channels: int = 3, read: Callable[[str], object] | None = None
) -> list[BadImage]:
    """Decode every file, and refuse or report all bad ones at once.

    Args:
        paths: image files.
        on_bad_image: `error` raises if any is bad; `skip` returns them.
        channels: as the images will be read.
        read: as in `find_bad_images`.

    Returns:
        The bad files, for the caller to leave out and to report.

    Raises:
        BadDataError: with `error`, naming the first 20 with their reasons and the number of all. Its
            `bad_images` holds every one.
        UsageError: an unknown policy.
    """
    check_policy(on_bad_image)
    bad = find_bad_images(paths, channels, read)
    if bad and on_bad_image == "error":
        error = BadDataError(
            f"{len(bad)} of {len(paths)} images cannot be read",
            why="\n    ".join(["nothing was trained; the files are:", *describe(bad)]),
            fix='replace or remove them, or leave them out with on_bad_image="skip"',
        )
        error.bad_images = bad  # type: ignore[attr-defined]
        raise error
    return bad


def describe(bad: Sequence[BadImage]) -> list[str]:
    """One line a file, the first 20, and how many more there are."""
    lines = [f"{quoted_name(image.path)}: {image.reason}" for image in bad[:_SHOWN]]
    return lines + ([f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else [])


def find_leaks(train: Iterable[str], other: Iterable[str]) -> list[tuple[str, str]]:
    """Find files whose content (sha256) is in both: pairs (in `other`, in `train`), in the order of `other`.

    Only files of a size that occurs on both sides are read, and those once until they change. Files that cannot be
    read are left to `check_images`.
    """
    ours, theirs = _by_size(train), _by_size(other)
    common = ours.keys() & theirs.keys()
    known, suspects = _by_path(ours, common), _by_path(theirs, common)
    first = {content: path for path, content in reversed(known.items())}
    return [(path, first[suspects[path]]) for path in other if suspects.get(path) in first]


def _fault(path: str, read: Callable[[str], object]) -> str | None:
    try:
        read(path)
    except BadDataError as error:
        return error.why
    except MissingInputError:
        return "the file does not exist"
    return None


def _by_size(paths: Iterable[str]) -> dict[int, list[str]]:
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            sizes[os.path.getsize(path)].append(path)
    return sizes


def _by_path(by_size: dict[int, list[str]], sizes: Iterable[int]) -> dict[str, str]:
    """The hashes of the files of these sizes."""
    paths = [path for size in sizes for path in by_size[size]]
    return dict(zip(paths, content_hashes(paths), strict=True))
