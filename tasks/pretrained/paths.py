"""What a file that is given away tells of the disk it was written on: nothing but last names."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["without_places"]


def without_places(value: Any) -> Any:
    """The same nested value, each absolute path in it by its last two names: `.../data/train`."""
    if isinstance(value, dict):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(part) for part in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        names = value.replace(os.sep, "/").rstrip("/").split("/")
        return "/".join([".../" + "/".join(names[-2:])]) if names[-1] else value
    return value
