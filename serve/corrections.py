"""Answers that a person marked as wrong, stored as a table that `flashtask finetune` reads."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from PIL import Image

from flashtask.core.files import atomic_write

__all__ = ["Corrections"]

_TABLE = "corrections.csv"
_COLUMNS = ("path", "label", "predicted", "model", "time")
#: Pictures that are stored at the most, so that a client cannot fill the disk.
_MOST = 100_000


class Corrections:
    """A folder with `corrections.csv` and the pictures that it names.

    A picture is stored once; of several labels that it is given the last counts.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, str]] = {}
        table = self.folder / _TABLE
        if table.exists():
            with table.open(newline="", encoding="utf-8") as file:
                self._rows = {row["path"]: row for row in csv.DictReader(file)}

    def add(self, picture: Any, label: str, predicted: str, model: str) -> None:
        """Store one picture with its label.

        Args:
            picture: the bytes of an image file that has been decoded before.
            label: that it should have had.
            predicted: the label that it was given.
            model: which weights predicted it.

        Raises:
            HTTPException: 507, too many pictures are stored.
        """
        kind = (Image.open(io.BytesIO(picture)).format or "png").lower()
        path = f"images/{hashlib.sha256(picture).hexdigest()[:32]}.{kind}"
        with self._lock:
            if path not in self._rows and len(self._rows) >= _MOST:
                raise HTTPException(507, f"{_MOST:,} corrections are stored; move them away first")
            with atomic_write(self.folder / path) as file:
                file.write(picture)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._rows[path] = dict(zip(_COLUMNS, (path, label, predicted, model, now), strict=True))
            text = io.StringIO()
            table = csv.DictWriter(text, _COLUMNS)
            table.writeheader()
            table.writerows(self._rows.values())
            with atomic_write(self.folder / _TABLE) as file:
                file.write(text.getvalue().encode())
