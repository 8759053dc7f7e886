"""What the hub's client raises, told as our errors: what is wrong, why, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from huggingface_hub import errors, get_token

from flashtask.core.errors import FlashtaskError, HubError, StorageError, did_you_mean
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.clock import ExpiredError
from flashtask.core.hub.settings import endpoint, hub_cache, hub_host, hub_is_offline
from flashtask.core.hub.watch import LostError, PassingError

__all__ = ["UnreachableError", "is_about_network", "no_file", "not_cached", "told", "without_secrets"]

_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
LOGIN = "`hf auth login`, or set HF_TOKEN"


class UnreachableError(HubError):
    """The hub gave no answer, or none that means anything: what is cached may be used instead."""


def told(error: Exception, address: HubAddress, what: str, revisions: Callable[[], Iterable[str]]) -> FlashtaskError:
    """The error to raise for one that came out of the client.

    Args:
        error: what was raised.
        address: the repository that was asked for.
        what: what was being fetched, for the message.
        revisions: gives the branches and tags there are; called only where one was not found.
    """
    if isinstance(error, FlashtaskError):
        return error
    name, page = address.repository, f"{endpoint()}/{address.repository}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: its owner asks users to accept its terms",
            why=_said(error),
            fix=f"accept the terms at {page}, then {LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        near = did_you_mean(address.revision or "", list(revisions()))
        return HubError(
            f"{name} has no revision {address.revision!r}", fix=near or f"see {page}/branches for what it has"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"no repository {name} at {hub_host()} that you can access",
            why="it does not exist, or it is private" + ("" if _has_token() else " and you are not logged in"),
            fix=f"check the name at {page}; if it is private: {LOGIN}",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error, name, what)
    return _of_network(error, name, what)


def no_file(address: HubAddress, commit: str, name: str, names: Iterable[str]) -> HubError:
    """The error for a file that the repository does not have."""
    names = list(names)
    fix = did_you_mean(name, names) or f"see what it has: {endpoint()}/{address.repository}/tree/{commit}"
    return HubError(f"{address.repository} has no file {name!r} at {commit[:12]}", fix=fix)


def not_cached(address: HubAddress, what: str, reason: str) -> UnreachableError:
    """The error for something that is neither in the cache nor to be had."""
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
    """Whether an error, or one that it stands for, is of a connection."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        if {kind.__module__.partition(".")[0] for kind in type(seen).__mro__} & _NETWORK_PACKAGES:
            return True
        seen = seen.__cause__
    return False


def without_secrets(text: str) -> str:
    """A text of a server or library as one short printable line, without the user's token."""
    with suppress(Exception):  # the file that holds the token may be unreadable
        if token := get_token():
            text = text.replace(token, "***")
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    return " ".join(words)[:200]


def _of_status(error: errors.HfHubHTTPError, name: str, what: str) -> HubError:
    status = error.response.status_code
    failed = f"{what} of {name} could not be fetched"
    if status in (401, 403):
        return HubError(
            failed,
            why=f"{hub_host()} answered with status {status}: {_said(error)}",
            fix=f"log in with an account that can read it: {LOGIN}; the token needs the right to read this repository",
        )
    if status == 404:
        return HubError(failed, why="status 404: it is not there", fix="check the name and HF_ENDPOINT")
    return HubError(failed, why=f"status {status}: {_said(error)}", fix="check HF_ENDPOINT, and run it again later")


def _of_network(error: Exception, name: str, what: str) -> FlashtaskError:
    failed = f"{what} of {name} could not be fetched"
    if isinstance(error, OSError) and error.errno in _DISK and not is_about_network(error):
        return StorageError(
            f"cannot write to {hub_cache()}: {os.strerror(error.errno)}",
            fix="free some space, or set HF_HUB_CACHE to a folder on another disk",
        )
    if isinstance(error, PassingError | LostError | ExpiredError) or is_about_network(error):
        return UnreachableError(
            failed,
            why=f"{hub_host()}: {_reason(error)}",
            fix="check the network connection and HF_ENDPOINT, and run it again; what is complete is kept",
        )
    return HubError(failed, why=_reason(error), fix="check HF_ENDPOINT, and run it again")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    ours = isinstance(error, PassingError | LostError | ExpiredError)
    return without_secrets(str(error) if ours else f"{type(error).__name__}: {error}")


def _said(error: errors.HfHubHTTPError) -> str:
    message = error.server_message or error.response.headers.get("x-error-message") or ""
    return without_secrets(str(message)) or "no reason was given"


def _has_token() -> bool:
    with suppress(Exception):
        return bool(get_token())
    return False
