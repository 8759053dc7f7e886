"""Writes images and targets as shards: tar files in the WebDataset layout, and their index.

Files of one sample follow each other and have one name up to the first dot: `cat/photo_17.jpg`, `cat/photo_17.cls` (the
number of the class), `cat/photo_17.json` (name and targets).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from flashtask.core.errors import FlashtaskError, MissingInputError, OutputError, UsageError
from flashtask.core.files import staging_folder, storage_error
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import derive_seed
from flashtask.data.image_source import ImageSource
from flashtask.data.images import Encoded
from flashtask.data.inputs import Input
from flashtask.data.layout import SHARD_INDEX
from flashtask.data.samples import PARTS, Column, SampleTable
from flashtask.data.shard_index import COLUMNS, FORMAT, SAMPLES
from flashtask.data.spatial import SpatialReader
from flashtask.data.targets import LabelReader, LabelsReader, NumberReader, TargetReader
from flashtask.data.value_range import Bounds

__all__ = ["DEFAULT_SHARD_BYTES", "require_new_folder", "write_shards"]

DEFAULT_SHARD_BYTES = 256 * 2**20
_BLOCK = 512
#: Letters of a name in a shard; a header of tar holds 100.
_MOST_LETTERS = 80


def write_shards(
    folder: str | os.PathLike[str],
    table: SampleTable,
    images: ImageSource,
    reader: TargetReader,
    bounds: Mapping[str, Bounds],
    *,
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    says: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a folder of shards, which appears when it is whole.

    Training samples lie in an order drawn from (seed, name), so each shard is a sample of all; others in their own.

    Args:
        folder: new or empty.
        table: the samples.
        images: where their pictures are read.
        reader: of their targets.
        bounds: by input, of pictures with more than 8 bits a channel.
        seed: of the order.
        shard_bytes: a shard ends before it has more, unless it is a single sample.
        says: is given a line on each shard.

    Returns:
        The folder as an absolute path.

    Raises:
        UsageError: an invalid size, or targets that are files of their own.
        OutputError: the folder is there and not empty, or cannot be made.
        StorageError: a write failed.
    """
    if not is_whole(shard_bytes, 2**10):
        raise UsageError(f"shard_bytes must be a whole number of at least 1024, not {shard_bytes!r}")
    if isinstance(reader, SpatialReader) or type(reader) not in (LabelReader, LabelsReader, NumberReader):
        raise UsageError(f"targets of the kind {reader.kind!r} cannot be written to shards yet")
    target = require_new_folder(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(target.parent, target.name) as staging:
            made = staging / "shards"
            made.mkdir()
            _Writer(made, table, images, reader, bounds, shard_bytes, says).write(seed)
            os.rename(made, target)
            _sync(target.parent)
    except OSError as error:
        if isinstance(error, FlashtaskError):
            raise
        require_new_folder(folder)  # another program may have made it meanwhile
        raise storage_error(error, target) from error
    return target


def require_new_folder(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that is not there, or is empty.

    Raises:
        OutputError: something is there.
    """
    target = Path(os.path.realpath(Path(folder).expanduser()))
    if os.path.lexists(target) and not (target.is_dir() and not os.listdir(target)):
        what = "holds files" if target.is_dir() else "is a file"
        raise OutputError(f"{target} {what}, which are never overwritten", fix="choose a new folder")
    return target


@dataclass
class _Writer:
    """The files of one folder of shards, which is written once."""

    folder: Path
    table: SampleTable
    images: ImageSource
    reader: TargetReader
    bounds: Mapping[str, Bounds]
    limit: int
    says: Callable[[str], None]
    shards: list[dict[str, Any]] = field(default_factory=list)

    def write(self, seed: int) -> None:
        raw = self.table.targets
        columns = 0 if raw is None else 1 if raw.ndim == 1 else raw.shape[1]
        names = self.table.names()
        path = self.folder / SAMPLES
        with path.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file:
            samples = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            samples.writerow([*COLUMNS, *(f"target_{place}" for place in range(columns))])
            for part in PARTS:
                rows = np.flatnonzero(self.table.parts == PARTS.index(part)).tolist()
                if part == "train":
                    rows.sort(key=lambda row: (derive_seed("shard", seed, names[row]), names[row]))
                for line in self._write_part(part, rows, names):
                    samples.writerow(line)
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = {
            "flashtask_shards": FORMAT,
            "shardlist": self.shards,
            "samples": {"file": SAMPLES, "sha256": digest, "count": len(self.table)},
            "targets": self.reader.to_dict(),
            "target_columns": columns,
        }
        with (self.folder / SHARD_INDEX).open("x") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _write_part(self, part: str, rows: list[int], names: list[str]) -> Iterator[list[Any]]:
        """Write the shards of a part; gives a line of the index for each sample."""
        shard: _Shard | None = None
        for row in rows:
            content = _content(self.images.input(str(self.table.inputs[row])))
            if shard is None or (shard.count and shard.size + len(content) > self.limit):
                self._end(shard)
                number = sum(one["part"] == part for one in self.shards)
                shard = _Shard(self.folder / f"{part}-{number:06}.tar", part)
                self.shards.append(shard.about)
            targets = self._targets(row)
            key = shard.key_for(names[row])
            member = f"{key}.{_ending(names[row], content)}"
            offset = shard.add(member, content)
            for ending, text in self._described(row, names[row], targets).items():
                shard.add(f"{key}.{ending}", text.encode())
            shard.count += 1
            low, high = self.bounds.get(str(self.table.inputs[row]), ("", ""))
            group = "" if self.table.groups is None else self.table.groups[row]
            weight = 1 if self.table.weights is None else float(self.table.weights[row])
            digest = hashlib.sha256(content).hexdigest()
            place = [len(self.shards) - 1, member, offset, len(content), digest, low, high]
            yield [*place, group, weight, names[row], *targets]
        self._end(shard)

    def _end(self, shard: _Shard | None) -> None:
        if shard is not None:
            shard.close()
            about = shard.about
            self.says(f"{about['url']}: {about['nsamples']:,} images, {about['filesize'] / 1e6:.1f} MB")

    def _targets(self, row: int) -> list[str]:
        if self.table.targets is None:
            return []
        return [str(value) for value in np.atleast_1d(np.asarray(self.table.targets[row]))]

    def _described(self, row: int, name: str, targets: list[str]) -> dict[str, str]:
        """The text files of a sample by ending; what other programs read of its target."""
        about: dict[str, Any] = {"name": name.encode(errors="replace").decode()}
        if not targets or self.table.parts[row] == PARTS.index("predict"):
            return {"json": json.dumps(about)}
        raw: Column = self.table.targets[row : row + 1]  # type: ignore[index]
        if isinstance(self.reader, LabelReader):
            label = self.reader.labels.index(targets[0])
            return {"cls": str(label), "json": json.dumps({**about, "label": targets[0]})}
        if isinstance(self.reader, LabelsReader):
            return {"json": json.dumps({**about, "labels": list(self.reader.classes(raw)[0])})}
        assert isinstance(self.reader, NumberReader)
        numbers = dict(zip(self.reader.names, map(float, targets), strict=True))
        return {"json": json.dumps({**about, **numbers})}


class _Shard:
    """One tar file, written from its beginning to its end.

    Args:
        path: of a new file.
        part: of its samples.
    """

    def __init__(self, path: Path, part: str) -> None:
        self._file: BinaryIO = path.open("xb")
        self._hash, self._keys = hashlib.sha256(), set[str]()
        self.size = self.count = 0
        self.about: dict[str, Any] = {"url": path.name, "part": part}

    def key_for(self, name: str) -> str:
        """What the files of a sample are called up to the first dot; no two samples of a shard have the same."""
        stem = os.path.splitext(name)[0]
        letters = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", one) for one in stem.split("/") if one not in ("", ".", ".."))
        key = base = letters[-_MOST_LETTERS:].strip("/") or "image"
        number = 1
        while key in self._keys:
            number += 1
            key = f"{base}_{number}"
        self._keys.add(key)
        return key

    def add(self, name: str, content: bytes) -> int:
        """Write a file; gives the place of its first byte."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return offset

    def close(self) -> None:
        """Write the end of the archive, and let it reach the disk."""
        self._write(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.about |= {"nsamples": self.count, "filesize": self.size, "sha256": self._hash.hexdigest()}

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.size += len(content)


def _content(given: Input) -> bytes:
    """The bytes of a picture's file; one in memory becomes a PNG, or a `.npy` file if it has more than 8 bits."""
    with given.encoded() as source:
        return _bytes_of(source, given.name)


def _bytes_of(source: Encoded, name: str) -> bytes:
    written = io.BytesIO()
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, os.PathLike)):
        try:
            return Path(source).read_bytes()
        except OSError as error:  # it was there when it was checked
            raise MissingInputError(f"cannot read {name}: {error.strerror}") from error
    if isinstance(source, Image.Image):
        upright = ImageOps.exif_transpose(source)
        if upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            upright.save(written, "PNG")
            return written.getvalue()
        source = np.asarray(upright)
    pixels = source[:, :, 0] if source.shape[2:] == (1,) else source
    if pixels.dtype == np.uint8:
        Image.fromarray(np.ascontiguousarray(pixels)).save(written, "PNG")
    else:
        np.save(written, pixels, allow_pickle=False)
    return written.getvalue()


def _ending(name: str, content: bytes) -> str:
    """The ending that tells other programs the format: that of the name, else that of the content."""
    if content.startswith(b"\x93NUMPY"):
        return "npy"
    ending = os.path.splitext(name)[1].lower().lstrip(".")
    if re.fullmatch("[a-z0-9]{2,5}", ending) and ending not in ("cls", "json"):
        return ending
    with Image.open(io.BytesIO(content)) as picture:
        return (picture.format or "img").lower()


def _sync(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
