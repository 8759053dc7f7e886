"""What a zip or tar archive holds, as zipfile and tarfile read it, and all that is refused about it.

The standard library follows links and sparse maps, believes sizes, and takes damage for the end of an archive. So every
header is checked here, and what it announces is counted against a budget.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple, Self

from flashtask.core.errors import OutputError

__all__ = ["CHUNK", "DAMAGE", "HIDDEN", "ArchiveLimits", "Listing", "Member", "RefusedError", "is_known", "name_taken"]
__all__ += ["read_members"]

CHUNK = 64 * 1024
#: Start of every hidden name that flashtask itself makes in a data folder; no archive may bring one.
HIDDEN = ".flashtask-"
#: What the standard library raises for damaged archives, besides OSErrors.
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, ArithmeticError, LookupError, RuntimeError, ValueError,
)  # fmt: skip

#: Below this many bytes the ratio means nothing: a small file of zeros is not a bomb.
_RATIO_FREE_BYTES = 1024 * 1024
_ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
# LZMA in zip lets the file choose the decoder's memory, so it is not among them.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
#: In the header of a member: the flag that its name is in UTF-8, and the system that wrote it.
_IS_UTF8, _WINDOWS = 0x800, 0
_EXTENSION_BYTES = 1024 * 1024
_PATH_BYTES = 4096
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_REFUSED_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"6": "a fifo", b"K": "a link with a long name", b"S": "a sparse file",
}  # fmt: skip
_XZ_MEMORY = 128 * 2**20


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may unpack to before it is refused.

    Args:
        max_bytes: bytes unpacked in total.
        max_ratio: bytes unpacked per byte of the archive; counted above 1 MiB.
        max_entries: files and folders, folders that are only implied by a path included.
        max_depth: parts of a path.
        max_name_bytes: bytes of a whole path; a part never has more than 255.
        max_seconds: wall time of the extraction.
    """

    max_bytes: int = 256 * 2**30
    max_ratio: float = 200.0
    max_entries: int = 1_000_000
    max_depth: int = 32
    max_name_bytes: int = 1024
    max_seconds: float = 6 * 3600.0


