"""What is asked of the hub, through huggingface_hub: the files of a commit and their hashes, and one file at a time."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors, get_session, get_token

from flashtask._version import __version__
from flashtask.core.errors import FlashtaskError, HubError, IntegrityError, StorageError, did_you_mean
from flashtask.core.hub.address import HubAddress, endpoint, hub_cache, hub_host, hub_is_offline, longest_fetch

__all__ = [
    "Entry",
    "Listing",
    "UnreachableError",
    "answer_in",
    "client",
    "download",
    "is_about_network",
    "is_safe_name",
    "no_file",
    "not_cached",
    "read_listing",
    "without_secrets",
]

#: Statuses after which another try may succeed.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
#: Seconds before the second, third, ... try, and the most that the server may ask for instead.
_WAITS, _LONGEST_WAIT = (0.5, 1.0, 2.0, 4.0), 60.0
_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)
_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_LOGIN = "`hf auth login`, or set HF_TOKEN"

Result = TypeVar("Result")


class UnreachableError(HubError):
    """The hub cannot be reached or is out of order: what is cached may be used instead."""


@dataclass(frozen=True)
class Entry:
    """One file: its size in bytes, and its sha256 (64 digits; large files) or git's sha1 of it (40 digits)."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        """Refuse an invalid hash or size."""
        is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.digest)
        if not is_hash or type(self.size) is not int or self.size < 0:
            raise IntegrityError("the hub gives no size and hash for a file", fix="check HF_ENDPOINT")


@dataclass(frozen=True)
class Listing:
    """All files of a commit (40 hexadecimal digits) whose names are safe to use, by name."""

    commit: str
    files: dict[str, Entry]


def is_safe_name(name: str) -> bool:
    """Whether a file name of a repository may become a path below a folder, on any system."""
    parts = name.split("/")
    if not name or len(name.encode("utf-8", "surrogateescape")) > 400 or re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', name):
        return False
    return not any(part in ("", ".", "..") or part[-1] in " ." or _WINDOWS.match(part) for part in parts)


def client() -> HfApi:
    """The client, for the hub that the environment names now."""
    return HfApi(endpoint=endpoint(), library_name="flashtask", library_version=__version__)


def read_listing(address: HubAddress) -> Listing:
    """Ask the hub which commit a revision is, and which files it has: one request if all goes well.

    Raises:
        HubError: it cannot be reached (UnreachableError), or refuses.
        IntegrityError: the answer holds no commit, or no hashes.
    """
    revision, limit = address.revision, constants.HF_HUB_ETAG_TIMEOUT
    try:
        ask = client().model_info if address.kind == "model" else client().dataset_info
        found = _patiently(lambda: ask(address.repository, revision=revision, files_metadata=True, timeout=limit))
    except Exception as error:
        raise _told(error, address, "the list of files") from error
    commit = found.sha or ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or (address.is_pinned and commit != address.revision):
        raise IntegrityError(f"the hub named no commit for {address}", why=f"it answered {commit[:60]!r}")
    files = {}
    for file in found.siblings or []:
        if is_safe_name(file.rfilename):
            size, digest = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, file.blob_id)
            files[file.rfilename] = Entry(-1 if size is None else size, digest or "")
    return Listing(commit, files)


def download(address: HubAddress, commit: str, name: str, seconds: float) -> Path:
    """Bring one file into the cache that all tools of the hub share; its bytes are not compared with its hash yet.

    Args:
        address: the repository.
        commit: 40 hexadecimal digits.
        name: of the file.
        seconds: after which it is an error.

    Raises:
        HubError: the hub cannot be reached, refuses, or takes longer.
        IntegrityError: the file does not have the promised length.
        StorageError: the cache cannot be written.
    """

    def ask() -> str:
        return client().hf_hub_download(
            address.repository, name, repo_type=address.kind, revision=commit, cache_dir=hub_cache()
        )

    try:
        path = _within(seconds, lambda: _patiently(ask))
    except Exception as error:
        raise _told(error, address, name) from error
    if path is None:
        raise UnreachableError(
            f"{name} of {address.repository} could not be fetched in time",
            why=f"{hub_host()} sends it too slowly: {longest_fetch():,.0f} seconds are the most for a repository",
            fix="export FLASHTASK_HUB_TIMEOUT=86400, and run it again; what is complete is kept",
        )
    return Path(path)


def no_file(address: HubAddress, commit: str, name: str, names: Iterable[str]) -> HubError:
    """The error for a file that the repository does not have."""
    fix = did_you_mean(name, list(names)) or f"see what it has: {endpoint()}/{address.path}/tree/{commit}"
    return HubError(f"{address.repository} has no file {name!r} at {commit[:12]}", fix=fix)


def not_cached(address: HubAddress, what: str, reason: str) -> UnreachableError:
    """The error for something that is not in the cache and cannot be fetched either."""
    if hub_is_offline():
        fix = "unset HF_HUB_OFFLINE and run it again, or give the path of a local folder"
    else:
        fix = (
            "connect to the network and run it again, set HF_ENDPOINT to a mirror, or give the path of a local folder"
            " (HF_HUB_OFFLINE=1 uses the cache alone)"
        )
    why = f"{reason}, and it is not in the cache ({hub_cache()})" if reason else f"it is not in {hub_cache()}"
    return UnreachableError(f"{what} of {address} could not be fetched", why=why, fix=fix)


