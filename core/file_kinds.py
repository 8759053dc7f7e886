"""What kind of file was given where another one is needed, from its first bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["START", "FileKind", "kind_of_file"]

#: How many of the first bytes `kind_of_file` looks at.
START = 512


class FileKind(NamedTuple):
    """A kind of file, as it continues `x is`, and what to do with such a file; empty if nothing is known."""

    what: str
    fix: str = ""


_AGAIN = "download it again"
_UNPACK = "unpack it, and give the file in it"
_PREDICT = "the checkpoint comes first: flashtask predict CKPT IMAGE"
#: (place of the bytes, the bytes, the kind)
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", FileKind("a PNG image", _PREDICT)),
    (0, b"\xff\xd8\xff", FileKind("a JPEG image", _PREDICT)),
    (0, b"GIF8", FileKind("a GIF image", _PREDICT)),
    (0, b"II*\x00", FileKind("a TIFF image", _PREDICT)),
    (0, b"MM\x00*", FileKind("a TIFF image", _PREDICT)),
    (8, b"WEBP", FileKind("a WebP image", _PREDICT)),
    (0, b"\x93NUMPY", FileKind("a NumPy array")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file, as Keras writes it")),
    (0, b"\x1f\x8b", FileKind("a gzip archive", _UNPACK)),
    (0, b"BZh", FileKind("a bzip2 archive", _UNPACK)),
    (0, b"\xfd7zXZ\x00", FileKind("an xz archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK)),
    (257, b"ustar", FileKind("a tar archive", _UNPACK)),
    (0, b"%PDF-", FileKind("a PDF document")),
    (0, b"GGUF", FileKind("a GGUF file")),
    (0, b"SQLite format 3\x00", FileKind("an SQLite database")),
    (0, b"\x7fELF", FileKind("a program")),
)
_TEXTS = {
    ".yaml": "a YAML file",
    ".yml": "a YAML file",
    ".json": "a JSON file",
    ".csv": "a CSV table",
    ".tsv": "a table",
    ".py": "a Python script",
    ".md": "a text file",
    ".toml": "a TOML file",
}


def kind_of_file(path: str | os.PathLike[str], start: bytes) -> FileKind | None:
    """The kind of a file that is not a tensor file; None where its bytes do not show it.

    Args:
        path: whose name distinguishes texts, and beside which a checkpoint may lie.
        start: its first `START` bytes, or all there are.
    """
    file = Path(path)
    if start.startswith(b"version https://git-lfs"):
        return FileKind("a pointer of Git LFS, not the file itself", f"git lfs pull --include {file.name}")
    if start.startswith(b"PK\x03\x04") and b"data.pkl" not in start:
        if b".npy" in start:
            return FileKind("an archive of NumPy arrays (.npz)", _beside(file))
        return FileKind("a zip archive", _beside(file) or _UNPACK)
    for place, magic, kind in _MAGIC:
        if start.startswith(magic, place):
            return kind._replace(fix=_beside(file) or kind.fix)
    return _kind_of_text(file, start)


def _kind_of_text(file: Path, start: bytes) -> FileKind | None:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3 or error.start < 8:
            return None
        text = start[: error.start].decode()  # a letter of several bytes is cut
    if not text or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    if text.lstrip().lower().startswith(("<!doctype html", "<html", "<head", "<?xml")):
        return FileKind("a web page (HTML or XML)", _AGAIN)
    what = _TEXTS.get(file.suffix.lower(), "a text file")
    if what == "a YAML file" and any(text.startswith(f"{key}:") or f"\n{key}:" in text for key in ("task", "model")):
        return FileKind("a recipe", f"{_beside(file)} `flashtask finetune {file}` writes a new one".lstrip())
    return FileKind(what, _beside(file))


def _beside(file: Path) -> str:
    """A question for the checkpoint in the same folder, if there is one."""
    try:
        names = sorted(entry.name for entry in os.scandir(file.parent) if entry.name.endswith(".ckpt"))
    except OSError:
        return ""
    names = [name for name in names if name != file.name and not name.startswith(".")]
    best = "best.ckpt" if "best.ckpt" in names else next(iter(names), "")
    return f"did you mean {str(file.parent / best)!r}?" if best else ""