class RefusedError(Exception):
    """An archive is not taken, because of `reason`; `member` is the entry at fault, if it is a single one."""

    def __init__(self, reason: str, member: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.member = reason, member


class Member(NamedTuple):
    """One file or folder of an archive; `open()` gives a file's content, before the next member is asked for."""

    name: str
    is_folder: bool
    is_executable: bool
    size: int
    open: Callable[[], Any]


class Listing:
    """The members of one archive that were accepted so far, and what is left of its limits.

    Args:
        archive_bytes: size of the archive.
        limits: how much it may unpack to.
        taken: names that may not appear at the top level.
        started: when the extraction began, as `time.monotonic` counts.
    """

    def __init__(self, archive_bytes: int, limits: ArchiveLimits, taken: Collection[str], started: float) -> None:
        self._limits, self._taken, self._end = limits, taken, started + limits.max_seconds
        self._max_bytes = min(limits.max_bytes, max(_RATIO_FREE_BYTES, int(limits.max_ratio * archive_bytes)))
        self._num_bytes = 0
        self._seen: dict[str, tuple[str, str]] = {}  # folded path -> (spelling, file | folder | implied folder)

    def add(self, member: Member) -> list[str]:
        """The parts of a member's path after every check; none for the archive's own root."""
        name, is_folder = member.name, member.is_folder
        self._num_bytes += member.size
        self.check(num_bytes=self._num_bytes, member=name)
        path = name.removeprefix("./").removesuffix("/" if is_folder else "")
        if is_folder and path in ("", "."):
            return []
        parts = path.split("/")
        if reason := self._wrong(name, parts):
            raise RefusedError(reason, name)
        if parts[0] in self._taken:
            raise name_taken(f"{parts[0]!a} in the target folder")
        for depth in range(1, len(parts)):
            self._note("/".join(parts[:depth]), "implied folder", name)
        self._note(path, "folder" if is_folder else "file", name)
        return parts

    def check(self, *, num_bytes: int = 0, num_entries: int = 0, member: str | None = None) -> None:
        """Compare with the limits what the archive holds, as far as it is known, and the time it has taken."""
        if num_bytes > self._max_bytes:
            raise RefusedError(f"it unpacks to more than {self._max_bytes:,} bytes, the most allowed here", member)
        if num_entries > self._limits.max_entries:
            raise RefusedError(f"it holds more than {self._limits.max_entries:,} files and folders", member)
        if time.monotonic() >= self._end:
            raise RefusedError(f"it takes longer than {self._limits.max_seconds:g} s", member)

    def _wrong(self, name: str, parts: list[str]) -> str:
        try:
            lengths = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            return "its name is not UTF-8"
        if name.startswith("/") or re.match(r"[A-Za-z]:", parts[0]):
            return "its path is absolute"
        if ".." in parts:
            return "its path leads out of the folder (..)"
        if "" in parts or "." in parts:
            return "its path has an empty part"
        if "\\" in name or "\0" in name:
            return "its path holds a backslash or NUL"
        if parts[0].startswith(HIDDEN):
            return f"names that start with {HIDDEN} are reserved"
        if len(parts) > self._limits.max_depth:
            return f"it lies deeper than {self._limits.max_depth} folders"
        if max(lengths) > 255 or sum(lengths) + len(parts) - 1 > self._limits.max_name_bytes:
            return "its name is too long"
        return ""

    def _note(self, path: str, kind: str, member: str) -> None:
        spelling, earlier = self._seen.setdefault(unicodedata.normalize("NFC", path).casefold(), (path, ""))
        if spelling != path:
            raise RefusedError(f"its path differs from {spelling!a} only in case or accents", member)
        if kind == "implied folder" and earlier in ("folder", kind):
            return
        if earlier and (kind, earlier) != ("folder", "implied folder"):
            raise RefusedError("the same path is in the archive twice", member)
        self._seen[unicodedata.normalize("NFC", path).casefold()] = (path, kind)
        self.check(num_entries=len(self._seen), member=member)


def name_taken(where: str) -> OutputError:
    """The error for a file or folder that already has the name of one in the archive."""
    return OutputError(
        f"{where} exists already",
        why="the archive brings a file or folder of that name, and nothing is overwritten",
        fix="remove it, or choose another folder",
    )


def is_known(start: bytes) -> bool:
    """Whether the first 512 bytes of a file are those of a zip or tar archive, or of a compressed file."""
    return start.startswith((*_ZIP_STARTS, *_COMPRESSED)) or start[257:262] == b"ustar"


def read_members(file: BinaryIO, listing: Listing) -> Generator[Member]:
    """The files and folders of an archive, in its order.

    Args:
        file: the archive, at its beginning.
        listing: each member has to be added to it before the next is asked for.

    Raises:
        RefusedError: at anything but files and folders, at encryption, overlaps, damage, or anything after the end.
        DAMAGE, OSError: as the standard library raises them.
    """
    start = file.read(512)
    file.seek(0)
    if not is_known(start):
        raise RefusedError(f"it is neither zip nor tar; it starts with {start[:16]!r}")
    yield from (_zip_members if start.startswith(_ZIP_STARTS) else _tar_members)(file, listing)


# ---- zip


def _zip_members(file: BinaryIO, listing: Listing) -> Iterator[Member]:
    listing.check(num_entries=_directory_bytes(file) // 46)  # before zipfile makes an object of each
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        ordered = sorted(infos, key=lambda info: info.header_offset)
        ends = [*(info.header_offset for info in ordered[1:]), archive.start_dir]
        for info, end in zip(ordered, ends, strict=False):
            # Bytes that entries share are how small files unpack to petabytes.
            if not 0 <= info.header_offset <= end - 30 - info.compress_size:
                raise RefusedError("it overlaps another entry", info.orig_filename)
        for info in infos:
            name, mode = _name_in_zip(info), info.external_attr >> 16
            if reason := _wrong_in_zip(info, name, stat.S_IFMT(mode)):
                raise RefusedError(reason, name)
            yield Member(name, name.endswith("/"), bool(mode & 0o100), info.file_size, partial(archive.open, info))


def _directory_bytes(file: BinaryIO) -> int:
    """The size of the central directory, whose end record has to be the last thing in the file."""
    file.seek(max(0, file.seek(0, 2) - 0xFFFF - 22 - 76))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) != end + 22 + int.from_bytes(tail[end + 20 : end + 22], "little"):
        raise RefusedError("it is cut short, or there is garbage after its end")
    if tail[max(0, end - 20) :].startswith(b"PK\6\7"):  # a zip64 record of 56 bytes and its locator of 20
        return int.from_bytes(tail[max(0, end - 36) : max(0, end - 28)], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """The path of a member, whose bytes are UTF-8 whether it says so or not, and with slashes if Windows wrote it."""
    name = info.orig_filename
    if not info.flag_bits & _IS_UTF8 and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            raise RefusedError(
                "its name is not in UTF-8 (unpack it with unzip -O ENCODING, and give the folder)", name
            ) from None
    return name.replace("\\", "/") if info.create_system == _WINDOWS else name


def _wrong_in_zip(info: zipfile.ZipInfo, name: str, kind: int) -> str:
    is_folder = name.endswith("/")
    if info.flag_bits & 0x41:
        return "it is encrypted"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "it is a symbolic link" if kind == stat.S_IFLNK else "it is neither a file nor a folder"
    if kind == (stat.S_IFREG if is_folder else stat.S_IFDIR) or (is_folder and info.file_size):
        return "its name and its attributes disagree about whether it is a folder"
    if info.compress_type not in _ZIP_METHODS:
        return f"compression method {info.compress_type} is not supported"
    return ""


# ---- tar


def _tar_members(file: BinaryIO, listing: Listing) -> Iterator[Member]:
    source: Any = _TarSource(file, listing)
    header = type("Header", (_Header,), {"source": source})
    with tarfile.open(fileobj=source, mode="r:", tarinfo=header, encoding="utf-8") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all, for random access
            size = 0 if info.isdir() else info.size
            yield Member(info.name, info.isdir(), bool(info.mode & 0o100), size, partial(archive.extractfile, info))
    source.check_end()


class _TarSource:
    """The bytes of a tar file for tarfile: unpacked, counted, forward only, and never fewer than it asks for."""

    def __init__(self, file: BinaryIO, listing: Listing) -> None:
        start = file.read(6)
        file.seek(0)
        unpack = next((unpack for magic, unpack in _COMPRESSED.items() if start.startswith(magic)), None)
        self._file, self._is_plain = unpack(file) if unpack else file, unpack is None
        self._listing, self._position = listing, 0
        #: The header extension whose content is read next, and whether the last header was one.
        self.extension: tarfile.TarInfo | None = None
        self.follows_extension = False

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise RefusedError("a header is damaged: it leads back")
        if self._is_plain:
            self._position = self._file.seek(position)
        while self._position < position:
            self.read(min(CHUNK, position - self._position))

    def read(self, count: int) -> bytes:
        extension, self.extension = self.extension, None
        data = self._some(count)
        if len(data) < count:
            raise RefusedError("the archive is cut short")
        return data if extension is None else _used_of(extension, data)

    def check_end(self) -> None:
        while data := self._some(CHUNK):
            if data.strip(b"\0"):
                raise RefusedError("there is garbage after its end")

    def _some(self, count: int) -> bytes:
        data: bytes = self._file.read(count)
        self._position += len(data)
        self._listing.check(num_bytes=0 if self._is_plain else self._position)
        return data


class _Header(tarfile.TarInfo):
    """A header of `source`. By itself tarfile takes a damaged one for the end, and follows those of every kind."""

    source: _TarSource

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """As tarfile calls it, for each header."""
        if not buf.strip(b"\0") and cls.source.follows_extension:
            raise RefusedError("its last header extension has no member")
        try:
            info = super().frombuf(buf, encoding, errors)
        except (tarfile.HeaderError, ValueError) as error:
            if buf.strip(b"\0"):
                raise RefusedError(f"a header is damaged ({error})") from error
            raise
        cls.source.follows_extension = info.type in _EXTENSIONS
        if info.type in _EXTENSIONS:
            if not 0 <= info.size <= _EXTENSION_BYTES:
                raise RefusedError(f"a header extension of {info.size:,} bytes", info.name)
            cls.source.extension = info
        elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise RefusedError(f"it is {_REFUSED_KINDS.get(info.type, f'of unknown type {info.type!r}')}", info.name)
        elif info.size < 0:
            raise RefusedError("a header gives a negative size", info.name)
        return info


def _used_of(extension: tarfile.TarInfo, data: bytes) -> bytes:
    """Of the records `LENGTH KEY=VALUE\\n` of a header extension only path and size, padded with zeros.

    tarfile would follow the maps of sparse files, and its regular expressions can take hours for some values.
    """
    if extension.type == tarfile.GNUTYPE_LONGNAME:
        return data
    kept: dict[bytes, bytes] = {}
    place = 0
    while place < extension.size:
        head = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(data, place)
        end = place + int(head[1]) if head else 0
        if head is None or not head.end() < end <= extension.size or data[end - 1 : end] != b"\n":
            raise RefusedError("a header extension is damaged")
        key, value = head[2], data[head.end() : end - 1]
        if key.startswith(b"GNU.sparse"):
            raise RefusedError("it holds a sparse file")
        if key in (b"path", b"size"):
            if extension.type == tarfile.XGLTYPE:
                raise RefusedError("a global header sets a path or size")
            if key == b"size" and not re.fullmatch(rb"[0-9]{1,18}", value):
                raise RefusedError("a header extension gives a size that is not a number")
            if len(value) > _PATH_BYTES:
                raise RefusedError("its name is too long")
            kept[key] = data[place:end]
        place = end
    return b"".join(kept.values()).ljust(len(data), b"\0")


class _Unpacking(io.RawIOBase):
    """The bytes of a bz2 or xz file; the file classes of the standard library pass over garbage at its end."""

    def __init__(self, file: BinaryIO, make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file, self._make, self._engine = file, make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = b""
        while not data:
            packed = b""
            if self._engine.eof:
                # A further stream may follow (pbzip2 writes several); anything else fails as damaged.
                packed = self._engine.unused_data or self._file.read(CHUNK)
                if not packed:
                    return 0
                self._engine = self._make()
            elif self._engine.needs_input:
                packed = self._file.read(CHUNK)
                if not packed:
                    raise EOFError("the compressed stream is cut short")
            data = self._engine.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


#: First bytes of a compressed file -> what unpacks it.
_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": lambda file: io.BufferedReader(_Unpacking(file, bz2.BZ2Decompressor), CHUNK),
    b"\xfd7zXZ\x00": lambda file: io.BufferedReader(_Unpacking(file, _xz_decompressor), CHUNK),
}
