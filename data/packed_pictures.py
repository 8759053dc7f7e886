"""Pictures inside of tables: copied once into flat files of the cache, so that only their places are in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from flashtask.core.cache_folder import cache_folder
from flashtask.core.files import staging_folder, storage_error

__all__ = ["PackedPictures", "pack_pictures"]

_PICTURES, _ENDS = "pictures", "ends.npy"


class PackedPictures(Sequence[bytes | None]):
    """The bytes of image files, read when they are asked for; None for a row without any.

    Args:
        folders: what `pack_pictures` gave, in the order of the rows.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._files = [folder / _PICTURES for folder in folders]
        self._ends = [np.load(folder / _ENDS, allow_pickle=False) for folder in folders]
        self._first = np.cumsum([0, *map(len, self._ends)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes | None]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        ends, row = self._ends[number], index - int(self._first[number])
        start = int(ends[row - 1]) if row else 0
        with self._files[number].open("rb") as file:
            file.seek(start)
            return file.read(int(ends[row]) - start) or None


def pack_pictures(key: str, pictures: Iterable[bytes | None]) -> Path:
    """Write pictures one after the other, unless that was done before.

    Args:
        key: what no other pictures have, such as the hash of the table that they are from.
        pictures: the bytes of image files.

    Raises:
        StorageError: the cache cannot be written.
    """
    folder = cache_folder() / "data" / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder.parent, "packing") as staging:
            made, ends, end = staging / "made", [], 0
            made.mkdir()
            with (made / _PICTURES).open("xb") as file:
                for picture in pictures:
                    end += file.write(picture or b"")
                    ends.append(end)
                file.flush()
                os.fsync(file.fileno())
            np.save(made / _ENDS, np.array(ends, dtype=np.int64))
            made.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process has written it meanwhile
            raise storage_error(error, folder) from error
    return folder
