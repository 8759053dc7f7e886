"""What a repository holds at one commit: names, sizes and hashes; it never changes, so it is kept."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.core.errors import FlashtaskError, IntegrityError
from flashtask.core.files import atomic_write_text
from flashtask.core.plain_json import canonical_json, read_json

__all__ = ["Entry", "Listing", "is_safe_name", "load_listing", "save_listing"]

_DIGITS = {"sha256": 64, "git": 40}
_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One file: its size in bytes, and its hash. `method` is sha256 (large files) or git (sha1 as git does it)."""

    size: int
    method: str
    digest: str

    def __post_init__(self) -> None:
        """Refuse a hash that cannot be one, or a size that is none."""
        is_hash = re.fullmatch(rf"[0-9a-f]{{{_DIGITS.get(self.method, 0)}}}", self.digest)
        if self.method not in _DIGITS or not is_hash or type(self.size) is not int or self.size < 0:
            raise IntegrityError("the hub gives no size and hash for a file", fix="check HF_ENDPOINT")

    @property
    def key(self) -> str:
        """Method and digest in one word."""
        return f"{self.method}:{self.digest}"


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


def save_listing(path: Path, listing: Listing) -> None:
    """Keep a listing, with a hash of its own."""
    files = {name: [entry.size, entry.method, entry.digest] for name, entry in listing.files.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"commit": listing.commit, "files": files}
    atomic_write_text(path, canonical_json({"sha256": _hash(content), "listing": content}))


def load_listing(path: Path, commit: str) -> Listing | None:
    """What `save_listing` kept for this commit; None if there is nothing, or it is damaged."""
    try:
        found: Any = read_json(path, most=2**26)
        content = found["listing"]
        if content["commit"] != commit or found["sha256"] != _hash(content):
            return None
        return Listing(commit, {name: Entry(*entry) for name, entry in content["files"].items()})
    except (OSError, FlashtaskError, KeyError, TypeError, AttributeError):
        return None


def _hash(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
