"""`download_data`: from an address (or an archive on disk) to a folder of data: once, checked, unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flashtask.core.errors import HubError, IntegrityError, MissingInputError, OutputError, UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.plain_json import read_json
from flashtask.data.archive import HIDDEN, ArchiveLimits, is_archive, name_taken, names_in, place, staging_for, unpack
from flashtask.data.download_resume import Clock, Download, UnfinishedError, shown, writing

__all__ = ["check_address", "download_data", "download_image"]

#: Start of the names of all files that a download keeps for itself.
_PREFIX = f"{HIDDEN}download-"


@dataclass(frozen=True)
class _Source:
    """Where the data comes from, and its checksum if one was given. `stamp` changes with a local archive."""

    address: str
    name: str
    checksum: str
    stamp: str = ""

    @property
    def key(self) -> str:
        """What tells this source from others in file names."""
        return hashlib.sha256(self.address.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def marker(self) -> str:
        """Name of the file that says, in the data folder, that this source was put there."""
        return f"{_PREFIX}{self.key}.json"


@named_arguments
def download_data(
    url: str | Path,
    folder: str | Path = ".",
    *,
    checksum: str | None = None,
    filename: str | None = None,
    allow_http: bool = False,
    max_bytes: int = 256 * 2**30,
    timeout: float = 30.0,
    deadline: float = 12 * 3600.0,
    limits: ArchiveLimits | None = None,
    progress: bool | None = None,
) -> Path:
    """Download a zip or tar archive and unpack it into a folder; any other file is put there as it is.

    What arrives is kept in a hidden file and gone on with after a cut or a kill. It gets its place only when
    it is whole and its checksum, if given, is right. A second call with the same address makes no request.

    Args:
        url: an https address, or the path of an archive on this machine. An http address needs `checksum` or
            `allow_http=True`.
        folder: where the content goes; made if it does not exist. Nothing in it is overwritten.
        checksum: `sha256:` and 64 hex digits, the 64 digits alone, or `md5:` and 32 digits.
        filename: name of the file, if the address does not end in it; the suffix tells archives from files.
        allow_http: take an http address without a checksum.
        max_bytes: the most that is downloaded.
        timeout: seconds without a byte after which a connection is given up and tried again.
        deadline: seconds for the whole download.
        limits: how much an archive may unpack to; `ArchiveLimits()` if not given.
        progress: show a progress bar on stderr; by default if that is a terminal.

    Returns:
        `folder` as an absolute path.

    Raises:
        UsageError: an address or checksum that cannot be meant.
        HubError: the server cannot be reached or refuses (exit code 69).
        IntegrityError: a wrong checksum, a refused redirect, a damaged or hostile archive (exit code 76).
        MissingInputError: the path does not exist.
        OutputError, StorageError: the folder cannot be written, or holds a name that the archive brings.
    """
    folder = Path(os.path.abspath(folder))
    wanted, limits, is_local = _parsed_checksum(checksum), limits or ArchiveLimits(), "://" not in str(url)
    source = _local_source(Path(url), wanted) if is_local else _remote_source(str(url), filename, wanted, allow_http)
    if _is_there(source, folder):
        return folder
    clock = Clock(deadline, timeout)
    with _one_at_a_time(source, folder, clock) as home:
        if _is_there(source, folder):
            return folder
        if is_local:
            file = Path(source.address)
            _fill(folder, file, source, _verified(file, source), limits)
            return folder
        file, sha256 = _downloaded(source, max_bytes, home, clock, progress)
        try:
            _fill(folder, file, source, sha256, limits)
        except IntegrityError:
            file.unlink(missing_ok=True)
            raise
        file.unlink(missing_ok=True)
    return folder


def check_address(url: str) -> None:
    """Refuse an address that no image can be fetched from; plain http is taken, since the user typed it.

    Raises:
        UsageError: it is neither http nor https, or has a user name in it.
    """
    _remote_source(url, "image", "", allow_http=True)


def download_image(
    url: str,
    path: Path,
    *,
    max_bytes: int = 256 * 2**20,
    timeout: float = 15.0,
    deadline: float = 60.0,
    public_only: bool = False,
) -> None:
    """Fetch the image at one address into a file, with the limits and the redirect rules of `download_data`.

    Args:
        url: an http or https address, as the user typed it.
        path: the file to write; what is there is replaced.
        max_bytes: the most that is downloaded.
        timeout: seconds without a byte after which a connection is given up and tried again.
        deadline: seconds for the whole download.
        public_only: refuse a host with a private address, as for an address that a stranger sent.

    Raises:
        HubError: the server cannot be reached or refuses (exit code 69).
        IntegrityError: a refused host or redirect, or more than `max_bytes` (exit code 76).
        UsageError: as `check_address`.
        StorageError: the file cannot be written.
    """
    source = _remote_source(url, "image", "", allow_http=True)
    # A picture is decoded to its last byte, which shows a cut that the server did not announce.
    download = Download(
        source.address,
        path,
        Clock(deadline, timeout),
        max_bytes,
        ends_by_itself=True,
        tries=3,
        public_only=public_only,
    )
    try:
        download.fetch()
    except UnfinishedError as error:
        raise HubError(
            f"cannot download {shown(url)}", why=error.reason, fix="check the address and the network connection"
        ) from error
    except IntegrityError as error:
        if "max_bytes=" in error.fix:
            error.fix = "download it yourself and give the path of the file"
        raise
    finally:
        download.note.unlink(missing_ok=True)


# ---- what was asked for


def _parsed_checksum(text: str | None) -> str:
    """A checksum as `sha256:...` or `md5:...`; empty without one."""
    if text is None:
        return ""
    found = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})|(md5:[0-9a-f]{32})", text.strip().lower())
    if found is None:
        is_md5 = re.fullmatch(r"[0-9a-fA-F]{32}", text.strip())
        raise UsageError(
            f"{text!r} is not a checksum",
            why="it has to be sha256:<64 hex digits> or md5:<32 hex digits>",
            fix=f'checksum="md5:{text.strip()}"' if is_md5 else "sha256sum FILE prints one",
        )
    return found[2] or f"sha256:{found[1]}"


def _local_source(path: Path, wanted: str) -> _Source:
    if not path.is_file():
        raise MissingInputError(f"no archive at {path}", fix="check the path, or give an https:// address")
    if not is_archive(path, path.name):
        raise UsageError(f"{path} is not a zip or tar archive", fix="copy it into the folder yourself")
    stat = path.stat()
    return _Source(os.path.abspath(path), path.name, wanted, f"{stat.st_size}-{stat.st_mtime_ns}")


def _remote_source(url: str, filename: str | None, wanted: str, allow_http: bool) -> _Source:
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
    if parts.scheme == "http" and not allow_http and not wanted:
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
    return _Source(parts._replace(fragment="").geturl(), name, wanted)


# ---- fetching, verifying, putting in place


def _is_there(source: _Source, folder: Path) -> bool:
    """Whether an earlier call put this into the folder and it is still complete; if so, prints a line on stderr."""
    try:
        marker = read_json(folder / source.marker, most=2**26)
        same = marker["stamp"] == source.stamp and all(os.path.lexists(folder / name) for name in marker["entries"])
        known = ("", marker["checksum"], f"sha256:{marker['sha256']}")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not same or source.checksum not in known:
        return False
    print(f"{source.name} is in {folder} already: nothing to download", file=sys.stderr)
    return True


def _downloaded(source: _Source, max_bytes: int, home: Path, clock: Clock, progress: bool | None) -> tuple[Path, str]:
    """The whole file under its hidden final name, which only verified bytes ever have, and its sha256."""
    final = home / f"{_PREFIX}{source.key}.data"
    if final.is_file():
        # An earlier call got this far and could not unpack it, for instance for lack of space.
        with contextlib.suppress(IntegrityError):
            return final, _verified(final, source)
        final.unlink()
    download = Download(source.address, home / f"{_PREFIX}{source.key}.part", clock, max_bytes, bool(source.checksum))
    with _progress_bar(source.name, progress) as download.report:
        download.fetch()
    try:
        sha256 = _verified(download.path, source)
    except IntegrityError:
        download.drop()
        raise
    with writing(final):
        os.replace(download.path, final)
    download.drop()
    return final, sha256


def _verified(path: Path, source: _Source) -> str:
    """The file's sha256, after comparing the checksum."""
    sha256 = _digest(path, "sha256")
    method, _, wanted = source.checksum.partition(":")
    found = _digest(path, method) if method == "md5" else sha256
    if wanted and found != wanted:
        raise IntegrityError(
            f"{shown(source.address)} is not the file that was asked for",
            why=f"its {method} is {found}, wanted {wanted} ({path.stat().st_size:,} bytes)",
            fix="check the checksum with the owner of the file; nothing was unpacked",
        )
    return sha256


