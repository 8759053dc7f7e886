"""Features on disk: a file an entry, named by what it depends on, verified when opened, bounded in bytes.

An entry may name the sample of each row, so that other data with some of the same samples finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import StorageError, UsageError
from flashtask.core.files import atomic_write, atomic_write_text, remove_partials

__all__ = ["FeatureStore", "StoredFeatures", "content_key", "row_names"]

#: What the whole store may take, unless `$FLASHTASK_FEATURE_CACHE_BYTES` is set.
_LIMIT = 5 * 2**30
_VARIABLE = "FLASHTASK_FEATURE_CACHE_BYTES"
_BLOCK = 1 << 22
_ABANDONED = 3600.0

Features = np.ndarray[Any, np.dtype[np.float32]]
#: A hash a row: (N,) of 16 bytes each.
RowNames = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredFeatures:
    """An entry of the store.

    Args:
        key: what it depends on, as a hash.
        size: bytes on disk.
        used: when it was last used, in seconds since 1970.
        about: what `flashtask cache` shows: module, samples, precision, ...
    """

    key: str
    size: int
    used: float
    about: Mapping[str, Any]


def content_key(parts: Mapping[str, Any]) -> str:
    """A hash of everything that features depend on: plain values by name."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def row_names(contents: Iterable[str]) -> RowNames:
    """The names of samples in the store, by what is in each of them."""
    return np.array([hashlib.sha256(one.encode()).digest()[:16] for one in contents], dtype="V16")


def _limit() -> int:
    """Bytes that the whole store may take.

    Raises:
        UsageError: `$FLASHTASK_FEATURE_CACHE_BYTES` is something else than a whole number.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UsageError(
            f"{_VARIABLE}={text[:40]!r} must be a whole number of bytes",
            fix=f"export {_VARIABLE}={_LIMIT}, or unset it",
        )
    return int(text) if text else _LIMIT


class FeatureStore:
    """The features that earlier runs have computed.

    Args:
        folder: where they are; by default one in the cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "features" if folder is None else folder
        self.limit = _limit()

    def open(self, key: str) -> Features | None:
        """The features (N, F) under a key, mapped from the file; None if there are none, or they are damaged."""
        try:
            note = json.loads(self._note(key).read_text("utf-8"))
            if _digest(self._file(key)) != note["sha256"]:
                raise ValueError("damaged")
            features: Features = np.load(self._file(key), mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.remove(key)
            return None
        with suppress(OSError):
            os.utime(self._note(key))
        return features

    def rows(self, form: str, names: RowNames) -> tuple[Features | None, np.ndarray[Any, np.dtype[np.bool_]]]:
        """The features of samples from any entries that have them.

        Args:
            form: of these entries.
            names: of the samples, as `row_names` gives them.

        Returns:
            Features (N, F), of which only known rows mean something, None if none is; and which are known, (N,).
        """
        found: Features | None = None
        known = np.zeros(len(names), dtype=bool)
        for entry in self.entries():
            if entry.about.get("form") != form or known.all():
                continue
            own = self._names(entry.key)
            place = {name: row for row, name in enumerate(own.tolist())}
            rows = np.array([place.get(name, -1) for name in names.tolist()])
            taken = (rows >= 0) & ~known
            features = self.open(entry.key) if taken.any() else None
            if features is None or len(features) < len(own):
                continue
            if found is None:
                found = np.empty((len(names), *features.shape[1:]), dtype=np.float32)
            found[taken] = features[rows[taken]]
            known |= taken
        return found, known

    def keep(
        self, key: str, features: Features, about: Mapping[str, Any], *, form: str = "", names: RowNames | None = None
    ) -> bool:
        """Write features under a key; the least recently used entries are dropped to stay within the limit.

        Args:
            key: what they depend on.
            features: (N, F).
            about: what `flashtask cache` shows.
            form: what features of other samples must have in common with these to stand beside them.
            names: of the samples of the first rows, which `rows` may give out.

        Returns:
            Whether they are kept: not if they alone exceed the limit, or the disk is full.
        """
        if features.nbytes > self.limit:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partials(self.folder)
            self._make_room(features.nbytes)
            with atomic_write(self._file(key), size=features.nbytes) as file:
                np.save(file, features, allow_pickle=False)
            note: dict[str, Any] = {"sha256": _digest(self._file(key)), "about": dict(about)}
            if names is not None and len(names):
                with atomic_write(self._names_file(key), size=names.nbytes) as file:
                    file.write(names.tobytes())
                note["names"] = _digest(self._names_file(key))
                note["about"]["form"] = form
            atomic_write_text(self._note(key), json.dumps(note, indent=1))
        except (OSError, StorageError):
            self.remove(key)
            return False
        return True

    def entries(self) -> list[StoredFeatures]:
        """All entries, the last used first."""
        return sorted(self._entries(), key=lambda entry: entry.used, reverse=True)

    def has_features_of(self, weights: str) -> bool:
        """Whether there are features of any samples that were computed with these weights."""
        return any(entry.about.get("weights") == weights for entry in self._entries())

    def remove(self, key: str) -> None:
        """Drop an entry, if it is there."""
        with suppress(OSError):
            self._note(key).unlink(missing_ok=True)
        for file in (self._names_file(key), self._file(key)):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _entries(self) -> Iterator[StoredFeatures]:
        for note in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                about = json.loads(note.read_text("utf-8"))["about"]
                size, used = self._file(note.stem).stat().st_size, note.stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                self.remove(note.stem)
                continue
            yield StoredFeatures(note.stem, size, used, about)

    def _make_room(self, size: int) -> None:
        for file in (*self.folder.glob("*.npy"), *self.folder.glob("*.names")):  # of a process killed before the note
            if not self._note(file.stem).exists() and time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink(missing_ok=True)
        kept = self.entries()
        while kept and sum(entry.size for entry in kept) + size > self.limit:
            self.remove(kept.pop().key)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _names_file(self, key: str) -> Path:
        return self.folder / f"{key}.names"

    def _names(self, key: str) -> RowNames:
        """The names of the first rows of an entry; none if they are damaged."""
        try:
            note, content = json.loads(self._note(key).read_text("utf-8")), self._names_file(key).read_bytes()
            if hashlib.sha256(content).hexdigest() != note["names"]:
                raise ValueError("damaged")
            return np.frombuffer(content, dtype="V16")
        except (OSError, ValueError, KeyError, TypeError):
            return np.empty(0, dtype="V16")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
