"""The process that unpickles a foreign weights file: `python -m flashtask.core.foreign_weights_child SIZE SECONDS`.

The file is its standard input. It answers on standard output with 8 bytes, the size of what follows, and a
safetensors file; or it ends with 76 (refused), 2 (more than one set of weights) or 81 (out of memory), and a line that
says why.

`weights_only=True` is the first wall. The others are for the day it has a hole: there is no network, no memory and time
beyond what the size of the file explains, and neither a process, a file nor a socket can be made.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from typing import IO, Any, NoReturn

__all__ = ["check_zip", "main", "state_dict_in"]

_HOLDERS = ("state_dict", "model", "model_state_dict", "model_state", "state_dict_ema", "model_ema", "teacher")
_FORBIDDEN = (
    "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.spawn", "os.system", "pty.",
    "shutil.", "socket.", "subprocess.", "urllib.", "webbrowser.",
)  # fmt: skip
#: Classes and functions by which training scripts keep their arguments, times, paths and numbers beside the weights.
_BESIDE = (
    "argparse.Namespace", "datetime.date", "datetime.datetime", "datetime.timedelta", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
)  # fmt: skip
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MAX_ENTRIES = 100_000
_SPARE = 256 * 2**20


class Refused(ValueError):  # noqa: N818 - never leaves this process
    """The file is refused; the message is the reason."""


class Ambiguous(Refused):
    """The sets of weights of which one would have to be chosen."""


class Beside:
    """Stands for each object of `_BESIDE`: it takes whatever the file has for it, and calls and keeps nothing."""

    def __init__(self, *parts: Any) -> None:
        """Drop what the object would be made of."""

    def __setstate__(self, state: Any) -> None:
        """Drop what the object would hold."""


def main() -> int:
    """Read the file that is standard input; gives the exit code."""
    size, seconds = int(sys.argv[1]), float(sys.argv[2])
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints does not get among the tensors
    _leave_the_network()
    import torch

    # Imported here, and a kernel loaded: behind the walls there may be no memory for it.
    from flashtask.core.tensor_layout import DTYPES

    torch.zeros(1).contiguous().view(torch.uint8).numpy()
    source = os.fdopen(0, "rb")
    names = {dtype: name for name, dtype in DTYPES.items()}
    try:
        _limit(size, seconds)
        sys.addaudithook(_forbid)
        source.seek(0)
        if source.read(4) == b"PK\x03\x04":
            check_zip(source, size)
        source.seek(0)
        with torch.serialization.safe_globals([(Beside, name) for name in _BESIDE]):
            tensors = state_dict_in(torch.load(source, map_location="cpu", weights_only=True))
        _send(answer, tensors, names)
    except Exception as error:
        return _explain(error)
    answer.flush()
    os._exit(0)  # what the file made is not taken down: that may never end


def check_zip(file: IO[bytes], size: int) -> None:
    """Make sure that a zip is one of `torch.save`'s: not compressed, no larger inside than outside, whole, no program.

    Raises:
        Refused: it is another one.
    """
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(names) != len(entries) or len(entries) > _MAX_ENTRIES:
        raise Refused("its zip has a name twice, or more than 100,000 entries")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused("its zip is compressed, as torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("its zip claims to hold more bytes than the file has")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise Refused("it is a TorchScript program, not a file of weights")
    if sum(name.endswith("/data.pkl") or name == "data.pkl" for name in names) != 1:
        raise Refused("its zip has no data.pkl, so torch.save has not written it")
    if (changed := archive.testzip()) is not None:
        raise Refused(f"it is damaged: {changed[:100]!r} in its zip is not what its checksum says")


def state_dict_in(content: Any) -> dict[str, Any]:
    """The weights in what was unpickled, without a `module.` before all names.

    Raises:
        Ambiguous: there is more than one set.
        Refused: there are none, or something else is among them.
    """
    if not isinstance(content, Mapping):
        raise Refused(f"it holds {_kind(content)}, not a state dict")
    found = [name for name in _HOLDERS if isinstance(content.get(name), Mapping)]
    if len(found) > 1:
        raise Ambiguous(f"{' and '.join(found)}")
    weights = content[found[0]] if found else content
    for name, value in weights.items():
        if not isinstance(name, str) or not _is_dense_tensor(value):
            raise Refused(
                f"it holds {_kind(value)} under {str(name)[:100]!r} where a dense tensor of weights should be"
            )
    if not weights:
        raise Refused("it holds no weights")
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in weights.items()}


def _kind(value: Any) -> str:
    return f"something of type {type(value).__name__}"


def _is_dense_tensor(value: Any) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_quantized or value.is_complex())


def _send(answer: IO[bytes], tensors: dict[str, Any], names: dict[Any, str]) -> None:
    header, start = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise Refused(f"tensor {name[:100]!r} is of {tensor.dtype}, which safetensors cannot hold")
        stop = start + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    answer.write((8 + len(text) + start).to_bytes(8, "little") + len(text).to_bytes(8, "little") + text)
    import torch

    for tensor in tensors.values():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            answer.write(flat.view(torch.uint8).numpy().data)


def _leave_the_network() -> None:
    """Go where there is no network, on Linux and where it is allowed."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(size: int, seconds: float) -> None:
    """Take away what weights never need: memory beyond three times their size, time, files, children."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    allowed = int(used + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * size + _SPARE,) * 2)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """End the process at once when anything starts a program, opens a connection or writes a file."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(_FORBIDDEN):
        os.write(2, f"\nit tried to do what weights never need ({event})\n".encode())
        os._exit(76)


def _explain(error: Exception) -> int:
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text or isinstance(error, torch.OutOfMemoryError):
        return _end(81, "out of memory")
    if not isinstance(error, Refused):
        text = _in_our_words(text)
    code = 2 if isinstance(error, Ambiguous) else 76
    return _end(code, text[:400].encode("ascii", "backslashreplace").decode())


def _in_our_words(text: str) -> str:
    """torch's message, without its advice to read the file unsafely."""
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it can only be read by calling {named[1]}, and a file may not choose which function is called"
    found = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
    return f"torch cannot read it as weights: {found.rpartition('trusted source. ')[2]}"


def _end(code: int, reason: str) -> NoReturn:
    os.write(2, f"\n{reason}\n".encode())
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
