"""Where tensors lie in a safetensors file: checked whole, before any memory is taken for them."""

from __future__ import annotations

import math
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["CHUNK", "DTYPES", "MAX_HEADER", "Entry", "Malformed", "check_bools", "read_tensor", "tensor_layout"]

MAX_HEADER = 8 * 2**20
"""Bytes: room for some 30,000 tensors; the worst JSON of that size takes 0.4 GB and 5 s to be refused."""

CHUNK = 4 * 2**20
"""Bytes that are read, hashed or written at a time."""

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}
"""safetensors' names of the dtypes that every version of it can read."""


class Entry(NamedTuple):
    """A tensor that a header declares; its bytes are from `start` up to `stop`, counted from the header's end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Malformed(ValueError):  # noqa: N818 - becomes an IntegrityError that names the file
    """What is wrong with the bytes of a file."""


class Digest(Protocol):
    """What is fed with every byte that is read."""

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""


def tensor_layout(header: dict[str, Any], data_size: int) -> list[Entry]:
    """The tensors that a header (without `__metadata__`) declares, in the order of their bytes.

    Args:
        header: name -> dtype, shape and data_offsets, as read from a file.
        data_size: bytes that follow the header; the tensors must fill them without overlap or hole.

    Raises:
        Malformed: anything else is declared.
    """
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda e: (e.start, e.stop))
    end = 0
    for entry in entries:
        if entry.start != end:
            raise Malformed(f"tensor {entry.name[:200]!r} overlaps another one or leaves a hole")
        end = entry.stop
    if end != data_size:
        raise Malformed(f"it is cut short or has a tail: {end:,} bytes of tensors are declared, {data_size:,} there")
    return entries


def read_tensor(
    file: BufferedIOBase, entry: Entry, digest: Digest | None = None, *, shape_only: bool = False
) -> Tensor:
    """The next tensor of a file whose position is at its start.

    Args:
        file: where it is read from.
        entry: its record in the header.
        digest: is fed with its bytes.
        shape_only: give it on the "meta" device; its bytes are read, but not kept.

    Raises:
        Malformed: the file ends before it does.
    """
    size = entry.stop - entry.start
    buffer = torch.empty(min(size, CHUNK) if shape_only else size, dtype=torch.uint8)
    view = buffer.numpy().data
    for start in range(0, size, CHUNK):
        wanted = min(CHUNK, size - start)
        chunk = view[:wanted] if shape_only else view[start : start + wanted]
        if file.readinto(chunk) != wanted:
            raise Malformed("it became shorter while it was read")
        if digest is not None:
            digest.update(chunk)
    if shape_only or not size:
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta" if shape_only else "cpu")
    return buffer.view(entry.dtype).reshape(entry.shape)


def check_bools(tensors: dict[str, Tensor]) -> None:
    """Make sure that tensors of truth values hold nothing but 0 and 1, which torch takes for granted.

    Raises:
        Malformed: one holds another byte.
    """
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and not tensor.is_meta and bool((tensor.view(torch.uint8) > 1).any()):
            raise Malformed(f"tensor {name[:200]!r} holds other bytes than true and false")


def _entry(name: str, value: Any) -> Entry:
    what = f"tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{what} is not declared by dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise Malformed(f"{what} has an unknown dtype")
    if not _are_sizes(shape) or len(shape) > 64 or not _are_sizes(offsets) or len(offsets) != 2:
        raise Malformed(f"{what} has an impossible shape or offset")
    dtype = DTYPES[value["dtype"]]
    if math.prod(max(n, 1) for n in shape) >= 2**63 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise Malformed(f"{what} has a shape that does not fit its bytes")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
