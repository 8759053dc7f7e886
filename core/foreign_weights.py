"""Weights that others wrote: safetensors, and what `torch.save` wrote, which is never unpickled in this process.

A pickled file is read by a child process (see foreign_weights_child.py) that has little memory and time, no network
and no way to write; it hands the tensors back as safetensors. What it sends is checked as a file of unknown origin is.

All files from the hub or from a folder of the user's are read this way. Weights inside an installed package
whose sha256 is in zoo.yaml are read in the process itself, with `weights_only=True`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from io import BufferedIOBase, BufferedReader
from typing import IO, Any, cast

import torch
from torch import Tensor

from flashtask.core.errors import FlashtaskError, IntegrityError, StorageError, UsageError
from flashtask.core.file_kinds import START, kind_of_file
from flashtask.core.files import open_regular
from flashtask.core.plain_json import parse_json
from flashtask.core.tensor_layout import MAX_HEADER, Malformed, check_bools, read_tensor, tensor_layout

__all__ = ["read_foreign_weights"]

MAX_BYTES = 32 * 2**30
_CHILD = "flashtask.core.foreign_weights_child"
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_AMBIGUOUS, _REFUSED, _OUT_OF_MEMORY = 2, 76, 81
_CONVERT = (
    "get the file as safetensors, or convert it where you trust it: "
    "safetensors.torch.save_file(state_dict, 'model.safetensors')"
)


def read_foreign_weights(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, seconds: float | None = None
) -> dict[str, Tensor]:
    """The state dict in a weights file of any origin, on the CPU, in the file's order; no code of the file runs.

    Of a pickled training checkpoint (an epoch, an optimizer, ...) the one state dict is taken that is stored under
    `state_dict`, `model`, `model_state_dict`, `model_state`, `state_dict_ema`, `model_ema` or `teacher`. A `module.`
    before all names is left out.

    Args:
        path: safetensors, or a file of `torch.save` (which must be read in a process of its own: about 2 s).
        max_bytes: a larger file, or one whose tensors are larger, is refused.
        seconds: of the processor that reading a pickled file may take; None allows 2 and 1 for every 50 MB.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: the file is damaged or hostile, needs code to be read, or is of another kind.
        StorageError: the disk does not give the bytes back.
        UsageError: there is more than one set of weights in it, or torch is too old to read pickled files safely.
    """
    name = os.fspath(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise Malformed(f"it has {size:,} bytes; the limit is {max_bytes:,}")
            start = file.peek(START)[:START]
            if start[8:9] != b"{" and (kind := kind_of_file(path, start)) is not None:
                raise IntegrityError(f"{name} holds no weights: it is {kind.what}", fix=_CONVERT)
            pickled = start.startswith(_PICKLED)
            if pickled and not _is_safetensors(file, size):
                return _read_pickled(file, name, size, seconds or 2 + size / 50e6)
            return _read_plain(file, size - 8)
    except (Malformed, IntegrityError) as error:
        if isinstance(error, FlashtaskError) and name in error.what:
            raise
        why = error.what if isinstance(error, IntegrityError) else str(error)
        raise IntegrityError(f"{name} was not loaded", why=why, fix=_CONVERT) from error
    except OSError as error:
        if isinstance(error, FlashtaskError):
            raise
        raise StorageError(f"cannot read {name}: {error.strerror or error}", fix=f"ls -l {name}") from error


def _is_safetensors(file: BufferedReader, size: int) -> bool:
    """Whether the bytes that look like a pickle's beginning are the length of a header."""
    start = file.peek(9)
    return int.from_bytes(start[:8], "little") <= min(MAX_HEADER, size - 8) and start[8:9] == b"{"


def _read_plain(file: BufferedIOBase, most: int) -> dict[str, Tensor]:
    """All tensors of a safetensors stream with at most `most` bytes after the length of its header."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise Malformed(f"it is neither safetensors nor a file of torch.save: its header would have {length:,} bytes")
    if length > most:
        raise Malformed("it is cut short")
    header = parse_json(file.read(length))
    if not isinstance(header, dict) or not _is_text_only(header.pop("__metadata__", {})):
        raise Malformed("its header is not that of a safetensors file")
    tensors = {entry.name: read_tensor(file, entry) for entry in tensor_layout(header, most - length)}
    check_bools(tensors)
    return {name: tensors[name] for name in header}


def _is_text_only(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _read_pickled(file: BufferedReader, name: str, size: int, seconds: float) -> dict[str, Tensor]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UsageError(
            f"{name} is pickled, and torch {torch.__version__} cannot read such files safely",
            why="versions before 2.10 can be made to run code (CVE-2025-32434, CVE-2026-24747)",
            fix="pip install --upgrade 'torch>=2.10'",
        )
    file.seek(0)
    with tempfile.TemporaryFile() as messages, _start(file, messages, size, seconds) as child:
        # Its start is not counted, so on a busy machine the clock may run far ahead of the processor.
        watch = threading.Timer(60 + 10 * seconds, child.kill)
        watch.start()
        try:
            tensors = _received(cast(BufferedReader, child.stdout), 2 * size + 2**20)
        except (Malformed, IntegrityError) as error:
            child.kill()
            raise _refusal(name, child.wait(), messages, seconds) or error from error
        finally:
            watch.cancel()
        if child.wait():
            raise _refusal(name, child.returncode, messages, seconds) or Malformed("reading it ended early")
    return tensors


def _start(file: IO[bytes], messages: IO[bytes], size: int, seconds: float) -> subprocess.Popen[bytes]:
    """The child with the file as its standard input; it finds modules where this process does, except beside it."""
    paths = [path for path in sys.path if path and os.path.isabs(path)]
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "HOME", "LANG", "LC_ALL", "TMPDIR")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-m", _CHILD, str(size), str(seconds)]
    return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=messages, env=environment)


def _received(stream: BufferedReader, most: int) -> dict[str, Tensor]:
    """The tensors that the child sends after telling their whole size in 8 bytes."""
    size = int.from_bytes(stream.read(8), "little")
    if not size:
        raise Malformed("reading it ended early")
    if size > most + MAX_HEADER:
        raise Malformed("its tensors are larger than the file")
    return _read_plain(stream, size - 8)


def _refusal(name: str, code: int, messages: IO[bytes], seconds: float) -> FlashtaskError | None:
    """The error for how the child ended; None if it ended well."""
    messages.seek(0)
    text = messages.read(2000).decode("utf-8", "replace")
    answer = "".join(c if c.isprintable() else " " for c in text.strip().rpartition("\n")[2])[:500]
    if code == _AMBIGUOUS:
        fix = f"save the one you mean: torch.save(torch.load({name!r}, weights_only=True)[KEY], 'weights.pth')"
        return UsageError(f"{name} holds more than one set of weights: {answer}", fix=fix)
    if code == _REFUSED:
        return IntegrityError(f"{name} was not loaded", why=answer, fix=_CONVERT)
    if code == _OUT_OF_MEMORY:
        return IntegrityError(f"{name} was not loaded", why="it needs more memory than its size explains", fix=_CONVERT)
    if code < 0:
        why = f"reading it took more than {seconds:.0f} s, or the system ended it (signal {-code})"
        return IntegrityError(f"{name} was not loaded", why=why, fix=_CONVERT)
    return IntegrityError(f"{name} was not loaded", why=f"its reader failed: {answer}", fix=_CONVERT) if code else None
