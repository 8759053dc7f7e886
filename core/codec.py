"""State trees (what `state_dict()` gives) as plain JSON and named tensors, exactly and without pickle.

JSON holds None, bool, str, numbers, lists and dictionaries. Everything else is an object with the key "$":

    {"$": "tensor", "name": ...}     a tensor; two places with one name are one tensor (tied weights)
    {"$": "dict", "keys": [...], "values": [...]}     a dictionary that a JSON object would not keep as it is
    {"$": "tuple", "items": [...]}   and so on; codec_read.py lists them all

What can grow with the data (long lists, long texts) becomes a tensor, so that the JSON stays small.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from flashtask.core.codec_read import FACTORIES, NUMPY_SCALAR, STORED_AS, decode, dense_strides, tensor_names
from flashtask.core.errors import UsageError
from flashtask.core.library_internals import layer_versions
from flashtask.core.metric_value import MetricValue
from flashtask.core.plain_json import canonical_json
from flashtask.core.tensor_file import DTYPES

__all__ = ["decode", "encode", "tensor_names"]

Path = tuple[Any, ...]

LONG = 512
"""Lists with more items than this become a tensor, if they hold no tensors themselves."""
LONG_TEXT = 4096
MAX_DEPTH = 28
"""Of the tree. A level is at most two of JSON, whose readers accept 64."""

_STORABLE = frozenset(DTYPES.values())
_KEYS = (str, int, float, complex, bool, type(None), bytes, tuple, frozenset, torch.dtype, torch.device)


def encode(
    tree: Any, prefix: str = "", *, name_of: Callable[[Path], str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Splits a tree into plain JSON and the tensors it refers to by name; `decode` puts it together again.

    Tensors are those of the tree (detached, not copied, on their device), so write them before they change.
    The same tensor in two places is stored once; another view of its memory is stored by itself.

    Args:
        tree: None, bool, int, float, complex, str, bytes, tensors, numpy arrays and scalars, torch dtypes,
            devices and sizes, in lists, tuples, sets, dictionaries (OrderedDict, defaultdict, Counter) and
            argparse Namespaces.
        prefix: begins the name of every tensor.
        name_of: gives a tensor's name from its path in the tree, instead of prefix and path joined by "/".

    Raises:
        UsageError: something else is in the tree, or it is nested deeper than 28 levels; names the place.
    """
    encoder = _Encoder(name_of or (lambda path: prefix + "/".join(map(str, path))))
    return encoder.encode(tree, ()), encoder.tensors


