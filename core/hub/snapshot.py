"""Files of a repository at one commit, compared with the hashes that the hub gives before anything reads them.

huggingface_hub puts them into the cache that all its users share: `models--ORG--NAME/` with `blobs/`, which are named
by their hash, `snapshots/COMMIT/FILE`, which are links to them, and `refs/REVISION`, which hold a commit. The listing
of a commit is kept below `cache_folder()`, so that files can be compared without a request.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import FlashtaskError, IntegrityError, StorageError
from flashtask.core.files import atomic_write_text
from flashtask.core.hub.address import HubAddress, hub_cache, hub_is_offline, longest_fetch
from flashtask.core.hub.client import (
    Entry,
    Listing,
    UnreachableError,
    download,
    is_safe_name,
    no_file,
    not_cached,
    read_listing,
)
from flashtask.core.known_files import content_hashes
from flashtask.core.plain_json import canonical_json, read_json

__all__ = ["MAX_BYTES", "Snapshot", "fetch", "list_files"]

#: The most that one call downloads, in bytes, by default.
MAX_BYTES = 16 * 2**30
#: Code, which is never fetched: nothing here runs any.
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".ps1", ".exe")
#: Seconds after which an unfinished file that did not grow belongs to a process that was killed.
_DEAD_AFTER = 24 * 3600.0
_said_once: set[HubAddress] = set()


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit.

    Args:
        commit: 40 hexadecimal digits.
        folder: of the shared cache. Only the files that were asked for are known to be right: others may be in it.
    """

    commit: str
    folder: Path


def fetch(
    address: HubAddress, files: Sequence[str], *, optional: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> Snapshot:
    """Fetch files of a repository, or find them in the cache, and compare each with its hash.

    A commit whose files are in the cache makes no request; a branch or tag makes one, and none when offline.

    Args:
        address: the repository and revision.
        files: names that the repository must have.
        optional: names that are fetched if the repository has them.
        max_bytes: the most that is downloaded, all files together.

    Raises:
        HubError: unreachable, not found, private or gated (exit code 69).
        IntegrityError: a wrong hash or size, a refused name, too many bytes (exit code 76).
        StorageError: a cache cannot be read or written (exit code 74).
    """
    names = list(dict.fromkeys((*files, *optional)))
    for name in names:
        _refuse_name(address, name)
    cache = _Cache(address)
    listing, may_ask = _listing(address, cache, files, names)
    for name in files:
        if name not in listing.files:
            raise no_file(address, listing.commit, name, listing.files)
    present = [name for name in names if name in listing.files]
    missing = [name for name in present if not _is_cached(cache, listing, name, may_ask)]
    if missing and not may_ask:
        raise not_cached(address, ", ".join(missing), "")
    if missing:
        _refuse_size(address, listing, missing, max_bytes)
        cache.remove_leftovers()
    end = time.monotonic() + longest_fetch()
    for name in missing:
        _download(address, cache, listing, name, end - time.monotonic())
    if may_ask:
        cache.keep_revision(listing.commit)
    return Snapshot(listing.commit, cache.folder(listing.commit))


def list_files(address: HubAddress) -> Listing:
    """The files of a repository, and the commit that they are of; a commit that was listed before makes no request.

    Raises:
        HubError: unreachable, not found, private or gated (exit code 69).
    """
    return _listing(address, _Cache(address), (), ())[0]


def _listing(address: HubAddress, cache: _Cache, files: Sequence[str], names: Sequence[str]) -> tuple[Listing, bool]:
    """What the commit holds, and whether the hub may be asked for its files."""
    is_offline, reason = hub_is_offline(), "HF_HUB_OFFLINE is set"
    commit = address.revision if address.is_pinned else None
    if commit and (known := cache.listing(commit)):
        return known, not is_offline
    if not is_offline:
        try:
            listing = read_listing(address)
        except UnreachableError as error:
            reason = error.why
        else:
            cache.keep_listing(listing)
            return listing, True
    commit = commit or cache.commit_of_revision()
    if commit:
        known = cache.listing(commit) or cache.listing_by_blobs(commit, names)
        if all(name in known.files and (cache.folder(commit) / name).is_file() for name in files):
            if not is_offline and address not in _said_once:
                _said_once.add(address)
                print(f"{address}: {reason}; using commit {commit[:12]} from the cache", file=sys.stderr)
            return known, False
    raise not_cached(address, ", ".join(files), reason)


def _is_cached(cache: _Cache, listing: Listing, name: str, may_ask: bool) -> bool:
    """Whether the cache has the right file; a wrong one is removed from it.

    Raises:
        IntegrityError: the cached file is wrong, and the hub cannot be asked for another.
    """
    path = cache.folder(listing.commit) / name
    if not path.exists():
        return False
    wrong = _wrong_with(path, listing.files[name])
    if wrong is None:
        return True
    cache.remove(path)
    if not may_ask:
        fix = "connect to the network (and unset HF_HUB_OFFLINE) to fetch it again"
        raise IntegrityError(f"{path} was damaged", why=f"{wrong}; it was removed from the cache", fix=fix)
    print(f"{path} was damaged ({wrong}): removed, and fetched again", file=sys.stderr)
    return False


def _download(address: HubAddress, cache: _Cache, listing: Listing, name: str, seconds: float) -> None:
    path = download(address, listing.commit, name, seconds)
    wrong = _wrong_with(path, listing.files[name])
    if wrong is not None:
        cache.remove(path)
        raise IntegrityError(
            f"{name} of {address} is not the file that the hub promised",
            why=f"{wrong}; it was removed from the cache",
            fix="run it again; if it fails again, tell the owner of the repository, or check HF_ENDPOINT",
        )


def _wrong_with(path: Path, entry: Entry) -> str | None:
    """What is wrong with a file's bytes, in words; None if they are the promised ones.

    Large files that were compared before, and have the same size and time of change since, are not read again.
    """
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):
            return "it is not a regular file"
        if status.st_size != entry.size:
            return f"it has {status.st_size:,} bytes, the hub promised {entry.size:,}"
        found = content_hashes([real])[0] if len(entry.digest) == 64 else _git_hash(Path(real), entry.size)
    except FileNotFoundError:
        return "another process removed it"
    except OSError as error:
        raise StorageError(
            f"cannot read {path}", why=error.strerror or str(error), fix=f"see `ls -l {path}`"
        ) from error
    if found != entry.digest:
        return f"its hash is {found}, the hub promised {entry.digest}"
    return None


