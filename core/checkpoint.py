"""Checkpoints: one verified safetensors file for weights, state and settings, without pickle.

The tensors of `state_dict` have their own names in the file, so any safetensors reader can use the weights;
all others are named by their path, as `@optimizer_states/0/state/0/exp_avg`. Tied weights are stored once,
under the first of their names. What is not a tensor is JSON in the file's metadata (see codec.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashtask.core.codec import decode, encode, tensor_names
from flashtask.core.errors import FlashtaskError, IntegrityError, UsageError
from flashtask.core.model_path import model_path
from flashtask.core.tensor_file import FORMAT, damaged, read_tensor_file, write_tensor_file

__all__ = ["MapLocation", "error_context", "read_checkpoint", "read_header", "write_checkpoint"]

_UNFIT = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)

MapLocation = str | torch.device | dict[str, str] | Callable[[Any, str], Any] | None


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes `content` as one checkpoint file, in one step: `path` is the old file or the whole new one.

    Args:
        path: the file; its folder must exist.
        content: any state trees (see `encode`) under names such as `state_dict`, `optimizer_states`,
            `callbacks`, `hyper_parameters`, `epoch`. What `read_checkpoint` adds is left out.

    Raises:
        UsageError: a value that no file can hold; names the callback and key.
        StorageError: the file cannot be written.
    """
    added = {"format"} | ({"hyperparameters"} if "hyper_parameters" in content else set())
    kept = {key: value for key, value in content.items() if key not in added}
    if "state_dict" in kept:
        # First, so that a tensor that a callback holds as well gets the name the model gives it.
        kept = {"state_dict": kept.pop("state_dict"), **kept}
    tree, tensors = encode(kept, name_of=_tensor_name)
    write_tensor_file(path, tree, tensors)


def read_checkpoint(path: str | os.PathLike[str], map_location: MapLocation = None) -> dict[str, Any]:
    """The content of a checkpoint, after its digest was verified; nothing in a file is ever executed.

    It has two keys more than were written: `hyperparameters`, the same object as `hyper_parameters` if that
    is there, and `format`, the file's format number.

    Args:
        path: a file of `write_checkpoint`, or a run folder: its `best.ckpt`, else its `last.ckpt`.
        map_location: where tensors go, as in torch.load: a device or its name; a dictionary, of which only
            the entry for "cpu" counts because all tensors are stored from there; or a function of
            (storage, "cpu") whose result's device is used. None: the CPU.

    Raises:
        MissingInputError: there is no such file; names the nearest one.
        IntegrityError: the file is damaged, hostile, not a checkpoint, or of a newer format.
        UsageError: there is no such device here.
    """
    to_device = _moving_to(map_location)
    if os.path.isdir(path):
        path = model_path(path)
    tree, tensors = read_tensor_file(path)
    for name in set(tensor_names(tree)) & set(tensors):
        tensors[name] = to_device(tensors[name])
    return _content(path, tree, tensors)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `read_checkpoint` gives, also verified, but with tensors on the "meta" device: without values.

    For listings: needs next to no memory, and the time to read the file once. Errors as `read_checkpoint`.
    """
    return _content(path, *read_tensor_file(path, shapes_only=tensor_names))


@contextmanager
def error_context(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around whatever takes in the content of a file: every error names the file.

    A right digest shows that a file is as it was written, not that its content fits: a place in it may be missing, or
    be of another kind than the code that takes it expects.

    Raises:
        IntegrityError: in place of a KeyError, TypeError, ...; the error that it came from is its cause.
    """
    try:
        yield
    except FlashtaskError as error:
        error.about(path)
        raise
    except _UNFIT as error:
        raise IntegrityError(
            f"{os.fspath(path)} cannot be used",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="use another checkpoint, or the classes and the version of flashtask that wrote this one",
        ) from error


def _tensor_name(path: tuple[Any, ...]) -> str:
    if len(path) == 2 and path[0] == "state_dict" and not str(path[1]).startswith(("@", "$")):
        return str(path[1])
    return "@" + "/".join(str(part)[:200] for part in path)


def _moving_to(location: MapLocation) -> Callable[[Tensor], Tensor]:
    if isinstance(location, dict):
        location = location.get("cpu")
    if location is None:
        return lambda tensor: tensor
    if isinstance(location, (str, torch.device)):
        device = _usable_device(location)
        return lambda tensor: tensor.to(device)
    if not callable(location):
        raise UsageError(f"map_location cannot be {location!r}", fix='map_location="cpu"')
    place = location
    return lambda tensor: _placed(tensor, place(tensor.untyped_storage(), "cpu"))


def _placed(tensor: Tensor, storage: Any) -> Tensor:
    return tensor if storage is None else tensor.to(storage.device)


def _usable_device(name: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(
            f"map_location: there is no device {str(name)!r} here",
            why=str(error).splitlines()[0],
            fix='map_location="cpu"',
        ) from error


def _content(path: str | os.PathLike[str], tree: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        content = decode(tree, tensors)
    except IntegrityError as error:
        raise damaged(path, error.what) from error
    if not isinstance(content, dict):
        raise damaged(path, "its state is not a dictionary")
    if "hyper_parameters" in content:
        content["hyperparameters"] = content["hyper_parameters"]
    content["format"] = FORMAT
    return content
