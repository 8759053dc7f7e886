"""All bytes of one address into one partial file: going on after cuts, trying again."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flashtask.core.errors import FlashtaskError, HubError, IntegrityError, StorageError
from flashtask.core.plain_json import read_json
from flashtask.data.download_answers import (
    TryAgainError,
    refuse_encoding,
    refuse_status,
    stated_length,
    strong_etag,
)
from flashtask.data.download_transport import Answer, Clock, UnfinishedError, open_url, shown

__all__ = ["Partial", "Request", "fetch", "writing"]

#: Tries in a row that bring no new byte.
MAX_FAILURES = 6
#: Connections in all, however little each brings.
MAX_CONNECTIONS = 1000
#: Seconds before the next try; doubled after each that brings nothing.
BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF = 30.0


@dataclass(frozen=True)
class Request:
    """What to fetch.

    Args:
        url: the address.
        max_bytes: the most that is taken.
        verified_later: a checksum will prove length and version.
        ends_by_itself: what is fetched shows by itself whether it is whole, so its length need not be announced.
        tries: in a row that bring no new byte, before it is given up.
    """

    url: str
    max_bytes: int
    verified_later: bool
    ends_by_itself: bool = False
    tries: int = MAX_FAILURES


@dataclass(frozen=True)
class _Version:
    """Which bytes the partial file is a part of."""

    url_sha256: str
    etag: str = ""
    last_modified: str = ""
    total: int | None = None


class Partial:
    """A file on its way and, beside it, a note of which version of which address it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note = path.with_name(path.name + ".json")

    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self, url: str) -> _Version | None:
        """What the note says; None if there is none, it is of another address, or unreadable."""
        try:
            version = _Version(**read_json(self.note))
        except (OSError, ValueError, TypeError):
            return None
        return version if version.url_sha256 == _digest(url) else None

    def begin(self, version: _Version) -> None:
        """Drop what is there and note what comes."""
        self.drop()
        with writing(self.path):
            self.note.write_text(json.dumps(asdict(version)), "utf-8")

    def drop(self) -> None:
        """Remove file and note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def fetch(request: Request, partial: Partial, clock: Clock, report: Callable[[int, int | None], None]) -> None:
    """Bring `partial` to its full length; what is there already is not asked for again.

    Args:
        request: what to fetch.
        partial: where it goes; kept when this fails and may go on later.
        clock: deadline and stall time-out.
        report: called with (bytes so far, bytes in all or None).

    Raises:
        HubError: the server cannot be reached, refuses, or keeps failing.
        IntegrityError: what it sends is not what it says, or more than `max_bytes`.
        StorageError: the file cannot be written.
    """
    failures, most = 0, partial.size()
    for _ in range(MAX_CONNECTIONS):
        try:
            _one_connection(request, partial, clock, report)
            return
        except FlashtaskError:
            raise
        except (TryAgainError, OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            wait = error.wait if isinstance(error, TryAgainError) else 0.0
        if partial.size() > most:
            failures, most = 0, partial.size()
        else:
            failures += 1
        if failures >= request.tries:
            break
        _pause(
            max(wait, min(BACKOFF_SECONDS * 2**failures, _LONGEST_BACKOFF)),
            reason,
            request.url,
            clock,
        )
    raise UnfinishedError(
        f"cannot download {shown(request.url)}",
        reason,
        f"{failures} attempts in a row received nothing; {partial.size():,} bytes are kept",
        "check the network connection and run it again: it continues from there",
    )


def _one_connection(
    request: Request, partial: Partial, clock: Clock, report: Callable[[int, int | None], None]
) -> None:
    version, have = partial.version(request.url), partial.size()
    if have and version is not None and have == version.total:
        return
    headers = _range_headers(version, have, request)
    if not headers:
        partial.drop()
    answer = open_url(request.url, headers, clock)
    with contextlib.closing(answer):
        if answer.status == 416:
            partial.drop()
            raise TryAgainError("the server has no such part")
        refuse_status(answer)
        refuse_encoding(answer)
        if answer.status == 206:
            total: int | None = _resumed_total(answer, version, have if headers else -1, partial)
        else:
            total = stated_length(answer)
            partial.begin(_Version(_digest(request.url), strong_etag(answer), answer.header("Last-Modified"), total))
        is_sure = request.verified_later or request.ends_by_itself
        if total is None and not answer.is_chunked() and not is_sure:
            raise HubError(
                f"{shown(request.url)}: the server does not say how long the file is",
                why="an interrupted download could not be distinguished from a complete one",
                fix='give checksum="sha256:..." from the owner of the file',
            )
        _receive(answer, request, partial, total, clock, report)


def _receive(
    answer: Answer,
    request: Request,
    partial: Partial,
    total: int | None,
    clock: Clock,
    report: Callable[[int, int | None], None],
) -> None:
    have = partial.size()
    _refuse_size(max(have, total or 0), request, partial)
    with writing(partial.path), partial.path.open("ab") as file:
        blocks = answer.body(None if total is None else total - have, clock)
        while block := _next_block(blocks):
            have += len(block)
            _refuse_size(have, request, partial)
            if total is not None and have > total:
                partial.drop()
                raise IntegrityError(
                    f"{shown(request.url)}: the server sent more than the {total:,} bytes it announced",
                    fix="run it again; if it happens again, tell the owner of the server",
                )
            file.write(block)
            report(have, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise TryAgainError(f"the connection ended at {have:,} of {total:,} bytes")


def _next_block(blocks: Iterator[bytes]) -> bytes:
    """The next bytes of the body; failures of the network are marked, to tell them from the disk's."""
    try:
        return next(blocks, b"")
    except FlashtaskError:
        raise
    except TimeoutError as error:
        raise TryAgainError("the server stopped sending") from error
    except (OSError, http.client.HTTPException) as error:
        raise TryAgainError(f"the connection broke ({error or type(error).__name__})") from error