class _Encoder:
    """One walk over a tree: the tensors found so far and the names they got."""

    def __init__(self, name_of: Callable[[Path], str]) -> None:
        self.name_of = name_of
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple[Any, ...], str] = {}
        self.references = 0

    def encode(self, value: Any, path: Path) -> Any:
        """The plain node of a value; its tensors are put aside under their names."""
        if len(path) > MAX_DEPTH:
            raise UsageError(f"{_place(path[:4])} is nested too deeply to be saved, or holds itself")
        kind = type(value)
        if value is None or kind is bool:
            return value
        simple = _SIMPLE.get(kind)
        if simple is not None:
            return simple(self, value, path)
        if isinstance(value, Tensor):
            return self.tensor(value, path)
        if isinstance(value, np.generic):
            return self.numpy_scalar(value, path)
        raise _cannot(value, path)

    def integer(self, value: int, path: Path) -> Any:
        return value if abs(value) < 2**63 else {"$": "int", "hex": hex(value)}

    def real(self, value: float, path: Path) -> Any:
        return value if math.isfinite(value) else {"$": "float", "text": str(value)}

    def complex_number(self, value: complex, path: Path) -> Any:
        return {"$": "complex", "parts": [self.real(value.real, path), self.real(value.imag, path)]}

    def text(self, value: str, path: Path) -> Any:
        if len(value) <= LONG_TEXT:
            return value
        return {"$": "text", "name": self.add_bytes(value.encode("utf-8", "surrogatepass"), path)}

    def raw_bytes(self, value: bytes, path: Path) -> Any:
        return {"$": "bytes", "name": self.add_bytes(value, path)}

    def items(self, values: list[Any], path: Path) -> Any:
        """A list as JSON, or as a tensor when it is long."""
        dtype = _number_dtype(values) if len(values) > LONG else None
        if dtype is not None:
            return {"$": "numbers", "name": self.add(torch.tensor(values, dtype=dtype), path)}
        return self.nodes(range(len(values)), values, path)

    def nodes(self, keys: Iterable[Any], values: Iterable[Any], path: Path) -> Any:
        """Each value as JSON; all in one tensor when they are many and hold no tensors themselves."""
        references = self.references
        nodes = [self.encode(value, (*path, key)) for key, value in zip(keys, values, strict=True)]
        if len(nodes) > LONG and self.references == references:
            return {"$": "json", "name": self.add_bytes(canonical_json(nodes).encode(), path)}
        return nodes

    def tuple_items(self, value: tuple[Any, ...], path: Path) -> Any:
        return {"$": "tuple", "items": self.items(list(value), path)}

    def size(self, value: torch.Size, path: Path) -> Any:
        return {"$": "size", "items": self.items(list(value), path)}

    def set_items(self, value: set[Any], path: Path) -> Any:
        return {"$": "set", "items": self.items(sorted(value, key=repr), path)}

    def frozenset_items(self, value: frozenset[Any], path: Path) -> Any:
        return {"$": "frozenset", "items": self.items(sorted(value, key=repr), path)}

    def dictionary(self, value: dict[Any, Any], path: Path) -> Any:
        keys = list(value)
        plain = all(type(key) is str and key != "$" for key in keys) and len(keys) <= LONG
        if plain and keys == sorted(keys):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return {"$": "dict", **self.pairs(value, path)}

    def pairs(self, value: dict[Any, Any], path: Path) -> dict[str, Any]:
        """Keys and values side by side: canonical JSON sorts an object, so it would lose their order."""
        for key in value:
            if type(key) not in _KEYS and not isinstance(key, np.generic):
                raise _cannot(key, (*path, key), "a key of type")
        keys = self.items(list(value), (*path, "$keys"))
        return {"keys": keys, "values": self.nodes(value, value.values(), path)}

    def ordered(self, value: OrderedDict[Any, Any], path: Path) -> Any:
        node = {"$": "ordered", **self.pairs(value, path)}
        # Module.state_dict() hangs the version of each layer's layout on its result.
        versions = layer_versions(value)
        if versions is not None:
            node["versions"] = self.encode(versions, (*path, "$versions"))
        return node

    def default(self, value: defaultdict[Any, Any], path: Path) -> Any:
        names = [name for name, factory in FACTORIES.items() if factory is value.default_factory]
        if not names:
            raise _cannot(value.default_factory, path, "a defaultdict of")
        return {"$": "default", "factory": names[0], **self.pairs(value, path)}

    def counter(self, value: Counter[Any], path: Path) -> Any:
        return {"$": "counter", **self.pairs(value, path)}

    def namespace(self, value: argparse.Namespace, path: Path) -> Any:
        return {"$": "namespace", **self.pairs(vars(value), path)}

    def dtype(self, value: torch.dtype, path: Path) -> Any:
        return {"$": "dtype", "text": str(value).removeprefix("torch.")}

    def device(self, value: torch.device, path: Path) -> Any:
        return {"$": "device", "text": str(value)}

    def numpy_scalar(self, value: np.generic, path: Path) -> Any:
        if not NUMPY_SCALAR.fullmatch(value.dtype.str):
            raise _cannot(value, path)
        return {"$": "scalar", "dtype": value.dtype.str, "value": self.encode(value.item(), path)}

    def array(self, value: np.ndarray[Any, Any], path: Path) -> Any:
        native = np.asarray(value, dtype=value.dtype.newbyteorder("="))
        if min(native.strides, default=0) < 0 or not native.flags.writeable:
            native = native.copy()
        try:
            tensor = torch.from_numpy(native)
        except TypeError as error:
            raise _cannot(value, path, f"a numpy array of {value.dtype},") from error
        return {**self.tensor(tensor, path), "$": "array", "array": value.dtype.str}

    def tensor(self, value: Tensor, path: Path) -> dict[str, Any]:
        self.references += 1
        node: dict[str, Any] = {"$": "tensor"}
        plain = _plain_tensor(value, path)
        strides = tuple(plain.stride())
        if plain.numel() and strides != _default_strides(plain) and dense_strides(plain.shape, strides):
            node["strides"] = list(strides)
        if plain.dtype not in _STORABLE:
            node["dtype"] = str(plain.dtype).removeprefix("torch.")
            plain = torch.view_as_real(plain) if plain.is_complex() else plain.view(STORED_AS[plain.dtype])
        node["name"] = self.add(plain, path, node.get("dtype"))
        return node

    def add_bytes(self, data: bytes, path: Path) -> str:
        return self.add(torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)], path)

    def add(self, tensor: Tensor, path: Path, dtype: str | None = None) -> str:
        """Keeps a tensor under a name of its own, or gives the name it already has."""
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, dtype)
        if tensor.numel() and memory in self.names:
            return self.names[memory]
        wanted = name = self.name_of(path).encode("ascii", "backslashreplace").decode()
        count = 1
        while name in self.tensors or name in ("", "__metadata__"):
            count += 1
            name = f"{wanted}~{count}"
        self.tensors[name] = tensor
        self.names[memory] = name
        return name


