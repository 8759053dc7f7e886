"""Where the pictures of a table are read: in files, in memory, or by a function for a format of one's own.

The input of a sample is always a text: the path or the address of a file, or the name of a picture in memory, such as
`train_data[12]`. An `ImageSource` says what is behind it, so splitting, checking and reporting need no other table.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flashtask.core.errors import BadDataError, FlashtaskError, UsageError
from flashtask.core.known_files import content_hashes, stamps_of
from flashtask.core.names import quoted_name
from flashtask.core.registry import Registry
from flashtask.data.cached_inputs import cached_file, is_address, known_place
from flashtask.data.images import picture_hash
from flashtask.data.inputs import Input, input_of
from flashtask.data.value_range import Bounds

if TYPE_CHECKING:
    from torch.utils.data import Sampler

__all__ = ["FILES", "IMAGE_LOADERS", "ImageSource", "LoadedFiles", "MemoryImages", "source_of_files"]

#: Readers of image formats by name: functions from a path to an array (H, W) or (H, W, C), a tensor or a PIL image.
IMAGE_LOADERS: Registry[Callable[[str], Any]] = Registry("image loader")

#: Pictures whose content tells whether a resumed run has the same data.
_SAMPLED = 256


class ImageSource:
    """Base of sources, and the source of image files; the inputs are paths, or addresses whose files are cached.

    `description` says how pictures are read, beyond what the files themselves tell; None if that has no name, and then
    nothing that depends on it is kept between runs.
    """

    description: str | None = ""

    def input(self, name: str) -> Input:
        """The picture of a name; it is decoded later.

        Raises:
            UsageError, MissingInputError, HubError, StorageError: the file at an address cannot be had.
        """
        return Input(quoted_name(name), cached_file(name) if is_address(name) else name, name)

    def state(self, name: str) -> Hashable | None:
        """What differs as soon as a picture may have changed; None if it is not there."""
        try:
            file = os.stat(_path(name))
        except OSError:
            return None  # reading it says why
        return file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino

    def stamps(self, names: Sequence[str]) -> dict[str, str]:
        """The same as texts that hold for other processes too, of the pictures that have one."""
        if self.description is None:
            return {}
        found = stamps_of([_path(name) for name in names])
        return {name: found[_path(name)] for name in names if _path(name) in found}

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes by name, of those that are there; pictures of different sizes are not equal."""
        return {name: os.path.getsize(_path(name)) for name in names if os.path.isfile(_path(name))}

    def hashes(self, names: Sequence[str]) -> list[str]:
        """The SHA-256 of the content of each file, in their order."""
        return content_hashes([_path(name) for name in names])

    def known_bounds(self, names: Sequence[str]) -> dict[str, Bounds] | None:
        """The bounds of pictures with more than 8 bits a channel, if all are known to be whole; else None."""
        return None

    def sampler(self, names: Sequence[str]) -> Sampler[int] | None:
        """What draws the order of an epoch, if these pictures cannot be read in any order; else None."""
        return None

    def fingerprint(self, names: Sequence[str]) -> list[str]:
        """What tells these pictures from others where the names do not; for files the names do."""
        return []


def _path(name: str) -> str:
    """The file on this machine, which may not be fetched yet."""
    return str(known_place(name)) if is_address(name) else name


#: The source of image files in the formats that are read here.
FILES = ImageSource()


class LoadedFiles(ImageSource):
    """Files that a function reads.

    Args:
        load: a name in `IMAGE_LOADERS`, or a function from a path to an array (H, W) or (H, W, C), a tensor (C, H, W)
            or a PIL image. Values other than uint8 are scaled by the value range.

    Raises:
        UnknownNameError: there is no reader of this name.
        UsageError: neither a name nor a function.
    """

    def __init__(self, load: str | Callable[[str], Any]) -> None:
        self.load = IMAGE_LOADERS.get(load) if isinstance(load, str) else load
        if not callable(self.load):
            raise UsageError(f"load_image must be a function that takes a path, or a name, not {load!r}")
        #: The name that recipes and caches know the function by; None if it is not registered.
        self.name = load if isinstance(load, str) else IMAGE_LOADERS.name_of(load)
        self.description = None if self.name is None else f" read by {self.name}"

    def input(self, name: str) -> Input:
        """The picture that the function makes of a file.

        Raises:
            BadDataError: the function fails, or gives something else.
        """
        called = quoted_name(name)
        try:
            found = self.load(cached_file(name) if is_address(name) else name)
            if isinstance(found, (str, os.PathLike)):
                raise TypeError("it gives a path")
            return replace(input_of(found), name=called, path=name)
        except (FlashtaskError, MemoryError):
            raise
        except Exception as error:  # the function is the user's
            why = f"{getattr(self.load, '__name__', 'load_image')}: {type(error).__name__}: {error}"
            raise BadDataError(f"cannot read the image {called}", why=why) from error


def source_of_files(load_image: str | Callable[[str], Any] | None) -> ImageSource:
    """The source for files, with the user's own reader if there is one."""
    return FILES if load_image is None else LoadedFiles(load_image)


class MemoryImages(ImageSource):
    """Pictures in memory, or made by the items of a dataset.

    Args:
        images: the argument that gave them -> the pictures: arrays (H, W) or (H, W, C), tensors (C, H, W), PIL images
            or the bytes of files. Each must be the same whenever it is asked for.
    """

    def __init__(self, images: Mapping[str, Sequence[Any]]) -> None:
        self._images = dict(images)
        self._hashes: dict[str, str] = {}

    @staticmethod
    def names(argument: str, count: int) -> list[str]:
        """What the pictures of an argument are called."""
        return [f"{argument}[{place}]" for place in range(count)]

    def input(self, name: str) -> Input:
        """The picture of a name.

        Raises:
            BadDataError: the dataset that should give it fails.
            UsageError: it is not a picture.
        """
        argument, _, place = name.rpartition("[")
        try:
            given = self._images[argument][int(place[:-1])]
        except (FlashtaskError, MemoryError):
            raise
        except Exception as error:  # a dataset is the user's
            raise BadDataError(f"cannot read {name}", why=f"{type(error).__name__}: {error}") from error
        try:
            return replace(input_of(given), name=name)
        except UsageError as error:  # as an image that cannot be read, so that all of them are named
            what = error.what.replace("predict does not take", "not an image:")
            raise BadDataError(f"cannot read {name}", why=what) from error

    def state(self, name: str) -> Hashable:
        """Nothing that differs: pictures in memory do not change."""
        return ()

    def stamps(self, names: Sequence[str]) -> dict[str, str]:
        """None: another process may have other pictures of these names."""
        return {}

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """The same number for all: only their contents tell whether two are equal."""
        return dict.fromkeys(names, 0)

    def hashes(self, names: Sequence[str]) -> list[str]:
        """The SHA-256 of each picture's pixels, or of its file; each is read once for that."""
        for name in names:
            if name not in self._hashes:
                self._hashes[name] = _hash_of(self.input(name))
        return [self._hashes[name] for name in names]

    def fingerprint(self, names: Sequence[str]) -> list[str]:
        """The hashes of up to 256 pictures, evenly spread."""
        chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), _SAMPLED)).round().astype(int))
        return self.hashes([names[place] for place in chosen])


def _hash_of(given: Input) -> str:
    source = given.source
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, str):
        return content_hashes([source])[0]
    if isinstance(source, Image.Image):
        return picture_hash(source)
    assert isinstance(source, np.ndarray)
    content = np.ascontiguousarray(source)
    return hashlib.sha256(f"{content.shape} {content.dtype}".encode() + content.tobytes()).hexdigest()