def _range_headers(version: _Version | None, have: int, request: Request) -> dict[str, str]:
    """What asks for the rest; nothing if the rest could belong to another version unnoticed."""
    if not have or version is None:
        return {}
    validator = version.etag or version.last_modified
    if not validator and not request.verified_later:
        return {}
    return {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})


def _resumed_total(answer: Answer, version: _Version | None, have: int, partial: Partial) -> int:
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.header("Content-Range"))
    etag = strong_etag(answer)
    if version is not None and version.etag and etag and etag != version.etag:
        partial.drop()
        raise TryAgainError("the file changed on the server")
    start, end, total = (int(part) for part in found.groups()) if found else (-1, -1, -1)
    length = stated_length(answer)
    announced = (version.total if version else None) or total
    if start != have or end != total - 1 or total != announced or length not in (None, total - have):
        partial.drop()
        raise IntegrityError(
            f"{shown(answer.url)}: the server sent a part that was not requested",
            why=f"asked from byte {have:,}, got Content-Range {answer.header('Content-Range')!r}",
            fix="run it again: it starts from the beginning",
        )
    return total


def _refuse_size(size: int, request: Request, partial: Partial) -> None:
    if size > request.max_bytes:
        partial.drop()
        raise IntegrityError(
            f"{shown(request.url)}: the file is larger than {request.max_bytes:,} bytes",
            why="that is the most this download may take",
            fix=f"if it is meant to be that large: max_bytes={max(size, 2 * request.max_bytes)}",
        )


def _pause(seconds: float, reason: str, url: str, clock: Clock) -> None:
    if seconds >= clock.left():
        raise UnfinishedError(
            f"cannot download {shown(url)} within {clock.deadline:g} s",
            reason,
            f"the next try is due in {seconds:g} s",
            "run it again later: it continues from what has arrived",
        )
    time.sleep(seconds)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


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
