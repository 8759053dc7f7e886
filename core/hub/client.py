"""The few things asked of huggingface_hub, each with a deadline, bounded tries and errors that say what to do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download

from flashtask._version import __version__
from flashtask.core.errors import IntegrityError
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.clock import Clock, ExpiredError
from flashtask.core.hub.hub_errors import is_about_network, told
from flashtask.core.hub.listing import Entry, Listing, is_safe_name
from flashtask.core.hub.settings import endpoint, hub_cache
from flashtask.core.hub.watch import LostError, PassingError, Watch, watching

__all__ = ["download", "read_listing"]

#: Seconds for one answer that is no file.
METADATA_SECONDS = 30.0
#: The slowest mean speed, in bytes a second, at which a download is still waited for.
SLOWEST = 16 * 1024
#: Tries after an answer that may pass (429, 5xx) or a lost connection.
TRIES = 5
_BACKOFF_SECONDS = 0.5

Result = TypeVar("Result")


def read_listing(address: HubAddress, clock: Clock) -> Listing:
    """Ask the hub which commit a revision is, and which files it has: one request.

    Raises:
        HubError: it cannot be reached (UnreachableError), or refuses.
        IntegrityError: the answer holds no commit, or no hashes.
    """
    clock = clock.within(METADATA_SECONDS)
    what = "the list of files"

    def ask() -> Listing:
        with watching(Watch(clock, f"{what} of {address.repository}")):
            found = _api().model_info(
                address.repository, revision=address.revision, files_metadata=True, timeout=clock.left()
            )
        commit = found.sha or ""
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or (address.is_pinned and commit != address.revision):
            raise IntegrityError(f"the hub named no commit for {address}", why=f"it said {commit[:60]!r}")
        files = {}
        for file in found.siblings or []:
            if is_safe_name(file.rfilename):
                method, digest = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id or "")
                size = file.lfs.size if file.lfs else file.size
                files[file.rfilename] = Entry(-1 if size is None else size, method, digest)
        return Listing(commit, files)

    return _patiently(ask, address, what, clock)


def download(address: HubAddress, commit: str, name: str, entry: Entry, clock: Clock) -> Path:
    """Bring one file into the cache that all tools of the hub share, and give its path there; not yet compared.

    Raises:
        HubError: the server cannot be reached, refuses, or is too slow.
        IntegrityError: what it sends is not what it promised.
        StorageError: the cache cannot be written.
    """
    clock = clock.within(60.0 + entry.size / SLOWEST)
    watch = Watch(clock, f"{name} of {address.repository}", entry.size)

    def ask() -> Path:
        with watching(watch):
            return Path(
                hf_hub_download(
                    address.repository,
                    name,
                    revision=commit,
                    cache_dir=hub_cache(),
                    endpoint=endpoint(),
                    library_name="flashtask",
                    library_version=__version__,
                )
            )

    return _patiently(ask, address, name, clock)


def _api() -> HfApi:
    return HfApi(endpoint=endpoint(), library_name="flashtask", library_version=__version__)


def _patiently(ask: Callable[[], Result], address: HubAddress, what: str, clock: Clock) -> Result:
    """Ask until there is an answer, for a bounded number of times; failures are told as our errors."""
    for number in range(1, TRIES + 1):
        try:
            return ask()
        except Exception as error:
            wait = _wait_before(number, error)
            try:
                if number < TRIES and wait is not None and wait < clock.left():
                    time.sleep(wait)
                    continue
            except ExpiredError as expired:
                error = expired
            raise told(error, address, what, lambda: _revisions(address)) from error
    raise AssertionError("the last try returns or raises")


def _wait_before(number: int, error: Exception) -> float | None:
    """Seconds until the next try; None if there is none to be made."""
    backoff = _BACKOFF_SECONDS * 2.0 ** (number - 1)
    if isinstance(error, PassingError):
        return max(error.wait, backoff)
    # A time-out has taken long enough, and the client itself has gone on after a broken connection.
    names = ("ReadError", "WriteError", "ConnectError", "RemoteProtocolError")
    is_lost = isinstance(error, LostError) or (type(error).__name__ in names and is_about_network(error))
    return backoff if is_lost and number < 3 else None


def _revisions(address: HubAddress) -> list[str]:
    with suppress(Exception), watching(Watch(Clock(METADATA_SECONDS), "the branches")):
        refs = _api().list_repo_refs(address.repository)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []
