"""Data that has to be brought here first: files at addresses, and archives. Both are kept in the cache.

http and https are fetched by the project's own client, the hub's `hf://` and the stores of clouds by fsspec, whose
libraries are named where they are missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import FlashtaskError, HubError, MissingInputError, OutputError, UsageError
from flashtask.core.files import missing_file, staging_folder
from flashtask.core.known_files import content_hashes
from flashtask.data.archive import extract_archive, is_archive
from flashtask.data.layout import ARCHIVE_ENDINGS, is_table_name, split_folders, subfolders

__all__ = ["brought_here", "cached_file", "fetch", "is_address", "known_place", "unpacked"]

#: The most that one address may hold.
_MOST_BYTES = 256 * 2**30
_DEADLINE = 12 * 3600.0
#: What fsspec reaches over the network, and the library that each needs.
_STORES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface-hub",
    "memory": "fsspec",
}


def is_address(text: object) -> bool:
    """Whether a text is an address rather than a path: `https://...`, `s3://...`."""
    return isinstance(text, str) and "://" in text


def known_place(address: str) -> Path:
    """Where the file at an address is kept; it may not be there yet."""
    name = Path(urlsplit(address).path).name or "file"
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[-100:]
    return cache_folder() / "data" / _key(address) / safe


def cached_file(address: str) -> str:
    """The path of the file at an address, fetched once: what it held when it was fetched is used from then on.

    Raises:
        UsageError: no such kind of address, or a library is missing.
        MissingInputError: there is no such file.
        HubError: it cannot be reached.
        StorageError: the cache cannot be written.
    """
    place = known_place(address)
    if place.is_file():
        return str(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(place.parent, "fetching") as staging:
        file = staging / place.name
        fetch(address, file)
        os.replace(file, place)
    return str(place)


def fetch(address: str, file: Path) -> None:
    """Write what is at an address to a file.

    Raises:
        UsageError, MissingInputError, HubError, StorageError: as `cached_file`.
    """
    scheme = urlsplit(address).scheme.lower()
    if scheme in ("http", "https"):
        from flashtask.data.download import download_image

        download_image(address, file, max_bytes=_MOST_BYTES, deadline=_DEADLINE)
    else:
        _copy(address, scheme, file)


def _copy(address: str, scheme: str, file: Path) -> None:
    if scheme not in _STORES or "::" in address:
        raise UsageError(
            f"cannot read the address {address!r}",
            why=f"addresses begin with http://, https://, {', '.join(f'{name}://' for name in _STORES)}",
            fix="copy the file to this machine, and give its path",
        )
    try:
        import fsspec

        with fsspec.open(address, "rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except FlashtaskError:
        raise
    except ImportError as error:
        fix = f"pip install fsspec {_STORES[scheme]}"
        raise UsageError(f"reading {address!r} needs another library", why=str(error), fix=fix) from error
    except FileNotFoundError as error:
        raise MissingInputError(f"no such file: {address!r}") from error
    except Exception as error:  # each store has errors of its own
        raise HubError(f"cannot read {address!r}", why=f"{type(error).__name__}: {error}") from error


def unpacked(path: str | os.PathLike[str]) -> Path:
    """The folder with the content of a zip or tar archive, unpacked once into the cache.

    An archive that holds a single folder stands for that folder, also if it lies in further ones.

    Raises:
        MissingInputError, IntegrityError, OutputError, StorageError: as `extract_archive`.
    """
    file = Path(path).expanduser().absolute()
    folder = cache_folder() / "data" / _key(content_hashes([str(file)])[0])
    if not folder.is_dir():
        try:
            extract_archive(file, folder)
        except OutputError:
            if not folder.is_dir():  # else another process has unpacked it meanwhile, and a folder there is whole
                raise
    inside = _entries(folder)
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = _entries(folder)
        if len(inside) == 1 and not any(entry.is_dir() or is_table_name(entry) for entry in _entries(inside[0])):
            break  # a single class folder
    return folder


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX")))


def _table_in(folder: Path) -> Path | None:
    """The only table of a folder that has no folders of classes or parts, but at most one with the images."""
    tables = [entry for entry in _entries(folder) if is_table_name(entry)]
    return tables[0] if len(tables) == 1 and len(subfolders(folder)) < 2 and not split_folders(folder) else None


def brought_here(data: str) -> str:
    """DATA of a command as a path of this machine: an archive becomes its folder or table, an address a file.

    Raises:
        UsageError, MissingInputError, HubError, IntegrityError, StorageError: as `cached_file` and `unpacked`.
    """
    if is_address(data):
        data = cached_file(data)
    if data.lower().endswith(ARCHIVE_ENDINGS) and not os.path.lexists(data):
        raise missing_file(data)
    if os.path.isfile(data) and is_archive(Path(data), os.path.basename(data)):
        folder = unpacked(data)
        return str(_table_in(folder) or folder)
    return data


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
