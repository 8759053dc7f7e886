"""A repository of the hub at one commit, as a folder of checked files.

The bytes stay in the cache that all tools of the hub share. The folder that is handed out is our own, below
`cache_folder()`: it only ever holds names that were asked for, and a name appears in it after the file's size
and hash were compared with what the hub says of that commit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashtask.core.errors import HubError, IntegrityError, StorageError
from flashtask.core.hub.address import HubAddress

if TYPE_CHECKING:  # the client takes long to import, and nothing of it is needed for the signatures
    from flashtask.core.hub.clock import Clock
    from flashtask.core.hub.listing import Entry, Listing
    from flashtask.core.hub.store import Store

__all__ = ["MAX_BYTES", "Snapshot", "fetch"]

#: The most that one call downloads, in bytes, unless the caller says otherwise.
MAX_BYTES = 16 * 2**30
#: Seconds that one call may take, unless the caller says otherwise; each file has a limit of its own besides.
DEADLINE = 12 * 3600.0
#: Code, which is never fetched: nothing here runs any.
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".exe")
_told_once: set[HubAddress] = set()


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit; `commit` has 40 hexadecimal digits, `folder` holds the files under their own names."""

    address: HubAddress
    commit: str
    folder: Path


def fetch(
    address: HubAddress,
    files: Sequence[str],
    *,
    optional: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    deadline: float = DEADLINE,
) -> Snapshot:
    """Fetch files of a repository, or find them in the cache, and hand out only what was compared with its hash.

    A commit whose files are in the cache makes no request; a branch or tag makes one, and none when offline.

    Args:
        address: the repository and revision.
        files: names that have to be there.
        optional: names that are fetched where the repository has them.
        max_bytes: the most that is downloaded, all files together.
        deadline: seconds for the whole call.

    Raises:
        HubError: unreachable, not found, private, gated or too slow (exit code 69).
        IntegrityError: a wrong hash or size, a refused name or redirect, too many bytes (exit code 76).
        StorageError: a cache cannot be read or written (exit code 74).
    """
    from flashtask.core.hub.clock import Clock
    from flashtask.core.hub.hub_errors import no_file
    from flashtask.core.hub.store import Store

    names = list(dict.fromkeys((*files, *optional)))
    for name in names:
        _refuse_name(address, name)
    store, clock = Store(address), Clock(deadline)
    listing, is_certain = _listing(address, store, files, optional, clock)
    for name in files:
        if name not in listing.files:
            raise no_file(address, listing.commit, name, listing.files)
    there = [name for name in names if name in listing.files]
    missing = [name for name in there if not _is_placed(store, listing, name, is_certain)]
    if missing:
        _bring(address, store, listing, missing, max_bytes, clock if is_certain else None)
    if is_certain:
        store.keep_revision(listing.commit)
    return Snapshot(address, listing.commit, store.folder(listing.commit))


def _listing(
    address: HubAddress, store: Store, files: Sequence[str], optional: Sequence[str], clock: Clock
) -> tuple[Listing, bool]:
    """What the commit holds, and whether the hub may be asked for the rest of it."""
    from flashtask.core.hub.hub_errors import UnreachableError, not_cached
    from flashtask.core.hub.settings import hub_is_offline

    is_offline, reason = hub_is_offline(), "HF_HUB_OFFLINE is set"
    commit = address.revision if address.is_pinned else None
    if commit and (known := store.listing(commit)):
        return known, not is_offline
    if not is_offline:
        from flashtask.core.hub.client import read_listing

        try:
            listing = read_listing(address, clock)
        except UnreachableError as error:
            reason = error.why
        else:
            store.keep_listing(listing)
            return listing, True
    commit = commit or store.commit_of_revision()
    if commit:
        known = store.listing(commit) or store.listing_by_blobs(commit, [*files, *optional])
        if all(name in known.files and store.has(commit, name) for name in files):
            if not is_offline:
                _say_once(address, f"{address}: {reason}; using commit {commit[:12]} from the cache")
            return known, False
    raise not_cached(address, ", ".join(files), reason)


def _is_placed(store: Store, listing: Listing, name: str, may_ask: bool) -> bool:
    """Whether the folder that is handed out holds the right file, or can be given it from the shared cache.

    Raises:
        IntegrityError: the cached file is wrong, and the hub cannot be asked for another.
    """
    from flashtask.core.hub.checked import place

    target = store.folder(listing.commit) / name
    for path in (target, store.shared_file(listing.commit, name)):
        wrong = _wrong(path, listing.files[name])
        if wrong is None:
            place(path, target)
            return True
        if wrong:
            store.remove(path)
            if not may_ask:
                fix = "connect to the network (and unset HF_HUB_OFFLINE) to fetch it again"
                raise IntegrityError(f"{path} was damaged", why=f"{wrong}; it was removed from the cache", fix=fix)
            print(f"{path} was damaged ({wrong}): removed, and fetched again", file=sys.stderr)
    return False


def _bring(
    address: HubAddress, store: Store, listing: Listing, names: list[str], max_bytes: int, clock: Clock | None
) -> None:
    """Download what is missing, one file after another; `clock` is None when the hub cannot be asked."""
    from flashtask.core.hub.hub_errors import not_cached

    if clock is None:
        raise not_cached(address, ", ".join(names), "")
    total = sum(listing.files[name].size for name in names)
    if total > max_bytes:
        raise IntegrityError(
            f"{address} is larger than {max_bytes:,} bytes: {', '.join(names)} have {total:,}",
            why="that is the most this download may take; nothing was fetched",
            fix=f"if it is meant to be that large: max_bytes={total}",
        )
    store.remove_leftovers()
    for name in names:
        _bring_one(address, store, listing, name, clock)


def _bring_one(address: HubAddress, store: Store, listing: Listing, name: str, clock: Clock) -> None:
    from flashtask.core.hub.checked import place
    from flashtask.core.hub.client import download

    entry = listing.files[name]
    for _ in range(3):
        path = download(address, listing.commit, name, entry, clock)
        wrong = _wrong(path, entry)
        if wrong is None:
            place(path, store.folder(listing.commit) / name)
            return
        if wrong:
            store.remove(path)
            raise IntegrityError(
                f"{name} of {address} is not the file that the hub promised",
                why=f"{wrong}; it was removed from the cache",
                fix="run it again; if it happens again, tell the owner of the repository, or check HF_ENDPOINT",
            )
        # Another process found the same file wrong and removed it between the two lines above.
    raise HubError(f"{name} of {address} was removed while it was read", fix="run it again")


def _wrong(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file; None if it is right, an empty text if it is not there."""
    from flashtask.core.hub.checked import wrong_with

    try:
        return wrong_with(path, entry)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise StorageError(f"cannot read {path}", why=error.strerror or "", fix=f"see `ls -l {path}`") from error


def _refuse_name(address: HubAddress, name: str) -> None:
    from flashtask.core.hub.listing import is_safe_name

    why = ""
    if not is_safe_name(name):
        why = "it could lead out of the folder that it belongs to"
    elif name.lower().endswith(_CODE):
        why = "code from a repository is never fetched"
    if why:
        raise IntegrityError(f"refused the file name {name[:100]!r} of {address}", why=why, fix="leave it out")


def _say_once(address: HubAddress, text: str) -> None:
    if address not in _told_once:
        _told_once.add(address)
        print(text, file=sys.stderr)
