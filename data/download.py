"""`download_data`: from an address (or an archive on disk) to a folder of data: once, checked, unpacked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flashtask.core.errors import HubError, IntegrityError, OutputError
from flashtask.core.keywords import named_arguments
from flashtask.core.plain_json import read_json
from flashtask.data.archive import ArchiveLimits, is_archive, name_taken, place, staging_for, unpack
from flashtask.data.download_resume import Partial, Request, fetch, writing
from flashtask.data.download_source import PREFIX, Checksum, Source, file_digest, local_source, remote_source
from flashtask.data.download_transport import Clock, UnfinishedError, shown

__all__ = ["check_address", "download_data", "download_image"]


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
    wanted = Checksum.parse(checksum)
    is_local = "://" not in str(url)
    source = local_source(Path(url)) if is_local else remote_source(str(url), filename, wanted, allow_http)
    if _is_there(source, wanted, folder):
        return folder
    clock = Clock(deadline, timeout)
    with _one_at_a_time(source, folder, clock) as home:
        if _is_there(source, wanted, folder):
            return folder
        if is_local:
            archive = Path(source.address)
            sha256 = _verified(archive, source, wanted)
        else:
            request = Request(source.address, max_bytes, verified_later=wanted is not None)
            archive, sha256 = _downloaded(request, source, wanted, home, clock, progress)
        try:
            _fill(folder, archive, source, wanted, sha256, limits or ArchiveLimits())
        except IntegrityError:
            if not is_local:
                archive.unlink(missing_ok=True)
            raise
        if not is_local:
            archive.unlink(missing_ok=True)
    return folder


def check_address(url: str) -> None:
    """Refuse an address that no image can be fetched from; plain http is taken, since the user typed it.

    Raises:
        UsageError: it is neither http nor https, or has a user name in it.
    """
    remote_source(url, "image", None, allow_http=True)


def download_image(
    url: str, path: Path, *, max_bytes: int = 256 * 2**20, timeout: float = 15.0, deadline: float = 60.0
) -> None:
    """Fetch the image at one address into a file, with the limits and the redirect rules of `download_data`.

    Args:
        url: an http or https address, as the user typed it.
        path: the file to write; what is there is replaced.
        max_bytes: the most that is downloaded.
        timeout: seconds without a byte after which a connection is given up and tried again.
        deadline: seconds for the whole download.

    Raises:
        HubError: the server cannot be reached or refuses (exit code 69).
        IntegrityError: a refused redirect, or more than `max_bytes` (exit code 76).
        UsageError: as `check_address`.
        StorageError: the file cannot be written.
    """
    source = remote_source(url, "image", None, allow_http=True)
    partial = Partial(path)
    # A picture is decoded to its last byte, which shows a cut that the server did not announce.
    request = Request(source.address, max_bytes, verified_later=False, ends_by_itself=True, tries=3)
    try:
        fetch(request, partial, Clock(deadline, timeout), lambda done, total: None)
    except UnfinishedError as error:
        raise HubError(
            f"cannot download {shown(url)}", why=error.reason, fix="check the address and the network connection"
        ) from error
    except IntegrityError as error:
        if "max_bytes=" in error.fix:
            error.fix = "download it yourself and give the path of the file"
        raise
    finally:
        partial.note.unlink(missing_ok=True)


def _is_there(source: Source, wanted: Checksum | None, folder: Path) -> bool:
    """Whether an earlier call put this into the folder and it still stands there; says so on stderr."""
    try:
        marker = read_json(folder / source.marker, most=2**26)
        same = marker["stamp"] == source.stamp and all(os.path.lexists(folder / name) for name in marker["entries"])
        known = (marker["checksum"], f"sha256:{marker['sha256']}")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not same or (wanted is not None and str(wanted) not in known):
        return False
    print(f"{source.name} is in {folder} already: nothing to download", file=sys.stderr)
    return True


def _downloaded(
    request: Request,
    source: Source,
    wanted: Checksum | None,
    home: Path,
    clock: Clock,
    progress: bool | None,
) -> tuple[Path, str]:
    """The whole file under its hidden final name, which only verified bytes ever have, and its sha256."""
    final = home / f"{PREFIX}{source.key}.data"
    if final.is_file():
        # An earlier call got this far and could not unpack it, for instance for lack of space.
        with contextlib.suppress(IntegrityError):
            return final, _verified(final, source, wanted)
        final.unlink()
    partial = Partial(home / f"{PREFIX}{source.key}.part")
    with _progress_bar(source.name, progress) as report:
        fetch(request, partial, clock, report)
    try:
        sha256 = _verified(partial.path, source, wanted)
    except IntegrityError:
        partial.drop()
        raise
    with writing(final):
        os.replace(partial.path, final)
    partial.drop()
    return final, sha256


def _verified(path: Path, source: Source, wanted: Checksum | None) -> str:
    """The file's sha256, after comparing the checksum."""
    sha256 = file_digest(path, "sha256")
    if wanted is not None:
        found = sha256 if wanted.method == "sha256" else file_digest(path, wanted.method)
        if found != wanted.digest:
            raise IntegrityError(
                f"{shown(source.address)} is not the file that was asked for",
                why=f"its {wanted.method} is {found}, wanted {wanted.digest} ({path.stat().st_size:,} bytes)",
                fix="check the checksum with the owner of the file; nothing was unpacked",
            )
    return sha256


def _fill(
    folder: Path,
    file: Path,
    source: Source,
    wanted: Checksum | None,
    sha256: str,
    limits: ArchiveLimits,
) -> None:
    """Put the content and the marker into the folder in one go."""
    with staging_for(folder) as staging:
        if is_archive(file, source.name):
            taken = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset[str]()
            entries = list(unpack(file, staging, limits, taken=taken, called=source.name))
        else:
            if os.path.lexists(folder / source.name):
                raise name_taken(str(folder / source.name))
            os.replace(file, staging / source.name)
            entries = [source.name]
        marker = {
            "url": shown(source.address),
            "checksum": str(wanted) if wanted else f"sha256:{sha256}",
            "sha256": sha256,
            "stamp": source.stamp,
            "entries": entries,
        }
        with writing(folder / source.marker):
            (staging / source.marker).write_text(json.dumps(marker, indent=1), "utf-8")
        place(staging, folder, last=source.marker)


@contextlib.contextmanager
def _one_at_a_time(source: Source, folder: Path, clock: Clock) -> Iterator[Path]:
    """The folder for hidden files, while no other process works on the same download."""
    home = folder if folder.is_dir() else folder.parent
    path = home / f"{PREFIX}{source.key}.lock"
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = _locked(path, clock)
    except HubError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {home}", why=str(error), fix="choose another folder") from error
    try:
        yield home
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path, clock: Clock) -> int:
    """An open lock file that is ours; waits for another process that has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _try_lock(file) and _is_same(file, path):
            return file
        os.close(file)
        time.sleep(min(0.1, clock.left()))


def _try_lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: concurrent downloads of one file are not kept apart there
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(file: int, path: Path) -> bool:
    """Whether the locked file still stands under its name; its last owner removes it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
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
