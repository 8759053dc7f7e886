"""The pictures that `flashtask predict` is given, as one sequence in which each takes the memory of its name.

An `Input` is made when it is asked for, so folders, tables and shards of ten million pictures are opened like small
ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from flashtask.core.errors import UsageError
from flashtask.core.names import quoted_name
from flashtask.data.cached_inputs import is_address
from flashtask.data.inputs import Address, Input, read_inputs
from flashtask.data.layout import is_image_name, is_shards, is_table_name
from flashtask.data.samples import as_text

if TYPE_CHECKING:
    from flashtask.data.image_source import LoadedFiles, MemoryImages

__all__ = ["Pictures", "open_pictures"]


class Pictures(Sequence[Input]):
    """Pictures by name.

    Args:
        names: (N,) text, in the order of prediction.
        make: the picture of a name.
    """

    def __init__(self, names: np.ndarray[Any, Any], make: Callable[[str], Input]) -> None:
        self.names, self.input = names, make

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Input: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: Any) -> Any:
        return self.at(index) if isinstance(index, slice) else self.input(str(self.names[index]))

    def __iter__(self) -> Iterator[Input]:
        return map(self.input, map(str, self.names))

    def at(self, rows: Any) -> Pictures:
        """Those at some positions, or in a slice."""
        return Pictures(self.names[rows], self.input)

    def read_by(self, files: LoadedFiles) -> Pictures:
        """The same, with files read by a function of the user's."""
        return Pictures(self.names, partial(_read_by, files, self.input))

    def digest(self) -> str:
        """A hash of all names in their order."""
        found = hashlib.blake2b(digest_size=16)
        for name in self.names:
            found.update(str(name).encode(errors="surrogatepass") + b"\0")
        return found.hexdigest()


def open_pictures(
    given: Sequence[str],
    column: str | None = None,
    root: str | None = None,
    is_image: Callable[[str], bool] = is_image_name,
) -> Pictures:
    """The pictures that files, folders, addresses, a table or shards stand for.

    Files, folders and addresses come in the order in which they are given, the images of a folder sorted by path. A
    table (.csv, .tsv, .jsonl, .parquet) has a picture a row; of shards all samples are taken, in the order of their
    list.

    Args:
        given: paths and addresses; a table or a folder of shards is given alone.
        column: of a table, with the paths, addresses or pictures; None if it is the only one that has such.
        root: what relative paths in a table count from; None means its folder.
        is_image: which files of a folder count, by their names.

    Raises:
        MissingInputError: something is not there; with the nearest that is.
        UsageError: a table or shards with something else, a column without a table, an address that cannot be fetched.
        BadDataError: a folder without images, or a table that cannot be read.
        IntegrityError: damaged shards.
        HubError: an address cannot be reached.
    """
    large = [one for one in given if _is_table(one) or is_shards(one)]
    if large and len(given) > 1:
        raise UsageError(
            f"{large[0]!r} is predicted alone, and {len(given)} inputs are given", fix="a command for each of them"
        )
    if large and _is_table(large[0]):
        return _of_table(large[0], column, root)
    for flag, value in (("--input", column), ("--root", root)):
        if value is not None:
            raise UsageError(f"{flag} {value}: there is no table", fix=f"leave out {flag}")
    if large:
        from flashtask.data.shard_index import ShardIndex
        from flashtask.data.shards import read_samples

        table, source = read_samples(ShardIndex.read(large[0]))
        return Pictures(table.inputs, source.input)
    return Pictures(as_text(one.path for one in read_inputs(list(given), is_image)[0]), _of_name)


def _is_table(path: str) -> bool:
    return is_table_name(path) and not os.path.isdir(path)


def _of_table(path: str, column: str | None, root: str | None) -> Pictures:
    from flashtask.data.image_source import MemoryImages
    from flashtask.data.table_rows import rows_of_table
    from flashtask.data.tables import open_table

    table = open_table(path, os.path.basename(path))
    rows, held = rows_of_table("predict", table, table.input_field(column), (), {}, {"images_root": root})
    table.problems.refuse(path)
    if held is None:
        return Pictures(rows.inputs, _of_name)
    return Pictures(rows.inputs, partial(_held, MemoryImages({table.argument: held})))


# Functions of the module, because other processes get them too.


def _held(images: MemoryImages, name: str) -> Input:
    return replace(images.input(name), path=name)


def _read_by(files: LoadedFiles, make: Callable[[str], Input], name: str) -> Input:
    return files.reading(make(name))


def _of_name(name: str) -> Input:
    if not is_address(name):
        return Input(quoted_name(name), name, name)
    from flashtask.data.download_resume import shown

    return Input(repr(shown(name)), Address(name), name)
