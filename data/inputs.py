"""What people give to predict on, read into one list: files, folders, addresses, bytes, PIL images, arrays, tensors.

Nothing here knows tasks or labels. What is given is looked at when the list is made, so that a wrong thing is refused
before anything is predicted; pixels are decoded, and addresses fetched, when they are needed.
"""

from __future__ import annotations

import glob
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.core.names import quoted_name, shown_name
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.decoding import Decoding, FirstSteps, Fitting, Pixels, Seen
from flashtask.data.folders import list_images
from flashtask.data.geometry import Geometry
from flashtask.data.images import Encoded, image_bounds, image_orientation, image_size
from flashtask.data.layout import is_image_name, nearest_existing
from flashtask.data.value_range import Bounds

if TYPE_CHECKING:
    from flashtask.data.decoded_cache import DecodedCache

__all__ = ["Address", "Input", "input_of", "read_inputs"]

#: The most that is read from an open file: more than any picture of the allowed size takes.
_MOST_BYTES = 2**30
_BLOCK = 2**20
#: Channels of an array or tensor: grey, RGB, RGB with transparency.
_CHANNELS = (1, 3, 4)
_SHOWN = 5

_TAKEN = """predict takes
    the path of an image file or of a folder: str, os.PathLike
    an http(s) address: "https://example.org/cell.png"
    a PIL image
    a NumPy array (H, W, C) or (H, W), or a batch (N, H, W, C), in RGB order
    a torch tensor (C, H, W) or (H, W), or a batch (N, C, H, W)
    (uint8 as it is; other numbers by the value range that the model was trained with)
    the bytes of an image file, or a file opened in binary mode
    a list, tuple or generator of these, mixed"""