def is_about_network(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is about a connection."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        if {kind.__module__.partition(".")[0] for kind in type(seen).__mro__} & _NETWORK_PACKAGES:
            return True
        seen = seen.__cause__
    return False


def answer_in(error: BaseException) -> BaseException:
    """The hub's answer behind an error of the client, which wraps it; without an answer, the first cause."""
    while not isinstance(error, errors.HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def without_secrets(text: str) -> str:
    """A text of a server or library as one short printable line, without the user's token."""
    with suppress(Exception):  # the file that holds the token may be unreadable
        if token := get_token():
            text = text.replace(token, "***")
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    return " ".join(words)[:200]


def _within(seconds: float, ask: Callable[[], Result]) -> Result | None:
    """The result of a call that the client cannot end by itself; None if it takes longer.

    Its thread goes on then, but does not keep the process from ending.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(ask())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if failures:
        raise failures[0]
    return results[0] if results else None


def _patiently(ask: Callable[[], Result]) -> Result:
    """Repeat a request after an error that may pass: the client does so only for some of its requests."""
    for wait in (*_WAITS, None):
        try:
            return ask()
        except errors.HfHubHTTPError as error:
            asked = error.response.headers.get("retry-after", "")
            seconds = float(asked) if asked.isdigit() else 0.0
            if wait is None or error.response.status_code not in _PASSING or seconds > _LONGEST_WAIT:
                raise
            time.sleep(max(wait, seconds))
    raise AssertionError("the last try returns or raises")


def _told(error: Exception, address: HubAddress, what: str) -> FlashtaskError:
    """The error to raise for one that the client raised while it fetched `what`."""
    name, page, answer = address.repository, f"{endpoint()}/{address.path}", answer_in(error)
    if isinstance(answer, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: its owner asks users to accept its terms",
            why=_said(answer),
            fix=f"accept the terms at {page}, then {_LOGIN}",
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        near = did_you_mean(address.revision or "", _revisions(address))
        return HubError(
            f"{name} has no revision {address.revision!r}", fix=near or f"see {page}/branches for what it has"
        )
    if isinstance(answer, errors.RepositoryNotFoundError):
        return HubError(
            f"no repository {name} at {hub_host()} that you can access",
            why="it does not exist, or it is private" + ("" if _has_token() else " and you are not logged in"),
            fix=f"check the name at {page}; if it is private: {_LOGIN}",
        )
    failed = f"{what} of {name} could not be fetched"
    if isinstance(answer, errors.HfHubHTTPError):
        return _of_status(answer, failed)
    return _of_failure(error, answer, failed)


def _of_status(answer: errors.HfHubHTTPError, failed: str) -> HubError:
    status = answer.response.status_code
    if status in (401, 403):
        return HubError(
            failed,
            why=f"{hub_host()} answered with status {status}: {_said(answer)}",
            fix=f"log in with an account that can read it: {_LOGIN}; the token needs the right to read this repository",
        )
    if status == 404:
        return HubError(failed, why="status 404: it does not exist", fix="check the name and HF_ENDPOINT")
    kind = UnreachableError if status in _PASSING else HubError
    return kind(failed, why=f"status {status}: {_said(answer)}", fix="check HF_ENDPOINT, and run it again later")


def _of_failure(error: Exception, cause: BaseException, failed: str) -> FlashtaskError:
    """The error for a failure without an answer of the hub."""
    reason = without_secrets(f"{type(cause).__name__}: {cause}")
    if is_about_network(error):
        return UnreachableError(
            failed,
            why=f"{hub_host()}: {reason}",
            fix="check the network connection and HF_ENDPOINT, and run it again; what is complete is kept",
        )
    if isinstance(cause, OSError) and cause.errno is not None:
        return StorageError(
            f"cannot write to {hub_cache()}: {os.strerror(cause.errno)}",
            fix="free some space, or set HF_HUB_CACHE to a folder on another disk",
        )
    if type(cause) is OSError:  # so the client reports a wrong length
        return IntegrityError(failed, why=reason, fix="run it again; if it fails again, check HF_ENDPOINT")
    return HubError(failed, why=reason, fix="check HF_ENDPOINT, and run it again")


def _said(error: errors.HfHubHTTPError) -> str:
    message = error.server_message or error.response.headers.get("x-error-message") or ""
    return without_secrets(str(message)) or "no reason was given"


def _has_token() -> bool:
    with suppress(Exception):
        return bool(get_token())
    return False


def _revisions(address: HubAddress) -> list[str]:
    """The branches and tags of a repository; empty if they cannot be had. The client's own call has no time limit."""
    with suppress(Exception):
        page, token = f"{endpoint()}/api/models/{address.repository}/refs", get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        refs = get_session().get(page, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT).json()
        return [ref["name"] for ref in (*refs["branches"], *refs["tags"])]
    return []
