"""What every request of the hub's client has to keep to: deadline, redirects, token, lengths.

The client is huggingface_hub's own. Its HTTP sessions call a function before each request and after each
answer; ours do nothing outside `watching`, so other users of the client in this process notice nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import email.utils
import functools
import ipaddress
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from huggingface_hub import constants, set_client_factory

from flashtask.core.errors import HubError, IntegrityError
from flashtask.core.hub.clock import Clock
from flashtask.core.hub.settings import endpoint
from flashtask.core.library_internals import hub_client_factory

__all__ = ["LostError", "PassingError", "Watch", "watching"]

#: Statuses after which another try may succeed.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
#: Connections for one file: the client goes on after every cut for as long as each brings a byte.
_MOST_REQUESTS = 200
#: Bytes of one answer that is no file, such as the list of a repository's files.
_MOST_ANSWER = 64 * 2**20
_AGAIN = "run it again; if it happens again, tell the owner of the server"


class PassingError(Exception):
    """The server is busy or broken just now; `wait` is what it asked for, in seconds."""

    def __init__(self, status: int, wait: float) -> None:
        super().__init__(f"the server answered with status {status}")
        self.wait = wait


class LostError(Exception):
    """The connection failed before there was an answer; the client would go on trying for half a minute."""

    def __init__(self) -> None:
        super().__init__("the connection failed")


class Watch:
    """Looks at the requests of one step.

    Args:
        clock: the deadline.
        what: what is fetched, for messages.
        size: the length of the file that is fetched, in bytes; None for an answer that is no file.
    """

    def __init__(self, clock: Clock, what: str, size: int | None = None) -> None:
        self._clock, self._what, self._size = clock, what, size
        self._hub = urlsplit(endpoint())
        self._requests = 0
        self.begin()

    def begin(self) -> None:
        """A new try of the same step."""
        self._asked: set[str] = set()
        self._was_redirected = False

    def before(self, request: Any) -> None:
        """Check where a request goes and what it carries."""
        self._requests += 1
        if self._requests > _MOST_REQUESTS:
            raise HubError(
                f"{self._what} could not be fetched",
                why=f"the connection was cut {_MOST_REQUESTS} times",
                fix="check the network connection and run it again",
            )
        self._refuse_second_look(request)
        url = urlsplit(str(request.url))
        if not _same_origin(url, self._hub):
            _refuse_elsewhere(url, self._hub)
            request.headers.pop("authorization", None)
        left = self._clock.left()
        waits = request.extensions.get("timeout") or {}
        names = ("connect", "read", "write", "pool")
        longest = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.extensions["timeout"] = {name: min(waits.get(name) or longest, left) for name in names}
        if self._size is not None:
            request.headers["accept-encoding"] = "identity"

    def _refuse_second_look(self, request: Any) -> None:
        """Stop the client from asking a second time for the header of one file."""
        if request.method != "HEAD":
            return
        if str(request.url) in self._asked:
            if not self._was_redirected:
                raise LostError
            raise HubError(f"{self._what} could not be fetched", why="the server redirects in a loop", fix=_AGAIN)
        self._asked.add(str(request.url))

    def after(self, response: Any) -> None:
        """Check what an answer says about itself, and let its body run against the clock."""
        self._clock.left()
        self._was_redirected = 300 <= response.status_code < 400
        if response.status_code in _PASSING:
            raise PassingError(response.status_code, _retry_after(response.headers.get("retry-after", "")))
        start, most = 0, _MOST_ANSWER
        if self._size is not None and response.status_code in (200, 206) and response.request.method == "GET":
            start, most = self._checked_start(response), self._size
        response.stream = _stream_class(response)(response.stream, self._counted(start, most))

    def _checked_start(self, response: Any) -> int:
        """Where in the file the body starts, after comparing all that its header promises."""
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise self._refusal("the server compressed the file although it was asked not to")
        asked = re.fullmatch(r"bytes=(\d+)-", response.request.headers.get("range", ""))
        start, total = 0, response.headers.get("content-length")
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("content-range", ""))
            if found is None or asked is None or int(found[1]) != int(asked[1]):
                raise self._refusal("the server sent a part that was not requested")
            start, total = int(found[1]), found[2]
        if total is not None and total != str(self._size):
            raise self._refusal(f"the server has {total} bytes, and promised {self._size}")
        return start

    def _counted(self, start: int, most: int) -> Callable[[Iterator[bytes]], Iterator[bytes]]:
        def blocks(source: Iterator[bytes]) -> Iterator[bytes]:
            have = start
            for block in source:
                self._clock.left()
                have += len(block)
                if have > most:
                    raise self._refusal(f"the server sent more than {most:,} bytes")
                yield block

        return blocks

    def _refusal(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self._what} was refused", why=why, fix=_AGAIN)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Have all requests that this thread makes through the hub's client looked at."""
    if (factory := hub_client_factory()) is not _watched_session:
        _wrapped[0] = factory
        set_client_factory(_watched_session)
    watch.begin()
    token = _current.set(watch)
    try:
        with _own_settings():
            yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Have the client write what arrives as it arrives, over plain https, and be silent about its tries.

    It gathers 10 MB before it writes, and what it has gathered is lost with the connection: None is as it arrives.
    Xet transfers run in compiled code that no deadline of ours reaches. What comes of failed tries is told once, by
    us. All is put back when the last thread is done.
    """
    global _users, _before_us
    with _settings_lock:
        if _users == 0:
            _before_us = _settings()
        _users += 1
        _set((None, True, logging.ERROR))
    try:
        yield
    finally:
        with _settings_lock:
            _users -= 1
            if _users == 0:
                _set(_before_us)


def _settings() -> tuple[int | None, bool, int]:
    return constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET, _logger.level


def _set(settings: tuple[int | None, bool, int]) -> None:
    chunk, constants.HF_HUB_DISABLE_XET, level = settings
    constants.DOWNLOAD_CHUNK_SIZE = chunk  # type: ignore[assignment]
    _logger.setLevel(level)


_logger = logging.getLogger("huggingface_hub")
_settings_lock = threading.Lock()
_users = 0
_before_us = _settings()
_current: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)
#: What made the sessions before; it may be the user's own, with a proxy or a certificate.
_wrapped: list[Callable[[], Any]] = [hub_client_factory()]


def _watched_session() -> Any:
    session = _wrapped[0]()
    hooks = session.event_hooks
    session.event_hooks = {
        "request": [*hooks.get("request", []), _before],
        "response": [*hooks.get("response", []), _after],
    }
    return session


def _before(request: Any) -> None:
    if (watch := _current.get()) is not None:
        watch.before(request)


def _after(response: Any) -> None:
    if (watch := _current.get()) is not None:
        watch.after(response)


@functools.cache
def _class_for(package: str) -> Any:
    base: Any = sys.modules[package].SyncByteStream

    class Counted(base):  # type: ignore[misc]  # its base is of whichever httpx the client uses
        """A body whose blocks go through a function."""

        def __init__(self, stream: Any, blocks: Callable[[Iterator[bytes]], Iterator[bytes]]) -> None:
            self._stream, self._blocks = stream, blocks

        def __iter__(self) -> Iterator[bytes]:
            return self._blocks(iter(self._stream))

        def close(self) -> None:
            self._stream.close()

    return Counted


def _stream_class(response: Any) -> Any:
    return _class_for(type(response).__module__.partition(".")[0])


def _same_origin(one: SplitResult, other: SplitResult) -> bool:
    ports = {"http": 80, "https": 443}
    return (one.scheme, one.hostname, one.port or ports.get(one.scheme)) == (
        other.scheme,
        other.hostname,
        other.port or ports.get(other.scheme),
    )


def _refuse_elsewhere(url: SplitResult, hub: SplitResult) -> None:
    """Refuse a redirect that leaves the hub for anything but https on a public host."""
    shown = f"{url.scheme}://{(url.netloc or url.path).rpartition('@')[2]}"[:200]
    if url.scheme != "https":
        raise IntegrityError(
            f"refused a redirect from {hub.hostname} to {shown}",
            why="other hosts are only contacted over https",
            fix="check HF_ENDPOINT; if it is right, tell its owner",
        )
    if _is_private(url.hostname or "") and not _is_private(hub.hostname or ""):
        raise IntegrityError(
            f"refused a redirect from {hub.hostname} to {shown}",
            why="that is a private address, and the hub's is not",
            fix="check HF_ENDPOINT; if it is right, tell its owner",
        )


def _is_private(host: str) -> bool:
    """Whether a host is this machine or one of a private network, as far as its name can be resolved here."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False  # behind a proxy names are resolved elsewhere; without one the connection fails
    addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return any(not address.is_global or address.is_multicast for address in plain)


def _retry_after(text: str) -> float:
    """Seconds the server asks to wait, given as a number or a date."""
    if re.fullmatch(r"\d{1,9}", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
