"""Members of a tar file, plain or compressed, read strictly forward.

The standard library only decodes single headers here. The walk over them is our own, because tarfile follows
sparse maps, links and oversized header extensions, ignores damage at the end, and has looped on bad files.
"""

from __future__ import annotations

import bz2
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from flashtask.data.archive_limits import CHUNK, Budget, Member

__all__ = ["DECOMPRESSORS", "tar_members"]

_BLOCK = tarfile.BLOCKSIZE
_EXTENSION_BYTES = 1024 * 1024
_USED_RECORDS: tuple[str, ...] = ("path", "size")
_XZ_MEMORY = 128 * 2**20
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"6": "a fifo", b"K": "a link with a long name", b"S": "a sparse file",
}  # fmt: skip


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gunzip:
    """zlib in the shape that bz2 and lzma share."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


#: First bytes of a compressed file -> what unpacks it.
DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": _Gunzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


class _Stream:
    """The unpacked bytes of a file in order, each counted."""

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self._file, self._budget, self._buffer = file, budget, bytearray()
        start = file.read(6)
        file.seek(0)
        found = [make for magic, make in DECOMPRESSORS.items() if start.startswith(magic)]
        self._blocks = self._unpacked(found[0]) if found else iter(lambda: file.read(CHUNK), b"")

    def _unpacked(self, make: Callable[[], _Decompressor]) -> Iterator[bytes]:
        engine, data = make(), b""
        while True:
            if engine.eof:
                # A further stream may follow (pigz and bgzip write several); anything else fails as damaged.
                data = engine.unused_data or self._file.read(CHUNK)
                if not data:
                    return
                engine = make()
                self._budget.spend(0)
            elif engine.needs_input:
                data = self._file.read(CHUNK)
                if not data:
                    raise EOFError("the compressed stream is cut short")
            else:
                data = b""
            yield engine.decompress(data, CHUNK)

    def take(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end."""
        while len(self._buffer) < count:
            try:
                block = next(self._blocks, None)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise self._budget.refuse(f"damaged, cut short or followed by garbage ({error})") from error
            if block is None:
                break
            self._budget.spend(len(block))
            self._buffer += block
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def exactly(self, count: int, member: str | None = None) -> bytes:
        """`count` bytes, or a refusal."""
        data = self.take(count)
        if len(data) < count:
            raise self._budget.refuse("the archive is cut short", member)
        return data


class _Content:
    """The bytes of one file in a tar stream; `finish` skips what nobody read, and the padding."""

    def __init__(self, stream: _Stream, name: str, size: int) -> None:
        self._stream, self._name, self._left = stream, name, size
        self._padding = -size % _BLOCK

    def __iter__(self) -> Iterator[bytes]:
        while self._left:
            data = self._stream.exactly(min(CHUNK, self._left), self._name)
            self._left -= len(data)
            yield data

    def finish(self) -> None:
        for _ in self:
            pass
        self._stream.exactly(self._padding, self._name)
        self._padding = 0


def tar_members(path: Path, budget: Budget) -> Generator[Member, None, None]:
    """The files and folders of a tar, tar.gz, tar.bz2 or tar.xz file, in order.

    Raises:
        IntegrityError: at a link, device, fifo or sparse file, at damage, a cut, or anything after the end.
    """
    with path.open("rb") as file:
        stream = _Stream(file, budget)
        extended: dict[str, str] = {}
        while (header := stream.exactly(_BLOCK)).strip(b"\0"):
            info = _parsed(header, budget)
            if info.type in (b"x", b"X", b"g", b"L"):
                extended |= _extension(stream, info, budget)
                continue
            name = extended.get("path", info.name)
            size = int(extended.get("size", info.size))
            extended = {}
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise budget.refuse(f"it is {_KINDS.get(info.type, f'of unknown type {info.type!r}')}", name)
            is_folder = info.type == tarfile.DIRTYPE
            content = _Content(stream, name, 0 if is_folder else size)
            yield Member(name, is_folder, bool(info.mode & 0o100), iter(content))
            content.finish()
        if extended:
            raise budget.refuse("its last header extension has no member")
        while rest := stream.take(CHUNK):
            if rest.strip(b"\0"):
                raise budget.refuse("there is garbage after its end")


def _parsed(header: bytes, budget: Budget) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise budget.refuse(f"a header is damaged ({error})") from error
    if info.size < 0:
        raise budget.refuse("a header gives a negative size", info.name)
    return info


def _extension(stream: _Stream, info: tarfile.TarInfo, budget: Budget) -> dict[str, str]:
    """What a header extension says about the next member: its path and its size; the rest is not used."""
    if info.size > _EXTENSION_BYTES:
        raise budget.refuse(f"a header extension of {info.size:,} bytes", info.name)
    data = stream.exactly(info.size, info.name)
    stream.exactly(-info.size % _BLOCK, info.name)
    if info.type == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    records = _pax_records(data, budget)
    if any(key.startswith("GNU.sparse") for key in records):
        raise budget.refuse("it holds a sparse file", records.get("path"))
    used: dict[str, str] = {key: records[key] for key in _USED_RECORDS if key in records}
    if used and info.type == b"g":
        raise budget.refuse("a global header sets a path or size", used.get("path"))
    if not re.fullmatch(r"[0-9]{1,18}", used.get("size", "0")):
        raise budget.refuse("a header extension gives a size that is not a number", used.get("path"))
    return used


def _pax_records(data: bytes, budget: Budget) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`."""
    records: dict[str, str] = {}
    place = 0
    while place < len(data):
        head = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(data, place)
        end = place + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise budget.refuse("a header extension is damaged")
        key = head[2].decode("utf-8", "surrogateescape")
        records[key] = data[head.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    return records
