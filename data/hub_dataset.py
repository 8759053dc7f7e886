"""Dataset repositories of the hub: which of their files hold the data, and what each of these is for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.snapshot import fetch, list_files
from flashtask.data.layout import is_image_name, part_in_name

__all__ = ["HubDataset", "fetch_dataset"]

_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
#: The most that a data set may hold, in bytes.
_MOST_BYTES = 256 * 2**30


@dataclass(frozen=True)
class HubDataset:
    """What was fetched: tables by part, or a folder of images.

    Args:
        tables: part -> files; a part may have several Parquet files.
        folder: that holds class folders, or `train/` and others with these; None for tables.
    """

    tables: dict[str, tuple[Path, ...]]
    folder: Path | None


def fetch_dataset(repository: str, revision: str | None) -> HubDataset:
    """Fetch the data of a repository: its Parquet files, else other tables, else its images.

    Args:
        repository: `org/name`, or an address such as `hf://datasets/org/name@main`.
        revision: a branch, tag or commit, if the address has none.

    Raises:
        UsageError: an invalid name, or two revisions.
        BadDataError: the repository holds neither tables nor images.
        HubError, IntegrityError, StorageError: as `core.hub.snapshot.fetch`.
    """
    given = HubAddress.parse(repository)
    if revision is not None and given.revision not in (None, revision):
        raise UsageError(f"two revisions: {given} and {revision!r}", fix="give one of them")
    address = HubAddress(given.repository, given.revision or revision, "dataset")
    listing = list_files(address)
    address = replace(address, revision=listing.commit)
    names = sorted(listing.files)
    images = [name for name in names if is_image_name(name)]
    for ending in _TABLES:
        if tables := [name for name in names if name.lower().endswith(ending)]:
            folder = fetch(address, [*tables, *images], max_bytes=_MOST_BYTES).folder
            return HubDataset(
                {part: tuple(folder / name for name in of) for part, of in _by_part(tables).items()}, None
            )
    if not images:
        raise BadDataError(
            f"{address} holds neither images nor tables", why=f"its files are {', '.join(names[:10]) or 'none'}"
        )
    folder = fetch(address, images, max_bytes=_MOST_BYTES).folder
    return HubDataset({}, folder / _common_folder(images))


def _by_part(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by the part that their name or folder speaks of; those of no part are for training."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        words = (PurePosixPath(name).stem, *reversed(PurePosixPath(name).parent.parts))
        found[next((part for word in words if (part := part_in_name(word))), "train")].append(name)
    return found


def _common_folder(images: Sequence[str]) -> str:
    """The folder that holds class folders or parts, such as `data` of `data/train/cat`."""
    parts = [PurePosixPath(name).parts[:-1] for name in images]
    common = 0
    while all(len(one) > common + 1 for one in parts) and len({one[common] for one in parts}) == 1:
        if part_in_name(parts[0][common]):
            break
        common += 1
    return "/".join(parts[0][:common])
