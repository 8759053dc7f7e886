"""Shards: tar files in the WebDataset layout with an index, read in any order without unpacking them.

A folder of shards has `shards.json` (the tar files with their sizes and hashes, and what the targets are) and
`samples.csv` (where each image lies, its hash and its targets). Shards on this machine are read at any place. Of those
at an address, whole files are fetched into the cache, which keeps as many as its limit allows; so training goes through
one shard after the other, in an order of the shards and of the samples in each that depends on (seed, epoch).
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.files import sha256_file, staging_folder
from flashtask.core.names import quoted_name
from flashtask.data.cached_inputs import fetch
from flashtask.data.image_source import ImageSource
from flashtask.data.inputs import Input
from flashtask.data.layout import SHARD_INDEX
from flashtask.data.samples import PARTS, SampleTable, as_text
from flashtask.data.shard_index import COLUMNS, SAMPLES, Shard, ShardIndex, shard_cache
from flashtask.data.value_range import Bounds

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes may fetch the same shard there
    fcntl = None  # type: ignore[assignment]

__all__ = ["ShardSampler", "ShardSource", "cache_limit", "read_samples"]

_CHUNK = 10_000
#: What fetched shards may take, unless the variable is set.
_VARIABLE = "FLASHTASK_SHARD_CACHE_BYTES"
_DEFAULT_LIMIT = 10 * 10**9
#: Shards that stay in the cache whatever its limit: that which is read, and the one before.
_FEWEST_KEPT = 2
#: Times that a shard is fetched which other processes remove from the cache before it is read.
_TRIES = 5


def read_samples(index: ShardIndex) -> tuple[SampleTable, ShardSource]:
    """The table of all samples, and what reads their images.

    Args:
        index: of the shards.

    Raises:
        IntegrityError: `samples.csv` is damaged or does not fit to the shards.
        MissingInputError, HubError, UsageError, StorageError: it cannot be read.
    """
    path = Path(index.place, SAMPLES)
    if index.is_remote:
        path = shard_cache() / f"{index.sha256}.csv"
        if not path.is_file():
            _fetch_whole(f"{index.place}/{SAMPLES}", path, index.sha256)
    if sha256_file(path) != index.sha256:
        raise IntegrityError(f"{path} is damaged: it is not the file that {SHARD_INDEX} was written with")
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            return _table(index, file)
        except (KeyError, TypeError, ValueError, IndexError, csv.Error) as error:
            raise IntegrityError(f"{path} is not a list of samples", why=str(error)) from error


def _table(index: ShardIndex, file: IO[str]) -> tuple[SampleTable, ShardSource]:
    rows = csv.reader(file)
    if next(rows, [])[: len(COLUMNS)] != [*COLUMNS]:
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    chunks: list[tuple[Any, ...]] = []
    bounds: dict[str, Bounds] = {}
    while chunk := [*islice(rows, _CHUNK)]:  # texts of all rows at once would take several times the memory
        chunks.append(_columns(index, chunk, bounds))
    if not chunks:
        raise ValueError("it has no samples")
    inputs, shard, offset, length, digest, groups, weights, targets = map(np.concatenate, zip(*chunks, strict=True))
    sizes = np.array([one.size for one in index.shards])[shard]
    if not ((offset >= 0) & (length >= 0) & (offset + length <= sizes)).all():
        raise ValueError("a sample lies outside of its shard")
    table = SampleTable(
        inputs,
        np.array([PARTS.index(one.part) for one in index.shards], dtype=np.uint8)[shard],
        None if not index.num_columns else targets[:, 0] if index.num_columns == 1 else targets,
        groups if (groups != "").any() else None,
        weights=weights if (weights != 1).any() else None,
    )
    return table, ShardSource(index, inputs, (shard, offset, length, digest), bounds)


def _columns(index: ShardIndex, rows: Sequence[Sequence[str]], bounds: dict[str, Bounds]) -> tuple[Any, ...]:
    """The columns of some rows; bounds of images with more than 8 bits a channel are added to those known."""
    shard, member, offset, length, digest, low, high, groups, weights, _ = list(zip(*rows, strict=True))[: len(COLUMNS)]
    names = [f"{index.shards[int(number)].name}#{one}" for number, one in zip(shard, member, strict=True)]
    bounds |= {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True) if a}
    targets = as_text(cell for row in rows for cell in row[len(COLUMNS) :])
    return (
        as_text(names),
        np.array(shard, dtype=np.int32),
        np.array(offset, dtype=np.int64),
        np.array(length, dtype=np.int64),
        np.frombuffer(bytes.fromhex("".join(digest)), dtype=np.uint8).reshape(len(rows), 32),
        as_text(groups),
        np.array([float(weight or 1) for weight in weights], dtype=np.float32),
        targets.reshape(len(rows), index.num_columns),
    )


class ShardSource(ImageSource):
    """Pictures in shards; the inputs are names such as `train-000012.tar#cat/photo_17.jpg`.

    Every picture is compared with the hash that the index has for it when it is read.

    Args:
        index: of the shards.
        inputs: (N,) names of all samples.
        places: of each sample the number of the shard, offset and length in bytes, (N, 32) bytes of SHA-256.
        bounds: by name, of pictures with more than 8 bits a channel.
    """

    def __init__(
        self,
        index: ShardIndex,
        inputs: np.ndarray[Any, Any],
        places: tuple[np.ndarray[Any, Any], ...],
        bounds: Mapping[str, Bounds],
    ) -> None:
        self._index, self._inputs, self._bounds = index, inputs, dict(bounds)
        self._shard, self._offset, self._length, self._digest = places
        # A dictionary from names to rows would take ten times the memory of sorted hashes.
        hashed = np.fromiter(map(_name_hash, inputs), dtype=np.uint64, count=len(inputs))
        self._order = np.argsort(hashed, kind="stable")
        self._hashes = hashed[self._order]

    def input(self, name: str) -> Input:
        """The picture of a name, as the bytes of its file.

        Raises:
            IntegrityError: the shard is damaged.
            MissingInputError, HubError, UsageError, StorageError: it cannot be had.
        """
        row = self._row(name)
        shard = self._index.shards[self._shard[row]]
        offset, length = int(self._offset[row]), int(self._length[row])
        called = f"{self._index.place}/{name}"
        content = _content(self._index, shard, offset, length)
        if hashlib.sha256(content).digest() != self._digest[row].tobytes():
            raise IntegrityError(
                f"{self._index.place}/{shard.name} is damaged: {name.partition('#')[2]} is not what the index says",
                fix="copy it again, or write the shards again: flashtask shard DATA OUT",
            )
        return Input(quoted_name(called), content, name)

    def _row(self, name: str) -> int:
        wanted = np.uint64(_name_hash(name))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            if self._inputs[row := int(self._order[place])] == name:
                return row
            place += 1
        raise MissingInputError(f"{self._index.place}/{SHARD_INDEX} has no sample {name!r}")

    def state(self, name: str) -> None:
        """None: decoded pictures are not kept, as there may be more of them than memory holds."""
        return

    def stamps(self, names: Sequence[str]) -> dict[str, str]:
        """The hashes of the pictures, wherever the shards are."""
        return dict(zip(names, self.hashes(names), strict=True))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """How many bytes the file of each picture has, by name."""
        return {name: int(self._length[self._row(name)]) for name in names}

    def hashes(self, names: Sequence[str]) -> list[str]:
        """The SHA-256 of each content, from the index."""
        return [self._digest[self._row(name)].tobytes().hex() for name in names]

    def fingerprint(self, names: Sequence[str]) -> list[str]:
        """The hash of the list of all samples, which has the hash of each."""
        return [self._index.sha256]

    def known_bounds(self, names: Sequence[str]) -> dict[str, Bounds]:
        """The bounds of pictures with more than 8 bits; all pictures were decoded before they were written."""
        return {name: self._bounds[name] for name in names if name in self._bounds} if self._bounds else {}

    def sampler(self, names: Sequence[str]) -> ShardSampler | None:
        """For shards that have to be fetched, an order of one shard after the other."""
        if not self._index.is_remote:
            return None
        return ShardSampler(self._shard[[self._row(name) for name in names]])


class ShardSampler(Sampler[int]):
    """One shard after the other in a random order, and the samples of each in a random order.

    Args:
        shards: (N,) the shard of each sample.
    """

    def __init__(self, shards: np.ndarray[Any, Any]) -> None:
        self._shards = np.unique(shards, return_inverse=True)[1].ravel()

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        turn = torch.randperm(int(self._shards.max(initial=-1)) + 1).numpy()
        drawn = torch.rand(len(self._shards), dtype=torch.float64).numpy()
        yield from np.lexsort((drawn, turn[self._shards])).tolist()


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _content(index: ShardIndex, shard: Shard, offset: int, length: int) -> bytes:
    """Some bytes of a shard; fewer where it ends before.

    Raises:
        MissingInputError: it is not there any more.
        HubError, IntegrityError, UsageError, StorageError: it cannot be fetched.
    """
    path = Path(index.place, shard.name)
    for _ in range(_TRIES if index.is_remote else 1):
        if index.is_remote:
            path = _fetched(index, shard)
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    raise MissingInputError(f"the shard {path} is not there any more")


# ---- shards that have to be fetched


def cache_limit() -> int:
    """Bytes that fetched shards may take.

    Raises:
        UsageError: `$FLASHTASK_SHARD_CACHE_BYTES` is something else than a whole number.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return _DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UsageError(
            f"{_VARIABLE}={text[:40]!r} must be a whole number of bytes",
            fix=f"export {_VARIABLE}={_DEFAULT_LIMIT}, or unset it",
        )
    return int(text)


