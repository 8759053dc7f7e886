"""Where flashtask keeps what it may fetch or compute again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """`$FLASHTASK_CACHE`, else `~/.cache/flashtask`; it may not exist yet."""
    given = os.environ.get("FLASHTASK_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "flashtask"