_SIMPLE: dict[type, Callable[[_Encoder, Any, Path], Any]] = {
    int: _Encoder.integer,
    float: _Encoder.real,
    MetricValue: _Encoder.real,
    complex: _Encoder.complex_number,
    str: _Encoder.text,
    bytes: _Encoder.raw_bytes,
    list: _Encoder.items,
    tuple: _Encoder.tuple_items,
    set: _Encoder.set_items,
    frozenset: _Encoder.frozenset_items,
    dict: _Encoder.dictionary,
    OrderedDict: _Encoder.ordered,
    defaultdict: _Encoder.default,
    Counter: _Encoder.counter,
    argparse.Namespace: _Encoder.namespace,
    torch.Size: _Encoder.size,
    torch.dtype: _Encoder.dtype,
    torch.device: _Encoder.device,
    np.ndarray: _Encoder.array,
}


def _plain_tensor(value: Tensor, path: Path) -> Tensor:
    """The values without gradient and class; what a file cannot hold is an error."""
    if is_lazy(value):
        raise UsageError(
            f"{_place(path)} is a lazy parameter without a shape and cannot be saved",
            fix="run one batch through the module first",
        )
    plain = value.detach()
    if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_meta or plain.is_quantized:
        raise _cannot(value, path, f"a tensor ({plain.layout}, {plain.device}, {plain.dtype}) of type")
    if not (plain.is_complex() or plain.dtype in STORED_AS or plain.dtype in _STORABLE):
        raise _cannot(value, path, f"a tensor of {plain.dtype},")
    return plain.resolve_conj().resolve_neg()


def _default_strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(torch.empty(tensor.shape, device="meta").stride())


def _number_dtype(values: list[Any]) -> torch.dtype | None:
    kinds = {type(value) for value in values}
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
        return torch.int64
    return {frozenset({float}): torch.float64, frozenset({bool}): torch.bool}.get(frozenset(kinds))


def _place(path: Path) -> str:
    """Where in the tree, in words: `callback 'EarlyStopping' key 'best'`."""
    if not path:
        return "the state"
    first, rest = str(path[0]), path[1:]
    if first == "callbacks" and rest:
        first, rest = f"callback {rest[0]!r}", rest[1:]
    return " ".join([first, *(f"key {key!r}" for key in rest)])


def _cannot(value: Any, path: Path, what: str = "an object of type") -> UsageError:
    kind = type(value)
    return UsageError(
        f"{_place(path)} is {what} {kind.__module__}.{kind.__qualname__} and cannot be saved",
        why="a checkpoint holds numbers, texts, tensors and lists or dictionaries of them, never code",
        fix="return such values from state_dict(), and build the object again in load_state_dict()",
    )
