"""One safetensors file with a JSON document beside its tensors, and a digest over every byte of it.

Layout: 8 bytes header length, JSON header, tensors. The header begins with the same bytes in every file of a
format, so the digest's place is known before anything is parsed:

    {"__metadata__":{"flashtask":"{\"format\":1,\"sha256\":\"<64 hexadecimal digits>\",\"tree\":...}"},...

The digest is the sha256 of the whole file with these 64 digits set to "0".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from flashtask.core.errors import IntegrityError, StorageError, UsageError
from flashtask.core.file_kinds import START, kind_of_file
from flashtask.core.files import atomic_write, missing_file, open_regular
from flashtask.core.plain_json import canonical_json, parse_json
from flashtask.core.tensor_layout import (
    CHUNK,
    DTYPES,
    MAX_HEADER,
    Entry,
    Malformed,
    check_bools,
    read_tensor,
    tensor_layout,
)

__all__ = ["DTYPES", "FORMAT", "damaged", "read_tensor_file", "write_tensor_file"]

FORMAT = 1
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ZEROS = "0" * 64
_START = re.compile(
    rb'\{"__metadata__":\{"flashtask":"\{\\"format\\":(?P<format>[1-9]\d{0,8}),'
    rb'\\"sha256\\":\\"(?P<digest>[0-9a-f]{64})\\"'
)
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def write_tensor_file(path: str | os.PathLike[str], tree: Any, tensors: dict[str, Tensor]) -> None:
    """Writes `tree` (plain JSON) and `tensors` (dense, of a dtype in `DTYPES`, on any device) in one step.

    Tensors are brought to the CPU and made contiguous one at a time, so the file is never held in memory.

    Raises:
        StorageError: see `atomic_write`.
        UsageError: the tree is too large for a header.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header = _header(tree, [(name, tensors[name]) for name in order])
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    digest = hashlib.sha256()
    with atomic_write(path, size=total) as file:
        digest.update(header)
        file.write(header)
        for name in order:
            for chunk in _chunks(tensors[name]):
                digest.update(chunk)
                file.write(chunk)
        file.seek(header.index(_ZEROS.encode()))
        file.write(digest.hexdigest().encode())


