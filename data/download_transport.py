"""One answer to one address: connecting, TLS, proxies, and which redirects are followed.

Limits on hosts hold for addresses that come from a redirect. The address the user typed is used as it is.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from flashtask._version import __version__
from flashtask.core.errors import HubError, IntegrityError

__all__ = ["Answer", "Clock", "UnfinishedError", "open_url", "shown"]

MAX_REDIRECTS = 10
#: How long to wait for bytes beyond the stated length, in seconds; a sound server closes at once.
_OVERLONG_WAIT = 0.2
_CHUNK = 64 * 1024
_SAFE = "/%:@!$&'()*+,;=~-._"
_HEADERS = {
    "User-Agent": f"flashtask/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # a body packed for transport would not be the file
    "Connection": "close",
}


class UnfinishedError(HubError):
    """A download that has not come to its end, for lack of time or because the connection kept breaking.

    Args:
        what: as for every error.
        reason: what went wrong, in a few words.
        kept: what is said of the bytes that have arrived.
        fix: as for every error.
    """

    def __init__(self, what: str, reason: str, kept: str, fix: str) -> None:
        super().__init__(what, why=f"{reason}; {kept}", fix=fix)
        self.reason = reason


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


class Answer:
    """An open response; close it when done."""

    def __init__(self, url: str, response: http.client.HTTPResponse, sock: socket.socket) -> None:
        self.url, self.status, self._response, self._sock = url, response.status, response, sock

    def header(self, name: str) -> str:
        """A header's value, or an empty string."""
        return (self._response.getheader(name) or "").strip()

    def is_chunked(self) -> bool:
        """Whether the body says by itself where it ends."""
        return bool(self._response.chunked)

    def body(self, length: int | None, clock: Clock) -> Iterator[bytes]:
        """The bytes as they arrive; at most one more than `length`, to show a body that is too long."""
        source = self._response if self._response.chunked else self._response.fp
        left = length
        while left is None or left > 0:
            self._sock.settimeout(clock.timeout())
            block = source.read1(_CHUNK if left is None else min(_CHUNK, left))
            if not block:
                return
            left = None if left is None else left - len(block)
            yield block
        self._sock.settimeout(_OVERLONG_WAIT)
        try:
            yield source.read1(1)
        except OSError:
            return

    def close(self) -> None:
        """Hang up."""
        self._response.close()
        self._sock.close()


def shown(url: str) -> str:
    """An address for messages and files: without its query, which may hold a secret."""
    return url.partition("?")[0].partition("#")[0]


def open_url(url: str, headers: dict[str, str], clock: Clock) -> Answer:
    """Ask for an address and follow redirects to https, or to http on the host that was typed with http.

    Raises:
        IntegrityError: a redirect leads to http, another scheme or a private host.
        HubError: the name has no address, the certificate is wrong, or redirects do not end.
        OSError, http.client.HTTPException: the connection failed; worth another try.
    """
    typed = here = urlsplit(url)
    for _ in range(MAX_REDIRECTS + 1):
        answer = _ask(here, headers, clock, must_be_public=here.hostname != typed.hostname)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        location = answer.header("Location")
        answer.close()
        here = _redirected(here, location, typed)
    raise HubError(
        f"{shown(url)}: more than {MAX_REDIRECTS} redirects",
        why="the server redirects in a loop",
        fix="check the address",
    )


def _redirected(here: SplitResult, location: str, typed: SplitResult) -> SplitResult:
    try:
        there = urlsplit(urljoin(here.geturl(), location))
        has_address = bool(there.hostname) and (there.port is None or there.port > 0)
    except ValueError:
        there, has_address = here, False
    stays_http = there.scheme == here.scheme == "http" and there.hostname == typed.hostname
    if not has_address or not (there.scheme == "https" or stays_http):
        raise IntegrityError(
            f"refused a redirect from {shown(here.geturl())} to {shown(location)!r}",
            why="redirects are followed to https only",
            fix="check the address with its owner",
        )
    return there


def _ask(url: SplitResult, headers: dict[str, str], clock: Clock, *, must_be_public: bool) -> Answer:
    host = url.hostname or ""
    proxy = _proxy_for(url)
    addresses = _addresses(url, must_be_public=must_be_public) if proxy is None else []
    if proxy is not None and must_be_public:
        _refuse_private(host, [host])
    make = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = make(host, url.port, timeout=clock.timeout())
    target = quote(url.path or "/", safe=_SAFE) + (f"?{quote(url.query, safe=_SAFE + '?[]')}" if url.query else "")
    headers = _HEADERS | headers
    try:
        # The socket is made here and not by http.client, so that the address checked is the address used.
        if proxy is None:
            connection.sock = _connected(addresses, connection.port, clock)
        else:
            connection.sock = _connected([proxy.hostname or ""], proxy.port or 80, clock)
            if url.scheme == "https":
                _tunnel(connection.sock, f"{host}:{connection.port}", proxy)
            else:
                target = f"http://{url.netloc}{target}"
                headers |= _proxy_login(proxy)
        if url.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        sock = connection.sock
        connection.request("GET", target, headers=headers)
        return Answer(url.geturl(), connection.getresponse(), sock)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise HubError(
            f"the certificate of {host} is not valid",
            why=error.verify_message,
            fix="check the address; behind a company proxy set SSL_CERT_FILE to its certificate",
        ) from error
    except BaseException:
        connection.close()
        raise


def _connected(hosts: list[str], port: int, clock: Clock) -> socket.socket:
    for host in hosts[:-1]:
        try:
            return socket.create_connection((host, port), timeout=clock.timeout())
        except OSError:
            continue  # the next address of the same host
    return socket.create_connection((hosts[-1], port), timeout=clock.timeout())


def _addresses(url: SplitResult, *, must_be_public: bool) -> list[str]:
    host = url.hostname or ""
    try:
        found = socket.getaddrinfo(host, url.port or url.scheme, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise HubError(
            f"cannot find the host {host}", why=str(error), fix="check the address and the network connection"
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if must_be_public:
        _refuse_private(host, addresses)
    return addresses


def _refuse_private(host: str, addresses: list[str]) -> None:
    for text in addresses:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            is_private = text.rstrip(".").lower().endswith("localhost")
        else:
            address = getattr(address, "ipv4_mapped", None) or address
            is_private = not address.is_global or address.is_multicast
        if is_private:
            raise IntegrityError(
                f"refused a redirect to {host} ({text})",
                why="it is a private address that you did not type",
                fix="check the address with its owner",
            )


def _proxy_for(url: SplitResult) -> SplitResult | None:
    """The proxy of the environment (HTTPS_PROXY, NO_PROXY, ...), never for this machine itself."""
    host = url.hostname or ""
    proxy = urllib.request.getproxies().get(url.scheme)
    if not proxy or host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(url.netloc):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _tunnel(sock: socket.socket, authority: str, proxy: SplitResult) -> None:
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in _proxy_login(proxy).items()]
    sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    reply = http.client.HTTPResponse(sock, method="CONNECT")
    reply.begin()
    if reply.status != 200:
        raise HubError(
            f"the proxy {proxy.hostname} refused to connect to {authority}",
            why=f"status {reply.status} {reply.reason}",
            fix="check HTTPS_PROXY and NO_PROXY",
        )


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode("ascii")}
