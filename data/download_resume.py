"""All bytes of one address in one partial file: going on after cuts, trying again, and what is refused on the way.

Rules for hosts hold for addresses that come from a redirect. The address the user typed is used as it is.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask._version import __version__
from flashtask.core.errors import FlashtaskError, HubError, IntegrityError, StorageError, UsageError
from flashtask.core.plain_json import read_json

if TYPE_CHECKING:
    import httpx2 as httpx

__all__ = ["Clock", "Download", "UnfinishedError", "shown", "writing"]

#: Tries in a row that bring no new byte.
MAX_FAILURES = 6
#: Connections in all, however little each brings.
MAX_CONNECTIONS = 1000
MAX_REDIRECTS = 10
#: Seconds before the next try; doubled after each that brings nothing.
BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF = 30.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_HEADERS = {
    "User-Agent": f"flashtask/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # a body packed for transport would not be the file
    "Connection": "close",
}
_BY_HAND = "download it in a browser and give the path of the file instead of the address"


class UnfinishedError(HubError):
    """A download that was given up, for lack of time or because the connection kept breaking.

    Args:
        what: as for every error.
        reason: what went wrong, in a few words.
        kept: what becomes of the bytes that have arrived.
        fix: as for every error.
    """

    def __init__(self, what: str, reason: str, kept: str, fix: str) -> None:
        super().__init__(what, why=f"{reason}; {kept}", fix=fix)
        self.reason = reason


class _TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Clock:
    """The time a download may take as a whole, and how long it may stand still, in seconds."""

    def __init__(self, deadline: float, timeout: float) -> None:
        self.deadline, self._timeout = deadline, timeout
        self._end = time.monotonic() + deadline

    def left(self) -> float:
        """Seconds until the deadline; HubError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise UnfinishedError(
                f"the download did not finish within {self.deadline:g} s",
                "the deadline was reached",
                "what has arrived is kept",
                "run it again to continue from there, or give a longer deadline=",
            )
        return left

    def timeout(self) -> float:
        """How long the next single wait may take."""
        return min(self._timeout, self.left())


