"""Where files of one repository lie: the cache that all tools of the hub share, and our own beside it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import StorageError
from flashtask.core.files import atomic_write_text
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.listing import Entry, Listing, load_listing, save_listing
from flashtask.core.hub.settings import hub_cache

__all__ = ["Store"]

_DEAD_AFTER = 24 * 3600.0


class Store:
    """The two caches as one repository sees them.

    The shared one has huggingface_hub's layout: `blobs/` named by their hash, `snapshots/COMMIT/NAME` as links to
    them, `refs/REVISION` with a commit in it.
    """

    def __init__(self, address: HubAddress) -> None:
        self._address = address
        folder = address.repository.replace("/", "--")
        self._shared = hub_cache() / f"models--{folder}"
        self._own = cache_folder() / "hub" / folder

    def shared_file(self, commit: str, name: str) -> Path:
        """Where the client puts a file."""
        return self._shared / "snapshots" / commit / name

    def has(self, commit: str, name: str) -> bool:
        """Whether one of the caches has a file of that name, right or wrong."""
        return self.shared_file(commit, name).is_file() or (self._own / commit / name).is_file()

    def folder(self, commit: str) -> Path:
        """The folder that is handed out; made if it does not exist."""
        folder = self._own / commit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "set FLASHTASK_CACHE to a folder you may write to"
            raise StorageError(f"cannot write to {cache_folder()}", why=str(error), fix=fix) from error
        return folder

    def listing(self, commit: str) -> Listing | None:
        """What is known of a commit without asking."""
        return load_listing(self._own / f"{commit}.json", commit)

    def keep_listing(self, listing: Listing) -> None:
        """Remember what a commit holds; a cache that cannot be written only costs a request."""
        with suppress(OSError):
            save_listing(self._own / f"{listing.commit}.json", listing)

    def listing_by_blobs(self, commit: str, names: Iterable[str]) -> Listing:
        """What the names of the blobs say of files that another tool put into the shared cache."""
        files = {}
        for name in names:
            file = self.shared_file(commit, name)
            # Only the first link has the hash: a blob may itself be a link into a store that repositories share.
            digest = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
            method = {40: "git", 64: "sha256"}.get(len(digest))
            if method and re.fullmatch(r"[0-9a-f]+", digest) and file.is_file():
                files[name] = Entry(file.stat().st_size, method, digest)
        return Listing(commit, files)

    def commit_of_revision(self) -> str | None:
        """The commit that the branch or tag stood at when a tool last asked."""
        try:
            text = self._reference().read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        return text if re.fullmatch(r"[0-9a-f]{40}", text) else None

    def keep_revision(self, commit: str) -> None:
        """Note where the branch or tag stands, for all tools; only after its files are there."""
        if self._address.is_pinned or self.commit_of_revision() == commit:
            return
        with suppress(OSError):
            self._reference().parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._reference(), commit)

    def remove_leftovers(self) -> None:
        """Remove what killed downloads left, of this tool or others: nobody goes on with those files.

        A living download writes to its file all the time, so one that stood still for a day is dead.
        """
        for file in (self._shared / "blobs").glob("*.incomplete"):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > _DEAD_AFTER:
                    file.unlink()

    def remove(self, path: Path) -> None:
        """Remove a wrong file: the blob behind a name, if it is in one of the caches, and the name.

        Raises:
            StorageError: it cannot be removed.
        """
        real = Path(os.path.realpath(path))
        homes = [os.path.realpath(hub_cache()), os.path.realpath(self._own)]
        ours = [path] + ([real] if any(real.is_relative_to(home) for home in homes) else [])
        try:
            for file in ours:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove the damaged {path}", why=error.strerror or "", fix=f"rm {real}"
            ) from error

    def _reference(self) -> Path:
        return self._shared / "refs" / (self._address.revision or "main")