def _git_hash(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)).hexdigest()


def _refuse_name(address: HubAddress, name: str) -> None:
    why = ""
    if not is_safe_name(name):
        why = "it could lead out of the folder that it belongs to"
    elif name.lower().endswith(_CODE):
        why = "code from a repository is never fetched"
    if why:
        raise IntegrityError(f"refused the file name {name[:100]!r} of {address}", why=why, fix="leave it out")


def _refuse_size(address: HubAddress, listing: Listing, names: Sequence[str], max_bytes: int) -> None:
    total = sum(listing.files[name].size for name in names)
    if total > max_bytes:
        raise IntegrityError(
            f"{address} is larger than {max_bytes:,} bytes: {', '.join(names)} have {total:,}",
            why="that is the most that is downloaded without being asked for it; nothing was fetched",
            fix=f"`hf download {address.repository} {' '.join(names)} --revision {listing.commit}`, and run it again",
        )


class _Cache:
    """What the shared cache has of one repository, and the listings that are kept of it."""

    def __init__(self, address: HubAddress) -> None:
        folder = address.repository.replace("/", "--")
        listings = folder if address.kind == "model" else f"{address.kind}s--{folder}"
        self._shared, self._listings = hub_cache() / f"{address.kind}s--{folder}", cache_folder() / "hub" / listings
        self._reference = None if address.is_pinned else self._shared / "refs" / (address.revision or "main")

    def folder(self, commit: str) -> Path:
        """Where the files of a commit are, under their own names."""
        return self._shared / "snapshots" / commit

    def listing(self, commit: str) -> Listing | None:
        """What `keep_listing` kept; None if there is nothing, or it is damaged."""
        try:
            found: Any = read_json(self._listings / f"{commit}.json", most=2**26)
            content = found["listing"]
            if content["commit"] != commit or found["sha256"] != _hash(content):
                return None
            return Listing(commit, {name: Entry(*entry) for name, entry in content["files"].items()})
        except (OSError, FlashtaskError, KeyError, TypeError, AttributeError):
            return None

    def keep_listing(self, listing: Listing) -> None:
        """Remember what a commit holds, with a hash; a cache that cannot be written only costs a request."""
        files = {name: [entry.size, entry.digest] for name, entry in listing.files.items()}
        content = {"commit": listing.commit, "files": files}
        with suppress(OSError):
            self._listings.mkdir(parents=True, exist_ok=True)
            text = canonical_json({"sha256": _hash(content), "listing": content})
            atomic_write_text(self._listings / f"{listing.commit}.json", text)

    def listing_by_blobs(self, commit: str, names: Sequence[str]) -> Listing:
        """The hashes in the names of the blobs of files that another tool put into the shared cache."""
        files, folder = {}, self.folder(commit)
        for name in [name for name in names if (folder / name).is_file()]:
            file = folder / name
            # Only the first link has the hash: a blob may itself be a link into a store that repositories share.
            digest = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
            if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
                why = "another tool downloaded it, and not as a link that names its hash"
                raise IntegrityError(f"{file} cannot be compared offline", why=why, fix="fetch it once while online")
            files[name] = Entry(file.stat().st_size, digest)
        return Listing(commit, files)

    def commit_of_revision(self) -> str | None:
        """The commit of the branch or tag when a tool last asked the hub."""
        if self._reference is None:
            return None
        try:
            text = self._reference.read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        return text if re.fullmatch(r"[0-9a-f]{40}", text) else None

    def keep_revision(self, commit: str) -> None:
        """Note the commit of the branch or tag for all tools; called only after its files are in the cache."""
        if self._reference is None or self.commit_of_revision() == commit:
            return
        with suppress(OSError):
            self._reference.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._reference, commit)

    def remove_leftovers(self) -> None:
        """Remove unfinished files of killed processes; the client never continues one that another process began."""
        for file in (self._shared / "blobs").glob("*.incomplete"):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > _DEAD_AFTER:
                    file.unlink()

    def remove(self, path: Path) -> None:
        """Remove a wrong file: its name, and the blob behind it if that is in this cache.

        Raises:
            StorageError: it cannot be removed.
        """
        real = Path(os.path.realpath(path))
        try:
            path.unlink(missing_ok=True)
            if real.is_relative_to(os.path.realpath(hub_cache())):
                real.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove the damaged {path}", why=error.strerror or "", fix=f"rm {real}"
            ) from error


def _hash(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
