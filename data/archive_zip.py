"""Members of a zip file, with the checks that the standard library leaves out or has only lately."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from flashtask.core.errors import IntegrityError
from flashtask.data.archive_limits import CHUNK, Budget, Member

__all__ = ["zip_members"]

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")
_SMALLEST_ENTRY = 46
# LZMA in zip lets the file choose the decoder's memory, so it is not among them.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError, struct.error)


def zip_members(path: Path, budget: Budget) -> Generator[Member, None, None]:
    """The files and folders of a zip file, in the order of its directory.

    Raises:
        IntegrityError: at links, encryption, overlapping entries, damage, a cut, or anything after the end.
    """
    with path.open("rb") as file:
        directory = _directory_start(file, budget)
        try:
            archive = zipfile.ZipFile(file)
        except (*_DAMAGE, OSError) as error:
            raise budget.refuse(f"its directory is damaged ({error})") from error
        with archive:
            _refuse_overlap(file, archive.infolist(), directory, budget)
            for info in archive.infolist():
                _refuse_kind(info, budget)
                name, mode = info.orig_filename, info.external_attr >> 16
                yield Member(name, name.endswith("/"), bool(mode & 0o100), _content(archive, info, budget))


def _directory_start(file: BinaryIO, budget: Budget) -> int:
    """Where the central directory starts; it has to be followed by the end record and by nothing else."""
    size = budget.archive_bytes
    tail_start = max(0, size - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read()
    for place in range(len(tail) - _END.size, -1, -1):
        if tail[place : place + 4] != b"PK\5\6":
            continue
        _, disk, first_disk, _, count, length, start, comment = _END.unpack_from(tail, place)
        end = tail_start + place
        if end + _END.size + comment != size:
            continue
        if count == 0xFFFF or 0xFFFFFFFF in (length, start):
            disk, first_disk, length, start, end = _zip64_end(file, end, budget)
        if disk or first_disk or start + length != end:
            raise budget.refuse("its central directory is not at the offset that its end record gives")
        if length // _SMALLEST_ENTRY > budget.limits.max_entries:
            raise budget.refuse(f"it holds more than {budget.limits.max_entries:,} files and folders")
        return int(start)
    raise budget.refuse("it is cut short, or there is garbage after its end")


def _zip64_end(file: BinaryIO, end: int, budget: Budget) -> tuple[int, int, int, int, int]:
    file.seek(max(0, end - _LOCATOR64.size))
    locator = file.read(_LOCATOR64.size)
    if len(locator) < _LOCATOR64.size or not locator.startswith(b"PK\6\7"):
        raise budget.refuse("its directory is damaged (no zip64 locator)")
    place = _LOCATOR64.unpack(locator)[2]
    if place + _END64.size + _LOCATOR64.size != end:
        raise budget.refuse("its directory is damaged (zip64 record out of place)")
    file.seek(place)
    magic, _, _, _, disk, first_disk, _, _, length, start = _END64.unpack(file.read(_END64.size))
    if magic != b"PK\6\6":
        raise budget.refuse("its directory is damaged (no zip64 record)")
    return disk, first_disk, length, start, place


def _refuse_overlap(file: BinaryIO, infos: list[zipfile.ZipInfo], directory: int, budget: Budget) -> None:
    """Each entry ends before the next begins: shared bytes are how small files unpack to petabytes."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    for info, following in zip(ordered, [*ordered[1:], None], strict=True):
        file.seek(min(info.header_offset, directory))
        header = file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            raise budget.refuse("its header is damaged", info.orig_filename)
        name_length, extra_length = _LOCAL.unpack(header)[-2:]
        end = info.header_offset + _LOCAL.size + name_length + extra_length + info.compress_size
        if end > (following.header_offset if following else directory):
            raise budget.refuse("it overlaps another entry", info.orig_filename)


def _refuse_kind(info: zipfile.ZipInfo, budget: Budget) -> None:
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    if info.flag_bits & 0x41:
        raise budget.refuse("it is encrypted", name)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a symbolic link" if kind == stat.S_IFLNK else "neither a file nor a folder"
        raise budget.refuse(f"it is {what}", name)
    is_folder = name.endswith("/")
    if kind == (stat.S_IFREG if is_folder else stat.S_IFDIR) or (is_folder and info.file_size):
        raise budget.refuse("its name and its attributes disagree about whether it is a folder", name)
    if info.compress_type not in _METHODS:
        raise budget.refuse(f"compression method {info.compress_type} is not supported", name)


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: Budget) -> Iterator[bytes]:
    got = 0
    try:
        with archive.open(info) as source:
            while data := source.read(CHUNK):
                got += len(data)
                budget.spend(len(data), info.orig_filename)
                yield data
    except IntegrityError:
        raise
    except _DAMAGE as error:
        raise budget.refuse(f"damaged ({error})", info.orig_filename) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise budget.refuse(f"damaged ({error})", info.orig_filename) from error
    if got != info.file_size:
        raise budget.refuse(f"{got:,} bytes where the directory says {info.file_size:,}", info.orig_filename)
