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

from flashtask.core.errors import BadDataError, FlashtaskError, UnknownInFileError, UnknownNameError, UsageError
from flashtask.core.known_files import content_hashes, stamps_of
from flashtask.core.names import quoted_name
from flashtask.core.registry import Registry
from flashtask.data.cached_inputs import cached_file, is_address, known_place
from flashtask.data.images import Encoded, picture_hash
from flashtask.data.inputs import Input, input_of
from flashtask.data.layout import is_image_name
from flashtask.data.value_range import Bounds

if TYPE_CHECKING:
    from torch.utils.data import Sampler

__all__ = ["FILES", "IMAGE_LOADERS", "ImageSource", "LoadedFiles", "MemoryImages", "loader_of_model", "source_of_files"]
__all__ += ["stored_loader"]

#: Readers of image formats by name: functions from a path to an array (H, W) or (H, W, C), a tensor or a PIL image.
#: `IMAGE_LOADERS.register("dicom", suffixes=[".dcm"])` says which files of a folder they read.
IMAGE_LOADERS: Registry[Callable[[str], Any]] = Registry(
    "image loader", group="flashtask.image_loaders", is_in_zoo=False
)

#: Pictures whose content tells whether a resumed run has the same data.
_SAMPLED = 256


class ImageSource:
    """Base of sources, and the source of image files; the inputs are paths, or addresses whose files are cached.

    `description` says how pictures are read, beyond what the files themselves tell; None if that has no name, and then
    nothing that depends on it is kept between runs.
    """

    description: str | None = ""
    #: The user's function that reads the files: its name if it has one, else itself; None for image files.
    given: str | Callable[[str], Any] | None = None

    def is_image(self, name: str) -> bool:
        """Whether the file is read when its folder is given, by its name."""
        return is_image_name(name)

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
            or a PIL image. Values other than uint8 are scaled by the value range. Of a folder, the files with its
            `suffixes` are read, which it was registered with or has as an attribute; without any, image files.

    Raises:
        UnknownNameError: there is no reader of this name.
        UsageError: neither a name nor a function, or suffixes that no file can have.
    """

    def __init__(self, load: str | Callable[[str], Any]) -> None:
        self.load = IMAGE_LOADERS.get(load) if isinstance(load, str) else load
        if not callable(self.load):
            raise UsageError(f"load_image must be a function that takes a path, or a name, not {load!r}")
        # Recipes, checkpoints and caches know it by its name.
        name = load if isinstance(load, str) else IMAGE_LOADERS.name_of(load)
        self.given = load if name is None else name
        self.description = None if name is None else f" read by {name}"
        registered = {} if name is None else IMAGE_LOADERS.entry(name).metadata
        self._suffixes = _suffixes_of(registered.get("suffixes", getattr(self.load, "suffixes", ())))

    def is_image(self, name: str) -> bool:
        """Whether the file has one of the suffixes of the function, in any case; `.nii.gz` is one."""
        return name.lower().endswith(self._suffixes) if self._suffixes else super().is_image(name)

    def input(self, name: str) -> Input:
        """The picture of a name, which the function makes when it is asked for."""
        return self.reading(super().input(name))

    def reading(self, one: Input) -> Input:
        """The same picture, read by the function if it is a file or at an address."""
        return replace(one, load=self._read) if one.is_file else one

    def _read(self, path: str) -> Encoded:
        """What the function makes of a file.

        Raises:
            BadDataError: it fails, or gives something else.
        """
        what = f"cannot read the image {quoted_name(path)}"
        try:
            found = self.load(path)
            if isinstance(found, (str, os.PathLike)):
                raise TypeError("it gives a path")
        except (FlashtaskError, MemoryError):
            raise
        except Exception as error:  # the function is the user's
            why = f"{getattr(self.load, '__name__', 'load_image')}: {type(error).__name__}: {error}"
            raise BadDataError(what, why=why) from error
        with _picture(found, what).encoded() as source:
            return source


def _suffixes_of(given: Any) -> tuple[str, ...]:
    """The suffixes that a function was registered with, in lower case."""
    found = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(one, str) and one[:1] == "." and len(one) > 1 for one in found):
        raise UsageError(f"suffixes must begin with a dot, and are {given!r}", fix='suffixes=[".dcm"]')
    return tuple(one.lower() for one in found)


def source_of_files(load_image: str | Callable[[str], Any] | None) -> ImageSource:
    """The source for files, with the user's own reader if there is one."""
    return FILES if load_image is None else LoadedFiles(load_image)


def stored_loader(given: Any) -> Any:
    """What a checkpoint holds of the function that reads files: its registered name, else `{"not_saved": NAME}`."""
    if given is None or isinstance(given, (str, dict)):
        return given
    return {"not_saved": getattr(given, "__name__", type(given).__name__)}


def loader_of_model(given: Any) -> LoadedFiles:
    """The source of files that a model predicts on, which are read as those that it was trained on.

    Args:
        given: a name, a function, or what `stored_loader` made of one.

    Raises:
        UsageError: a function that a checkpoint could not hold.
        UnknownInFileError: a name that is not registered here.
    """
    what = "the files that the model was trained on were read by"
    if isinstance(given, dict):
        name = str(given.get("not_saved"))[:100]
        raise UsageError(
            f"{what} the function {name!r}, which its checkpoint does not hold",
            why="a checkpoint holds only names that are registered in IMAGE_LOADERS",
            fix=f"model.load_image = {name}; for the next model, register it before training",
        )
    try:
        return LoadedFiles(given)
    except UnknownNameError as error:
        raise UnknownInFileError(
            error,
            why=f"{what} it, and the names of such functions are known once their module is imported",
            fix=f"import that module, or IMAGE_LOADERS.register({given!r}, FUNCTION)",
        ) from error


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
        return replace(_picture(given, f"cannot read {name}"), name=name)

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


def _picture(given: Any, what: str) -> Input:
    """What the user's own code gave as a picture.

    Raises:
        BadDataError: it is not one; a file that cannot be read is one too, so that all of them are named.
    """
    try:
        return input_of(given)
    except UsageError as error:
        raise BadDataError(what, why=error.what.replace("predict does not take", "not an image:")) from error


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