def shown(url: str) -> str:
    """An address for messages and files: without its query, which may hold a secret."""
    return url.partition("?")[0].partition("#")[0]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a StorageError that names the file."""
    try:
        yield
    except FlashtaskError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {path}", why=error.strerror or str(error), fix="free some space, then run it again"
        ) from error


@dataclass
class Download:
    """One file on its way from an address. Beside it lies a note of which version it is a part of.

    Args:
        url: the address.
        path: where the bytes go; kept when `fetch` fails and may go on later.
        clock: deadline and stall time-out.
        max_bytes: the most that is taken.
        verified_later: a checksum will prove length and version.
        ends_by_itself: the content shows by itself whether it is whole, so its length need not be announced.
        tries: in a row that bring no new byte, before it is given up.
        public_only: refuse private addresses of the typed host too, as for one that somebody else typed.
        report: called with (bytes so far, bytes in all or None).
    """

    url: str
    path: Path
    clock: Clock
    max_bytes: int
    verified_later: bool = False
    ends_by_itself: bool = False
    tries: int = MAX_FAILURES
    public_only: bool = False
    report: Callable[[int, int | None], None] = lambda done, total: None

    @property
    def note(self) -> Path:
        """The file that says which version of which address this is."""
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def drop(self) -> None:
        """Remove file and note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def fetch(self) -> None:
        """Bring the file to its full length; what is there already is not asked for again.

        Raises:
            HubError: the server cannot be reached, refuses, or keeps failing.
            IntegrityError: what it sends is not what it says, or more than `max_bytes`; or a refused redirect.
            StorageError: the file cannot be written.
            UsageError: the address is not valid.
        """
        import httpx2 as httpx

        failures, most, peer = 0, self.size(), _Peer(self.public_only)
        with _client() as client:
            for _ in range(MAX_CONNECTIONS):
                wait = 0.0
                try:
                    self._go_on(client, peer)
                    return
                except _TryAgainError as error:
                    reason, wait = str(error), error.wait
                except httpx.ReadTimeout:
                    reason = "the server stopped sending"
                except (httpx.ReadError, httpx.RemoteProtocolError) as error:
                    version = self._version()
                    total = f" of {version.total:,}" if version and version.total else ""
                    reason = f"the connection ended at {self.size():,}{total} bytes" if version else str(error)
                except httpx.InvalidURL as error:
                    raise UsageError(
                        f"cannot download {shown(self.url)!r}", why=str(error), fix="check the address"
                    ) from error
                except (httpx.RequestError, UnicodeError) as error:
                    peer.refuse_hopeless(error)
                    reason = str(error) or type(error).__name__
                failures, most = (0, self.size()) if self.size() > most else (failures + 1, most)
                if failures >= self.tries:
                    break
                wait = max(wait, min(BACKOFF_SECONDS * 2**failures, _LONGEST_BACKOFF))
                if wait >= self.clock.left():
                    raise UnfinishedError(
                        f"cannot download {shown(self.url)} within {self.clock.deadline:g} s",
                        reason,
                        f"the next try is due in {wait:g} s",
                        "run it again later: it continues from what has arrived",
                    )
                time.sleep(wait)
        raise UnfinishedError(
            f"cannot download {shown(self.url)}",
            reason,
            f"{failures} attempts in a row received nothing; {self.size():,} bytes are kept",
            "check the network connection and run it again: it continues from there",
        )

    def _go_on(self, client: httpx.Client, peer: _Peer) -> None:
        """Take what one connection brings."""
        version, have = self._version(), self.size()
        if have and version is not None and have == version.total:
            return
        headers = self._range_headers(version, have)
        if not headers:
            self.drop()
        with contextlib.closing(_open(client, peer, self.url, headers, self.clock)) as answer:
            if answer.status_code == 416:
                self.drop()
                raise _TryAgainError("the server has no such part")
            _refuse_answer(answer)
            is_chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
            total = None if is_chunked else _number(answer.headers.get("Content-Length", ""))
            if answer.status_code == 206:
                total = self._resumed_total(answer, version, have if headers else -1, total)
            else:
                have = 0
                self._begin(answer, total)
            if total is None and not is_chunked and not self.verified_later and not self.ends_by_itself:
                raise HubError(
                    f"{shown(self.url)}: the server does not say how long the file is",
                    why="an interrupted download could not be distinguished from a complete one",
                    fix='give checksum="sha256:..." from the owner of the file',
                )
            self._receive(answer, have, total)

    def _receive(self, answer: httpx.Response, have: int, total: int | None) -> None:
        self._refuse_size(max(have, total or 0))
        with writing(self.path), self.path.open("ab") as file:
            for block in answer.iter_raw():
                have += len(block)
                self._refuse_size(have)
                file.write(block)
                self.report(have, total)
                if have == total:
                    break
                self.clock.left()
            file.flush()
            os.fsync(file.fileno())

    def _version(self) -> _Version | None:
        """What the note says; None if it is missing, unreadable, or of another address."""
        try:
            version = _Version(**read_json(self.note))
        except (OSError, ValueError, TypeError):
            return None
        return version if version.url_sha256 == _digest(self.url) else None

    def _begin(self, answer: httpx.Response, total: int | None) -> None:
        """Drop what is there and note what comes."""
        self.drop()
        version = _Version(_digest(self.url), _strong_etag(answer), answer.headers.get("Last-Modified", ""), total)
        with writing(self.path):
            self.note.write_text(json.dumps(asdict(version)), "utf-8")

    def _range_headers(self, version: _Version | None, have: int) -> dict[str, str]:
        """What asks for the rest; nothing if the rest could belong to another version unnoticed."""
        validator = version.etag or version.last_modified if version else ""
        if not have or version is None or not (validator or self.verified_later):
            return {}
        return {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})

    def _resumed_total(self, answer: httpx.Response, version: _Version | None, have: int, length: int | None) -> int:
        """The length of the whole file, after checking that the answer is the part that was asked for."""
        given, etag = answer.headers.get("Content-Range", ""), _strong_etag(answer)
        if version is not None and version.etag and etag and etag != version.etag:
            self.drop()
            raise _TryAgainError("the file changed on the server")
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", given)
        start, end, total = (int(part) for part in found.groups()) if found else (-1, -1, -1)
        announced = (version.total if version else None) or total
        if start != have or end != total - 1 or total != announced or length not in (None, total - have):
            self.drop()
            raise IntegrityError(
                f"{shown(str(answer.url))}: the server sent a part that was not requested",
                why=f"asked from byte {have:,}, got Content-Range {given!r}",
                fix="run it again: it starts from the beginning",
            )
        return total

    def _refuse_size(self, size: int) -> None:
        if size > self.max_bytes:
            self.drop()
            raise IntegrityError(
                f"{shown(self.url)}: the file is larger than {self.max_bytes:,} bytes",
                why="that is the most this download may take",
                fix=f"if it is meant to be that large: max_bytes={max(size, 2 * self.max_bytes)}",
            )


@dataclass(frozen=True)
class _Version:
    """Which bytes a partial file is a part of."""

    url_sha256: str
    etag: str = ""
    last_modified: str = ""
    total: int | None = None


def _refuse_answer(answer: httpx.Response) -> None:
    """_TryAgainError for a status that may pass; HubError or IntegrityError for others that bring no file."""
    status, url, encoding = answer.status_code, shown(str(answer.url)), answer.headers.get("Content-Encoding", "")
    if status in _PASSING:
        raise _TryAgainError(f"status {status}", _seconds(answer.headers.get("Retry-After", "")))
    if status not in (200, 206):
        fixes = {
            401: f"it requires a login: {_BY_HAND}",
            403: f"access is denied: {_BY_HAND}",
            410: "look for a new address: the file was taken down",
        }
        raise HubError(
            f"{url}: the server answered with status {status}",
            why=http.client.responses.get(status, "unknown status"),
            fix=fixes.get(status, "check the address"),
        )
    if encoding.lower() not in ("", "identity"):
        raise IntegrityError(
            f"{url}: the server compressed the file ({encoding!r}) although it was asked not to",
            why="the bytes would not be those of the file",
            fix=_BY_HAND,
        )