def _fetched(index: ShardIndex, shard: Shard) -> Path:
    """The path of a shard in the cache, fetched if it is not there.

    Raises:
        IntegrityError: it is not the file that the index describes.
        MissingInputError, HubError, UsageError, StorageError: it cannot be had.
    """
    path = shard_cache() / f"{shard.sha256}.tar"
    if not path.is_file():
        _make_room(path.parent, shard.size)
        _fetch_whole(f"{index.place}/{shard.name}", path, shard.sha256)
    with suppress(OSError):
        os.utime(path)
    return path


def _fetch_whole(address: str, path: Path, sha256: str) -> None:
    """Fetch a file into the cache, one process at a time, and compare its hash."""
    with _one_at_a_time(path.parent):
        if path.is_file():
            return
        with staging_folder(path.parent, "fetching") as staging:
            fetch(address, staging / path.name)
            if sha256_file(staging / path.name) != sha256:
                raise IntegrityError(
                    f"{address} is damaged: it is not the file that the index describes",
                    fix="copy the folder of shards to the server again",
                )
            os.replace(staging / path.name, path)


def _make_room(folder: Path, needed: int) -> None:
    """Remove the shards that were not read for longest until another fits."""
    found = []
    for path in folder.glob("*.tar"):
        with suppress(OSError):  # another process may remove it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    found.sort(reverse=True)
    room = cache_limit() - needed
    for number, (_, size, path) in enumerate(found):
        room -= size
        if room < 0 and number >= _FEWEST_KEPT:
            path.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