@dataclass(frozen=True, eq=False)
class Input:
    """One picture that somebody gave: what it is called, and where its pixels are.

    Args:
        name: what messages call it.
        source: the path of a file, the bytes of one, a PIL image, pixels (H, W, C) or (H, W), or an address.
        path: the path or address, as it was given; None for what has neither.
        load: reads the file in place of Pillow, each time that it is asked for; it names what it cannot read.
    """

    name: str
    source: str | bytes | Image.Image | np.ndarray[Any, Any] | Address
    path: str | None = None
    load: Callable[[str], Encoded] | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file, here or at an address."""
        return isinstance(self.source, (str, Address))

    def read(self, first: FirstSteps, cache: DecodedCache | None = None, seen: Seen | None = None) -> Pixels:
        """The picture after the first steps of a transform.

        Args:
            first: the steps.
            cache: where the pictures of files may be already.
            seen: as in `Fitting.read`; not called for a picture that was kept.

        Raises:
            BadDataError: it is not a whole image.
            MissingInputError: the file is not there any more.
            HubError, IntegrityError: the address cannot be had.
        """
        if isinstance(self.source, str) and self.load is None and cache is not None:
            return cache.read(first, self.source, seen=seen)
        with self.encoded() as source:
            if isinstance(source, np.ndarray):
                pixels = np.ascontiguousarray(source[:, :, 0] if source.shape[2:] == (1,) else source)
                source = Image.fromarray(pixels) if pixels.dtype == np.uint8 else pixels
            return first.read(source, self.name, seen)

    def thumbnail(self, side: int, channels: int = 3) -> Image.Image:
        """A small picture to look at; one with more than 8 bits is drawn from black to white by its own values.

        Args:
            side: pixels that its longer side has at least, unless the picture is smaller.
            channels: 3, or 1 for grey.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        bounds = self.bounds()
        value_range = "format" if bounds is None or bounds[0] == bounds[1] else bounds
        made = Image.fromarray(self.read(Decoding(channels, side, value_range)))
        return made if channels == 1 else made.convert("RGB")

    def placed(self, preprocessing: Preprocessing) -> Geometry:
        """Where the picture lies in the model's input, by which predictions go back to the user's file.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        return Fitting(preprocessing).geometry(self.size())

    def tiles(self, preprocessing: Preprocessing) -> list[Geometry]:
        """Where the picture lies in each input that is made of it: one, unless pictures are cut into tiles.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        return Fitting(preprocessing).tiles(self.size())

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        with self.encoded() as source:
            return image_size(source, self.name)

    def orientation(self) -> int:
        """The EXIF orientation of the file, 1 to 8, that `read` and `size` have applied already.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        with self.encoded() as source:
            return image_orientation(source, self.name)

    def bounds(self) -> Bounds | None:
        """The least and the greatest value of a picture with more than 8 bits a channel; None for any other.

        Raises:
            BadDataError, MissingInputError, HubError, IntegrityError: as `read`.
        """
        with self.encoded() as source:
            return image_bounds(source, self.name)

    @contextmanager
    def encoded(self) -> Iterator[Encoded]:
        """The picture before it is decoded, for as long as the block lasts: a file that is fetched may go after it.

        Raises:
            HubError, IntegrityError: the address cannot be had.
            BadDataError: `load` fails.
        """
        with self.source.file() if isinstance(self.source, Address) else nullcontext(self.source) as source:
            yield self.load(source) if self.load is not None and isinstance(source, str) else source


class Address:
    """An address, fetched when its file is first asked for; the file goes when nobody needs it any more.

    Args:
        url: the address, of http(s) or of a store that fsspec reaches.
        public_only: refuse hosts with private addresses, as where the address comes from a stranger.
    """

    def __init__(self, url: str, *, public_only: bool = False) -> None:
        self._url, self._lock, self._folder = url, threading.Lock(), ""
        self._public_only = public_only

    @contextmanager
    def file(self) -> Iterator[str]:
        """The path of the file, for as long as the block lasts."""
        from flashtask.data.cached_inputs import fetch
        from flashtask.data.download import download_image

        is_http = self._url.lower().startswith(("http://", "https://"))
        with self._lock:
            if self._folder:
                yield os.path.join(self._folder, "image")
                return
            folder = tempfile.mkdtemp(prefix="flashtask-")
            remove = weakref.finalize(self, _remove, folder, os.getpid())
            try:
                if is_http or self._public_only:
                    download_image(self._url, Path(folder, "image"), public_only=self._public_only)
                else:
                    fetch(self._url, Path(folder, "image"))
                if multiprocessing.parent_process() is None:
                    self._folder = folder
                yield os.path.join(folder, "image")
            finally:
                if not self._folder:  # it failed, or this is a process that loads, which ends without cleaning up
                    remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Address, public_only=self._public_only), (self._url,)  # another process fetches for itself


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not when a forked process ends
        shutil.rmtree(folder, ignore_errors=True)


def read_inputs(given: Any, is_image: Callable[[str], bool] = is_image_name) -> tuple[list[Input], bool]:
    """All pictures that were given, and whether it is a single one rather than a list.

    A folder stands for the images in it and below it, sorted by path; what it holds besides is counted on stderr. A
    batch stands for its pictures. Both are lists, however few there are.

    Args:
        given: see the message that a wrong thing gets.
        is_image: which files of a folder count, by their names.

    Raises:
        UsageError: something else; the message lists what is taken.
        MissingInputError: a path that is not there, with the nearest that is.
        BadDataError: a folder without images, or a file that cannot be read.
    """
    if _is_one(given):
        found = _read(given, "", is_image)
        return ([found], True) if isinstance(found, Input) else (found, False)
    if isinstance(given, np.ndarray) and given.ndim == 1:  # of paths
        given = given.tolist()
    if isinstance(given, (Mapping, Set)) or not isinstance(given, Iterable) or _is_loader(given):
        raise _not_taken(given, "")
    inputs: list[Input] = []
    for index, each in enumerate(given):
        if not _is_one(each):
            raise _not_taken(each, f"inputs[{index}]")
        found = _read(each, f"inputs[{index}]", is_image)
        inputs += [found] if isinstance(found, Input) else found
    return inputs, False


def input_of(given: Any) -> Input:
    """One picture: a path is not looked at before it is decoded.

    Raises:
        UsageError: it is no picture, or several.
    """
    if isinstance(given, Input):
        return given
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        return Input(quoted_name(path), path, path)
    if not _is_one(given):
        raise _not_taken(given, "")
    found = _read(given, "")
    if not isinstance(found, Input):
        raise UsageError(f"there are {len(found)} pictures, not one")
    return found


def _is_one(given: Any) -> bool:
    """Whether this is read as a whole, rather than gone through."""
    if isinstance(given, np.ndarray):
        return given.dtype.kind not in "UTO"  # text or paths
    kinds = (Input, str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    return isinstance(given, kinds) or _is_tensor(given) or hasattr(given, "read")


def _is_tensor(given: Any) -> bool:
    torch = sys.modules.get("torch")  # not imported for a command that is given paths
    return torch is not None and isinstance(given, torch.Tensor)


def _is_loader(given: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, (torch.utils.data.DataLoader, torch.utils.data.Dataset))


def _read(given: Any, where: str, is_image: Callable[[str], bool] = is_image_name) -> Input | list[Input]:
    """The picture, or the pictures of a folder or a batch.

    Args:
        given: one thing.
        where: its place in a list; empty if it is alone.
        is_image: which files of a folder count.
    """
    if isinstance(given, Input):
        return given
    if isinstance(given, (str, os.PathLike)):
        return _of_text(os.fsdecode(given), is_image)
    if isinstance(given, (bytes, bytearray, memoryview)):
        return Input(_named("bytes", where), bytes(given))
    if isinstance(given, Image.Image):
        opened_from = getattr(given, "filename", "")
        return Input(_named(f"a PIL image of {opened_from!r}" if opened_from else "a PIL image", where), given)
    if isinstance(given, np.ndarray):
        return _of_array(given, where)
    if _is_tensor(given):
        return _of_tensor(given, where)
    return _of_file(given, where)


def _named(kind: str, where: str) -> str:
    return f"{where} ({kind})" if where else f"given as {kind}"


# ---- paths and addresses


def _of_text(text: str, is_image: Callable[[str], bool]) -> Input | list[Input]:
    if text.lower().startswith(("http://", "https://")):
        from flashtask.data.download import check_address
        from flashtask.data.download_resume import shown

        check_address(text)
        return Input(repr(shown(text)), Address(text), text)
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return _of_folder(path, is_image)
    if os.path.lexists(path):
        return Input(quoted_name(path), path, path)
    if "://" in text:
        raise UsageError(
            f"cannot read {text!r}: of addresses only http:// and https:// are fetched",
            fix="copy the images to a folder, and give that",
        )
    raise _not_there(text, path)


def _of_folder(path: str, is_image: Callable[[str], bool]) -> list[Input]:
    images = list_images(Path(path), "predict", is_image)
    if images.ignored:
        kinds = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in images.ignored)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN))
        rest = f", and {len(kinds) - _SHOWN} more kinds" if len(kinds) > _SHOWN else ""
        total = len(images.ignored) + len(images)
        passed = f"passed over {len(images.ignored)} of {total} files in {shown_name(path)}"
        print(f"{passed}, which are not images by their names: {shown}{rest}", file=sys.stderr)
    return [Input(quoted_name(image), image, image) for image in images.paths]


def _not_there(text: str, path: str) -> MissingInputError:
    what = f"no such image or folder: {text!r}"
    if glob.has_magic(text) and (matching := glob.glob(path)):
        return MissingInputError(
            what,
            why=f"it is a pattern that matches {len(matching)} paths",
            fix=f"sorted(glob.glob({path!r})), after import glob",
        )
    close = nearest_existing(Path(path)) if text.strip() else None
    return MissingInputError(what, fix=f"did you mean {str(close)!r}?" if close else "")


# ---- what is in memory


def _of_file(file: Any, where: str) -> Input:
    """The content of an open file, from its beginning if it can go back there, as Pillow reads it."""
    label = getattr(file, "name", "")
    is_path = isinstance(label, str) and bool(label)
    name = _named(f"an open file {label!r}" if is_path else "an open file", where)
    if isinstance(file, io.TextIOBase):
        fix = f'open({repr(label) if is_path else "path"}, "rb")'
        raise UsageError(f"cannot read the image {name}: it was opened as text", fix=fix)
    if getattr(file, "closed", False):
        raise UsageError(f"cannot read the image {name}: it is closed", fix="give it open, or its path")
    content = io.BytesIO()
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        while block := file.read(_BLOCK):
            if not isinstance(block, (bytes, bytearray)):
                raise _not_taken(file, where)
            content.write(block)
            if content.tell() > _MOST_BYTES:
                raise BadDataError(f"cannot read the image {name}", why=f"it has more than {_MOST_BYTES:,} bytes")
    except OSError as error:
        raise BadDataError(f"cannot read the image {name}", why=error.strerror or str(error)) from error
    return Input(name, content.getvalue())


@dataclass(frozen=True)
class _Kind:
    """What differs between arrays and tensors: the order of their axes, and words for it.

    Args:
        noun: what it is called.
        channels: the axis of the channels in one picture.
        picture: the axes of one picture.
        batch: the axes of several.
        turned: what brings the channels of one, or of several, to their axis.
        to_bytes: what makes uint8 of values.
    """

    noun: str
    channels: int
    picture: str
    batch: str
    turned: tuple[str, str]
    to_bytes: str

    def named(self, shape: tuple[int, ...], dtype: str, where: str) -> str:
        """What messages call one of this shape and type."""
        return _named(f"{'an' if self.noun == 'array' else 'a'} {self.noun} {shape} of {dtype}", where)


_ARRAY = _Kind(
    "array",
    2,
    "(H, W, C)",
    "(N, H, W, C)",
    ("array.transpose(1, 2, 0)", "array.transpose(0, 2, 3, 1)"),
    '.astype("uint8")',
)
_TENSOR = _Kind(
    "tensor",
    0,
    "(C, H, W)",
    "(N, C, H, W)",
    ("tensor.permute(2, 0, 1)", "tensor.permute(0, 3, 1, 2)"),
    ".to(torch.uint8)",
)


def _of_array(array: np.ndarray[Any, Any], where: str) -> Input | list[Input]:
    name = _ARRAY.named(array.shape, array.dtype.name, where)
    _check_values(array.dtype.name, name, _ARRAY)
    _check_shape(array.shape, name, _ARRAY)
    if array.ndim == 4:
        return [Input(f"{name}[{index}]", one) for index, one in enumerate(array)]
    return Input(name, array)


def _of_tensor(tensor: Any, where: str) -> Input | list[Input]:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    name = _TENSOR.named(shape, dtype, where)
    _check_values(dtype, name, _TENSOR)
    _check_shape(shape, name, _TENSOR)
    pixels = (tensor.float() if dtype == "bfloat16" else tensor).detach().cpu().numpy()
    if len(shape) == 4:
        return [Input(f"{name}[{index}]", one.transpose(1, 2, 0)) for index, one in enumerate(pixels)]
    return Input(name, pixels.transpose(1, 2, 0) if len(shape) == 3 else pixels)


def _check_values(dtype: str, name: str, kind: _Kind) -> None:
    """Bytes are pixels as they are; other numbers become bytes by the model's value range, when they are decoded.

    Raises:
        UsageError: what is no number of pixels, with what makes bytes of it.
    """
    if dtype == "bool":
        fix = f"({kind.noun}{kind.to_bytes} * 255)"
        raise UsageError(
            f"cannot read the image {name}", why="pixels are numbers, such as uint8 from 0 to 255", fix=fix
        )
    if not dtype.startswith(("uint", "int", "float", "bfloat")):
        raise UsageError(f"cannot read the image {name}", why="pixels are whole or floating-point numbers")


def _check_shape(shape: tuple[int, ...], name: str, kind: _Kind) -> None:
    """Grey without channels, or with channels on their axis, or several of these.

    Raises:
        UsageError: another shape, with what turns it where that is clear.
    """
    what = f"cannot read the image {name}"
    axes = f"one is {kind.picture}, with 1, 3 or 4 channels, or (H, W) if it is grey; several are {kind.batch}"
    if len(shape) not in (2, 3, 4) or 0 in shape[-3:]:
        raise UsageError(what, why=axes)
    picture = shape[-3:]
    if len(shape) == 2 or picture[kind.channels] in _CHANNELS:
        return
    fix = kind.turned[len(shape) - 3] if picture[2 - kind.channels] in _CHANNELS else ""
    if not fix and len(shape) == 3:
        fix = f"list({kind.noun}), if it is several grey images"
    raise UsageError(what, why=axes, fix=fix)


def _not_taken(given: Any, where: str) -> UsageError:
    kind, fix = type(given).__name__, ""
    if _is_loader(given):
        fix = "trainer.predict(model, dataloaders=...)"
    elif isinstance(given, (list, tuple)):
        fix = "give one list, without lists in it"
    elif isinstance(given, (Mapping, Set)):
        fix = (
            "list(inputs.values())"
            if isinstance(given, Mapping)
            else "sorted(inputs), because results are in the order of the inputs"
        )
    return UsageError(f"predict does not take {f'{where}, which is ' if where else ''}{kind}", why=_TAKEN, fix=fix)