def _strong_etag(answer: httpx.Response) -> str:
    """The ETag, if it promises equal bytes; else an empty string."""
    etag: str = answer.headers.get("ETag", "")
    return "" if etag.startswith("W/") else etag


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _seconds(text: str) -> float:
    """What Retry-After asks for, as a number or a date."""
    if (number := _number(text)) is not None:
        return float(number)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


# ---- hosts and redirects


class _Peer:
    """Which host is being connected to; called by httpx at each step of a connection.

    The addresses of a name may change between two look-ups, so what counts is the address that was connected to. It is
    compared before anything is sent.
    """

    def __init__(self, public_only: bool) -> None:
        self.public_only = public_only
        #: A host that came from a redirect, or any host with `public_only`.
        self.must_be_public = ""
        self._host = ""

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            self._host = info["host"]  # that of the proxy, if there is one
        elif event == "connection.connect_tcp.complete" and self._host == self.must_be_public:
            address = info["return_value"].get_extra_info("server_addr")[0]
            if _is_private(address):
                info["return_value"].close()
                raise _private(self._host, address)

    def refuse_hopeless(self, error: BaseException | None) -> None:
        """HubError for a failure that another try would meet again."""
        import httpx2 as httpx

        what, asked = "", error.request.url.host if isinstance(error, httpx.RequestError) else self._host
        while error is not None:
            if isinstance(error, socket.gaierror | UnicodeError):
                what, fix = f"cannot find the host {self._host}", "check the address and the network connection"
            elif isinstance(error, ssl.SSLCertVerificationError):
                what = f"the certificate of {asked} is not valid"
                fix = "check the address; behind a company proxy set SSL_CERT_FILE to its certificate"
            elif isinstance(error, httpx.ProxyError):
                what, fix = f"the proxy {self._host} refused to connect", "check HTTPS_PROXY and NO_PROXY"
            if what:
                raise HubError(what, why=str(error), fix=fix) from error
            error = error.__cause__ or error.__context__


def _client() -> httpx.Client:
    import httpx2 as httpx

    direct = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
    try:
        # The proxies are those of the environment, but never for this machine itself.
        return httpx.Client(headers=_HEADERS, verify=ssl.create_default_context(), mounts=direct)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise HubError(
            "cannot use the proxy of the environment", why=str(error), fix="check HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        ) from error


def _open(client: httpx.Client, peer: _Peer, url: str, headers: dict[str, str], clock: Clock) -> httpx.Response:
    """The answer at the end of redirects to https, or to http on the host that was typed with http."""
    import httpx2 as httpx

    typed = here = httpx.URL(url)
    _require_public(peer, typed, typed)
    for _ in range(MAX_REDIRECTS + 1):
        extensions = {"trace": peer}
        asked = client.build_request("GET", here, headers=headers, timeout=clock.timeout(), extensions=extensions)
        answer = client.send(asked, stream=True)
        if not answer.has_redirect_location:
            return answer
        answer.close()
        location = answer.headers["Location"]
        try:
            there = here.join(location)
            has_address = bool(there.host) and (there.port is None or 0 < there.port < 2**16)
        except (ValueError, httpx.InvalidURL):
            there, has_address = here, False
        stays_http = there.scheme == here.scheme == "http" and there.host == typed.host
        if not has_address or not (there.scheme == "https" or stays_http):
            raise IntegrityError(
                f"refused a redirect from {shown(str(here))} to {shown(location)!r}",
                why="redirects are followed to https only",
                fix="check the address with its owner",
            )
        _require_public(peer, there, typed)
        here = there
    raise HubError(
        f"{shown(url)}: more than {MAX_REDIRECTS} redirects",
        why="the server redirects in a loop",
        fix="check the address",
    )


def _require_public(peer: _Peer, url: httpx.URL, typed: httpx.URL) -> None:
    """Let a host that was not typed, and every host with `public_only`, be refused if its address is private."""
    is_trusted = url.host == typed.host and not peer.public_only
    peer.must_be_public = "" if is_trusted else url.raw_host.decode("ascii")
    if peer.must_be_public:
        with contextlib.suppress(OSError, UnicodeError):  # behind a proxy names are resolved elsewhere
            for found in socket.getaddrinfo(url.host, None, type=socket.SOCK_STREAM):
                if _is_private(str(found[4][0])):
                    raise _private(url.host, str(found[4][0]))


def _is_private(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    plain = getattr(address, "ipv4_mapped", None) or address
    return not plain.is_global or plain.is_multicast


def _private(host: str, address: str) -> IntegrityError:
    return IntegrityError(
        f"refused to connect to {host} ({address})",
        why="it is a private address that you did not type",
        fix="check the address with its owner",
    )
