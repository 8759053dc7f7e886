"""`shards.json`: the tar files of a folder of shards with their sizes and hashes, and what the targets are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import IntegrityError
from flashtask.core.files import missing_file, staging_folder
from flashtask.core.plain_json import read_json
from flashtask.data.cached_inputs import fetch, is_address
from flashtask.data.layout import SHARD_INDEX

__all__ = ["COLUMNS", "FORMAT", "SAMPLES", "Shard", "ShardIndex", "shard_cache"]

#: The list of all samples, beside the index.
SAMPLES = "samples.csv"
#: What the index says that it is.
FORMAT = 1
#: The columns of the list of samples; those of the targets follow.
COLUMNS = ("shard", "member", "offset", "length", "sha256", "low", "high", "group", "weight", "name")
#: Parts that samples may belong to.
_PARTS = ("train", "val", "test", "predict")
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        name: relative to the folder of the index.
        part: of all samples in it.
        size: bytes.
        sha256: of all bytes, in hexadecimal digits.
    """

    name: str
    part: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What `shards.json` holds.

    Args:
        place: the folder or its address, without a slash at the end.
        shards: the tar files.
        targets: of the reader, as plain values.
        num_columns: of the targets; 0 where there are none.
        sha256: of `samples.csv`.
    """

    place: str
    shards: tuple[Shard, ...]
    targets: Mapping[str, Any]
    num_columns: int
    sha256: str

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ShardIndex:
        """The index of a folder of shards.

        Args:
            folder: a path or an address, of the folder or of its `shards.json`.

        Raises:
            MissingInputError: there is no index, or a shard is not there.
            IntegrityError: the index is damaged, or a shard has another size.
            HubError, UsageError, StorageError: the address cannot be read.
        """
        place = os.fspath(folder).removesuffix(f"/{SHARD_INDEX}").rstrip("/") or "/"
        if is_address(place):
            with staging_folder(shard_cache(), "index") as staging:
                fetch(f"{place}/{SHARD_INDEX}", staging / SHARD_INDEX)
                content = read_json(staging / SHARD_INDEX, most=_MOST_BYTES)
        else:
            place = os.path.abspath(os.path.expanduser(place))
            content = read_json(os.path.join(place, SHARD_INDEX), most=_MOST_BYTES)
        try:
            found = _parsed(place, content)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise IntegrityError(f"{place}/{SHARD_INDEX} is not an index of shards", why=why) from error
        if not found.is_remote:
            found.require_sizes()
        return found

    @property
    def is_remote(self) -> bool:
        """Whether the shards have to be fetched from an address."""
        return is_address(self.place)

    def require_sizes(self) -> None:
        """Compare the shards on this machine with what they were when they were written.

        Raises:
            MissingInputError: one is not there.
            IntegrityError: one has another size.
        """
        for shard in self.shards:
            path = Path(self.place, shard.name)
            if not path.is_file():
                raise missing_file(path)
            if (size := path.stat().st_size) != shard.size:
                raise IntegrityError(
                    f"{path} is damaged: it has {size:,} bytes, and {shard.size:,} when it was written",
                    fix="copy it again, or write the shards again: flashtask shard DATA OUT",
                )


def shard_cache() -> Path:
    """The folder in the cache for what is fetched of shards; made if it is not there."""
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parsed(place: str, content: Any) -> ShardIndex:
    if content["flashtask_shards"] != FORMAT:
        raise ValueError(f"its format is {content['flashtask_shards']!r}, and this version reads {FORMAT}")
    shards = tuple(
        Shard(one["url"], one["part"], one["filesize"], one["sha256"].lower()) for one in content["shardlist"]
    )
    for shard in shards:
        # A name that leads out of the folder would read another file of the user.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.tar", shard.name):
            raise ValueError(f"{shard.name!r} is not the name of a shard")
        if shard.part not in _PARTS or type(shard.size) is not int:
            raise ValueError(f"{shard.name}: part {shard.part!r}, {shard.size!r} bytes")
    hashes = [content["samples"]["sha256"], *(shard.sha256 for shard in shards)]
    if not shards or not all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
        raise ValueError("there are no shards, or a hash is not one")
    columns, targets = content["target_columns"], content["targets"]
    if type(columns) is not int or not 0 <= columns < 10_000 or not isinstance(targets, dict):
        raise ValueError("what it says of targets cannot be used")
    return ShardIndex(place, shards, targets, columns, hashes[0])
