"""Checkpoints by address: downloaded once to the cache, then read like any file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flashtask.core.cache_folder import cache_folder
from flashtask.data.download import download_data

__all__ = ["local_file"]


def local_file(path_or_url: Any) -> Path:
    """The path itself, or that of the downloaded file if an address was given.

    Raises:
        HubError: the address cannot be reached.
    """
    text = str(path_or_url)
    if "://" not in text:
        return Path(path_or_url)
    name = Path(urlsplit(text).path).name or "model.ckpt"
    folder = cache_folder() / "checkpoints" / hashlib.sha256(text.encode()).hexdigest()[:32]
    return download_data(text, folder, filename=name) / name