def _digest(path: Path, method: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(method, usedforsecurity=False)).hexdigest()


def _fill(folder: Path, file: Path, source: _Source, sha256: str, limits: ArchiveLimits) -> None:
    """Put the content and the marker into the folder in one go."""
    with staging_for(folder) as staging:
        if is_archive(file, source.name):
            entries = list(unpack(file, staging, limits, taken=names_in(folder), called=source.name))
        else:
            if os.path.lexists(folder / source.name):
                raise name_taken(str(folder / source.name))
            os.replace(file, staging / source.name)
            entries = [source.name]
        marker = {
            "url": shown(source.address),
            "checksum": source.checksum or f"sha256:{sha256}",
            "sha256": sha256,
            "stamp": source.stamp,
            "entries": entries,
        }
        with writing(folder / source.marker):
            (staging / source.marker).write_text(json.dumps(marker, indent=1), "utf-8")
        place(staging, folder, last=source.marker)


@contextlib.contextmanager
def _one_at_a_time(source: _Source, folder: Path, clock: Clock) -> Iterator[Path]:
    """The folder for hidden files, while no other process works on the same download."""
    home = folder if folder.is_dir() else folder.parent
    path = home / f"{_PREFIX}{source.key}.lock"
    try:
        home.mkdir(parents=True, exist_ok=True)
        while not _is_locked(lock := os.open(path, os.O_RDWR | os.O_CREAT, 0o644), path):
            os.close(lock)
            time.sleep(min(0.1, clock.left()))
    except HubError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {home}", why=str(error), fix="choose another folder") from error
    try:
        yield home
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _is_locked(lock: int, path: Path) -> bool:
    """Whether this process now has the lock, and the file still has its name: the last owner removes it."""
    try:
        import fcntl
    except ImportError:  # Windows: concurrent downloads of one file are not kept apart there
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _progress_bar(name: str, wanted: bool | None) -> Iterator[Callable[[int, int | None], None]]:
    """A function that takes (bytes so far, bytes in all) and shows them on stderr."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
