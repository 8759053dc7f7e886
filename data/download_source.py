"""What a download starts from: the address or path a user wrote, and the checksum that goes with it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.data.archive import is_archive
from flashtask.data.archive_names import HIDDEN
from flashtask.data.download_transport import shown

__all__ = ["PREFIX", "Checksum", "Source", "file_digest", "local_source", "remote_source"]

#: Start of the names of all files that a download keeps for itself.
PREFIX = f"{HIDDEN}download-"


@dataclass(frozen=True)
class Checksum:
    """What the bytes of a file have to hash to; `method` is sha256 or md5."""

    method: str
    digest: str

    @classmethod
    def parse(cls, text: str | None) -> Checksum | None:
        """The checksum a user wrote; UsageError if it is none."""
        if text is None:
            return None
        found = re.fullmatch(r"(?:(sha256):)?([0-9a-f]{64})|(md5):([0-9a-f]{32})", text.strip().lower())
        if found is None:
            is_md5 = re.fullmatch(r"[0-9a-fA-F]{32}", text.strip())
            raise UsageError(
                f"{text!r} is not a checksum",
                why="it has to be sha256:<64 hex digits> or md5:<32 hex digits>",
                fix=f'checksum="md5:{text.strip()}"' if is_md5 else "sha256sum FILE prints one",
            )
        return cls(found[1] or found[3] or "sha256", found[2] or found[4])

    def __str__(self) -> str:
        return f"{self.method}:{self.digest}"


@dataclass(frozen=True)
class Source:
    """Where the data comes from. `stamp` changes with a local archive; an address has none."""

    address: str
    name: str
    stamp: str = ""

    @property
    def key(self) -> str:
        """What tells this source from others in file names."""
        return hashlib.sha256(self.address.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def marker(self) -> str:
        """Name of the file that says, in the data folder, that this source was put there."""
        return f"{PREFIX}{self.key}.json"


def local_source(path: Path) -> Source:
    """An archive on this machine."""
    if not path.is_file():
        raise MissingInputError(f"no archive at {path}", fix="check the path, or give an https:// address")
    if not is_archive(path, path.name):
        raise UsageError(f"{path} is not a zip or tar archive", fix="copy it into the folder yourself")
    stat = path.stat()
    return Source(os.path.abspath(path), path.name, f"{stat.st_size}-{stat.st_mtime_ns}")


def remote_source(url: str, filename: str | None, wanted: Checksum | None, allow_http: bool) -> Source:
    """An address, after the checks of its scheme, host and file name."""
    try:
        parts = urlsplit(url)
        has_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, has_address = urlsplit(""), False
    if parts.scheme not in ("https", "http") or not has_address or re.search(r"[\x00-\x20\x7f]", url):
        fix = f"give the path alone: download_data({unquote(parts.path)!r})" if parts.scheme == "file" else ""
        raise UsageError(f"cannot download {shown(url)!r}", why="it is not an https address", fix=fix or "https://...")
    if parts.username is not None:
        raise UsageError(
            "an address with a user name or password is not accepted",
            why="it would end up in logs and files",
            fix="download it in a browser and give the path of the file",
        )
    if parts.scheme == "http" and not allow_http and wanted is None:
        raise UsageError(
            f"{shown(url)} is plain http",
            why="anyone on the network path can change the file",
            fix=f'use https, or give checksum="sha256:...", or allow_http=True: {shown(url)}',
        )
    name = filename or unquote(parts.path.rpartition("/")[2])
    if not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f:]", name) or len(name.encode()) > 255:
        raise UsageError(
            f"the address gives no usable file name ({name!r})",
            why="files are never named by the server",
            fix='give one: filename="data.zip"',
        )
    return Source(parts._replace(fragment="").geturl(), name)


def file_digest(path: Path, method: str) -> str:
    """A file's hash in hex; `method` is sha256 or md5."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(method, usedforsecurity=False)).hexdigest()