def read_tensor_file(
    path: str | os.PathLike[str], shapes_only: Callable[[Any], Iterable[str]] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """The tree and tensors of a file, after its digest was found right.

    Each byte is read once, into the tensor it belongs to, and the digest is of just these bytes: nothing can
    change between check and use, and the tensors do not depend on the file afterwards. They lie in memory
    that torch allocated, because some kernels round differently on other alignments.

    Args:
        path: a file of `write_tensor_file`.
        shapes_only: given the tree, names the tensors wanted on the "meta" device, without their values.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: the file is damaged, hostile, of a newer format, or of another kind.
        StorageError: the disk does not give the bytes back.
    """
    try:
        with open_regular(path) as file:
            _refuse_other_kinds(path, file)
            return _read(file, shapes_only)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise missing_file(path) from error
    except Malformed as error:
        raise damaged(path, str(error)) from error
    except IntegrityError as error:
        if error.fix:
            raise IntegrityError(f"{os.fspath(path)} {error.what}", why=error.why, fix=error.fix) from error
        raise damaged(path, error.what) from error
    except OSError as error:
        fix = f"check the file and the disk: `ls -l {os.fspath(path)}`, `dmesg | tail`"
        raise StorageError(f"cannot read {os.fspath(path)}: {error.strerror}", fix=fix) from error


def damaged(path: str | os.PathLike[str], why: str) -> IntegrityError:
    """The error for a file whose content cannot be trusted."""
    folder = os.path.dirname(os.fspath(path)) or "."
    return IntegrityError(
        f"{os.fspath(path)} is damaged and was not loaded",
        why=why,
        fix=f"use another checkpoint (`ls {folder}`), or copy or download this one again",
    )


def _header(tree: Any, tensors: list[tuple[str, Tensor]]) -> bytes:
    text = canonical_json({"format": FORMAT, "sha256": _ZEROS, "tree": tree})
    header: dict[str, Any] = {"__metadata__": {"flashtask": text}}
    start = 0
    for name, tensor in tensors:
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise UsageError(
            f"the checkpoint has {len(raw):,} bytes of names and settings; the limit is {MAX_HEADER:,}",
            why="there are too many tensors, or state with very many small parts",
            fix="keep large state as one tensor or one list of numbers",
        )
    return len(raw).to_bytes(8, "little") + raw


def _chunks(tensor: Tensor) -> Iterable[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def _read(file: BufferedReader, shapes_only: Callable[[Any], Iterable[str]] | None) -> tuple[Any, dict[str, Tensor]]:
    size = os.fstat(file.fileno()).st_size
    head, raw = _read_header(file, size)
    match = _START.match(raw)
    if match is None:
        raise _foreign(raw)
    if int(match["format"]) > FORMAT:
        raise IntegrityError(
            f"was written by a newer flashtask (format {int(match['format'])}, this one reads {FORMAT})",
            fix="pip install --upgrade flashtask",
        )
    expected = match["digest"].decode()
    tree, entries = _parse_header(raw, size - len(head) - len(raw))
    digest = hashlib.sha256(head)
    digest.update(raw[: match.start("digest")] + _ZEROS.encode() + raw[match.end("digest") :])
    skipped = frozenset(shapes_only(tree)) if shapes_only else frozenset()
    tensors = {entry.name: read_tensor(file, entry, digest, shape_only=entry.name in skipped) for entry in entries}
    if digest.hexdigest() != expected:
        raise Malformed("its digest does not match: bytes were changed after it was written")
    check_bools(tensors)
    return tree, tensors


def _refuse_other_kinds(path: str | os.PathLike[str], file: BufferedReader) -> None:
    """Refuse a file that is known to be something else; one that begins as a tensor file does is read."""
    start = file.peek(START)[:START]
    if start[8:9] == b"{" or (kind := kind_of_file(path, start)) is None:
        return
    raise IntegrityError(
        f"is not a checkpoint, but {kind.what}",
        why="a checkpoint is what a run writes: best.ckpt, last.ckpt",
        fix=kind.fix or "give a .ckpt file of a run",
    )


def _read_header(file: BufferedReader, size: int) -> tuple[bytes, bytes]:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length < 2:
        raise Malformed(f"it has {size} bytes and no header")
    if length > MAX_HEADER and head.startswith(_PICKLES):
        raise IntegrityError(
            "is a pickled file (as torch.save writes), which flashtask never loads",
            why="unpickling a file can run any program",
            fix="convert its weights: safetensors.torch.save_file(torch.load(PATH, weights_only=True), "
            "'weights.safetensors')",
        )
    if length > MAX_HEADER:
        raise Malformed(f"its header claims {length:,} bytes; the limit is {MAX_HEADER:,}")
    if length > size - 8:
        raise Malformed(f"it is cut short: the header has {length:,} bytes, the file {size:,}")
    raw = file.read(length)
    if len(raw) != length:
        raise Malformed("it became shorter while it was read")
    return head, raw


def _foreign(raw: bytes) -> Exception:
    try:
        header = parse_json(raw)
    except IntegrityError:
        return Malformed("its header is not that of a safetensors file")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(header, dict) or (isinstance(metadata, dict) and "flashtask" in metadata):
        return Malformed("its header is not as flashtask writes it")
    return IntegrityError(
        "is a safetensors file, but not a flashtask checkpoint",
        why="it has weights only: no task, labels or settings",
        fix="use its weights by safetensors.torch.load_file(PATH) and module.load_state_dict(...)",
    )


def _parse_header(raw: bytes, data_size: int) -> tuple[Any, list[Entry]]:
    header = parse_json(raw)
    metadata = header.pop("__metadata__")
    if set(metadata) != {"flashtask"} or not isinstance(metadata["flashtask"], str):
        raise Malformed("its metadata has other keys than flashtask")
    document = parse_json(metadata["flashtask"])
    if set(document) != {"format", "sha256", "tree"}:
        raise Malformed("its document has other keys than format, sha256 and tree")
    return document["tree"], tensor_layout(header, data_size)
