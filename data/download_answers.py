"""What a server's answer means: take the body, try again later, or give up."""

from __future__ import annotations

import email.utils
import http.client
import re
import time

from flashtask.core.errors import HubError, IntegrityError
from flashtask.data.download_transport import Answer, shown

__all__ = ["TryAgainError", "refuse_encoding", "refuse_status", "stated_length", "strong_etag"]

_PASSING = (408, 425, 429, 500, 502, 503, 504)
_BY_HAND = "download it in a browser and give the path of the file instead of the address"


class TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def refuse_status(answer: Answer) -> None:
    """TryAgainError for a status that may pass, HubError for any other that brings no file."""
    if answer.status in (200, 206):
        return
    if answer.status in _PASSING:
        raise TryAgainError(f"status {answer.status}", _retry_after(answer))
    fixes = {
        401: f"it requires a login: {_BY_HAND}",
        403: f"access is denied: {_BY_HAND}",
        404: "check the address",
        410: "look for a new address: the file was taken down",
    }
    raise HubError(
        f"{shown(answer.url)}: the server answered with status {answer.status}",
        why=http.client.responses.get(answer.status, "unknown status"),
        fix=fixes.get(answer.status, "check the address"),
    )


def refuse_encoding(answer: Answer) -> None:
    """IntegrityError if the body is packed for transport."""
    encoding = answer.header("Content-Encoding").lower()
    if encoding not in ("", "identity"):
        raise IntegrityError(
            f"{shown(answer.url)}: the server compressed the file ({encoding!r}) although it was asked not to",
            why="the bytes would not be those of the file",
            fix=_BY_HAND,
        )


def _retry_after(answer: Answer) -> float:
    """Seconds the server asks to wait, given as a number or a date."""
    text = answer.header("Retry-After")
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def stated_length(answer: Answer) -> int | None:
    """Bytes of the body as the header says; None if it does not."""
    text = answer.header("Content-Length")
    return int(text) if re.fullmatch(r"\d{1,18}", text) and not answer.is_chunked() else None


def strong_etag(answer: Answer) -> str:
    """The ETag, if it promises equal bytes; else an empty string."""
    etag = answer.header("ETag")
    return "" if etag.startswith("W/") else etag
