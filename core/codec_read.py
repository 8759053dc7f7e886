"""The reading half of the state codec: plain JSON and named tensors back to the tree they were."""

from __future__ import annotations

import argparse
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtask.core.errors import IntegrityError
from flashtask.core.library_internals import set_layer_versions
from flashtask.core.plain_json import parse_json

__all__ = ["FACTORIES", "NUMPY_SCALAR", "STORED_AS", "decode", "dense_strides", "tensor_names"]

FACTORIES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "bool": bool,
    "dict": dict,
    "float": float,
    "int": int,
    "list": list,
    "set": set,
    "str": str,
    "tuple": tuple,
}
"""What a defaultdict may make: a closed list, since a file never names code."""

STORED_AS: dict[torch.dtype, torch.dtype] = {
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
"""Dtypes that not every version of safetensors knows, and what their bytes are stored as."""

NUMPY_SCALAR = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|U\d{1,6})")
MAX_DEPTH = 64

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)


def decode(json: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` took apart.

    Tensors of one name come back as one tensor, in the memory format they had. Order of keys is kept.

    Raises:
        IntegrityError: the JSON is not what `encode` writes, or a tensor it names is not there.
    """
    try:
        return _Decoder(tensors).decode(json, 0)
    except IntegrityError:
        raise
    except _MALFORMED as error:
        raise IntegrityError(f"its state is malformed: {type(error).__name__}: {str(error)[:200]}") from error


def tensor_names(json: Any) -> Iterator[str]:
    """The names of all tensors of the tree, as opposed to tensors that hold a long list, text or array."""
    waiting = [json]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if node.get("$") == "tensor" and isinstance(node.get("name"), str):
                yield node["name"]
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides put the elements of `shape` side by side, in any order of the dimensions."""
    step = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


class _Decoder:
    """One walk over the JSON: which tensors there are, and which were already given out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.given: dict[str, Tensor] = {}
        self.arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
        self.taken: set[str] = set()

    def decode(self, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise IntegrityError(f"its state is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        if "$" not in node:
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        read = _TAGS.get(node["$"]) if isinstance(node["$"], str) else None
        if read is None:
            raise IntegrityError(f"its state has a part of an unknown kind: {str(node['$'])[:40]!r}")
        return read(self, node, depth + 1)

    def items(self, node: dict[str, Any], depth: int, field: str = "items") -> list[Any]:
        values = self.decode(node[field], depth)
        if not isinstance(values, list):
            raise TypeError(f"{field} is not a list")
        return values

    def pairs(self, node: dict[str, Any], depth: int) -> dict[Any, Any]:
        keys = self.items(node, depth, "keys")
        found = dict(zip(keys, self.items(node, depth, "values"), strict=True))
        if len(found) != len(keys):
            raise ValueError("a key appears twice")
        return found

    def taken_once(self, node: dict[str, Any]) -> Tensor:
        """The tensor that holds a text or a list: of one place alone, or a small file could ask for any number."""
        name = node["name"]
        if name in self.taken:
            raise ValueError("two places hold the same text or list")
        self.taken.add(name)
        return self.tensors[name]

    def data(self, node: dict[str, Any]) -> bytes:
        return self.taken_once(node).numpy().tobytes()

    def long_list(self, node: dict[str, Any], depth: int) -> list[Any]:
        return self.items({"items": parse_json(self.data(node))}, depth)

    def numbers(self, node: dict[str, Any], depth: int) -> list[Any]:
        return list(self.taken_once(node).tolist())

    def ordered(self, node: dict[str, Any], depth: int) -> OrderedDict[Any, Any]:
        found = OrderedDict(self.pairs(node, depth))
        if "versions" in node:
            set_layer_versions(found, self.decode(node["versions"], depth))
        return found

    def default(self, node: dict[str, Any], depth: int) -> defaultdict[Any, Any]:
        return defaultdict(FACTORIES[node["factory"]], self.pairs(node, depth))

    def namespace(self, node: dict[str, Any], depth: int) -> argparse.Namespace:
        found = argparse.Namespace()
        vars(found).update(self.pairs(node, depth))
        return found

    def complex_number(self, node: dict[str, Any], depth: int) -> complex:
        real, imaginary = self.items(node, depth, "parts")
        return complex(real, imaginary)

    def special_float(self, node: dict[str, Any], depth: int) -> float:
        if node["text"] not in ("inf", "-inf", "nan"):
            raise ValueError("a special float is inf, -inf or nan")
        return float(node["text"])

    def scalar(self, node: dict[str, Any], depth: int) -> Any:
        if not NUMPY_SCALAR.fullmatch(node["dtype"]):
            raise ValueError("a numpy scalar of an unknown dtype")
        return np.dtype(node["dtype"]).type(self.decode(node["value"], depth))

    def array(self, node: dict[str, Any], depth: int) -> np.ndarray[Any, Any]:
        place = (node["name"], node["array"])
        if place not in self.arrays:
            stored = self.tensor(node, depth).cpu().numpy()
            if not NUMPY_SCALAR.fullmatch(node["array"]) or np.dtype(node["array"]).itemsize != stored.itemsize:
                raise ValueError("a numpy array of an unknown dtype")
            self.arrays[place] = stored.astype(node["array"], copy=False)
        return self.arrays[place]

    def tensor(self, node: dict[str, Any], depth: int) -> Tensor:
        name = node["name"]
        if name not in self.given:
            self.given[name] = self.fresh_tensor(node)
        return self.given[name]

    def fresh_tensor(self, node: dict[str, Any]) -> Tensor:
        tensor = self.tensors[node["name"]]
        if "dtype" in node:
            tensor = _as_stored(tensor, _DTYPES[f"torch.{node['dtype']}"])
        if "strides" not in node:
            return tensor.contiguous()
        strides = node["strides"]
        whole = isinstance(strides, list) and all(type(n) is int and 0 <= n < 2**63 for n in strides)
        if not whole or not tensor.numel() or not dense_strides(tensor.shape, strides):
            raise ValueError("a tensor with impossible strides")
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a tensor was before it was stored as bytes, or as real and imaginary parts."""
    if STORED_AS.get(dtype) is tensor.dtype:
        return tensor.view(dtype)
    found = torch.view_as_complex(tensor.contiguous())
    if found.dtype is not dtype:
        raise ValueError(f"a tensor of {found.dtype} that should be {dtype}")
    return found


_TAGS: dict[str, Callable[[_Decoder, dict[str, Any], int], Any]] = {
    "array": _Decoder.array,
    "bytes": lambda self, node, depth: self.data(node),
    "complex": _Decoder.complex_number,
    "counter": lambda self, node, depth: Counter(self.pairs(node, depth)),
    "default": _Decoder.default,
    "device": lambda self, node, depth: torch.device(node["text"]),
    "dict": _Decoder.pairs,
    "dtype": lambda self, node, depth: _DTYPES[f"torch.{node['text']}"],
    "float": _Decoder.special_float,
    "frozenset": lambda self, node, depth: frozenset(self.items(node, depth)),
    "int": lambda self, node, depth: int(node["hex"], 16),
    "json": _Decoder.long_list,
    "namespace": _Decoder.namespace,
    "numbers": _Decoder.numbers,
    "ordered": _Decoder.ordered,
    "scalar": _Decoder.scalar,
    "set": lambda self, node, depth: set(self.items(node, depth)),
    "size": lambda self, node, depth: torch.Size(self.items(node, depth)),
    "tensor": _Decoder.tensor,
    "text": lambda self, node, depth: self.data(node).decode("utf-8", "surrogatepass"),
    "tuple": lambda self, node, depth: tuple(self.items(node, depth)),
}
