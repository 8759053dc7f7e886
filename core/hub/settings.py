"""Where the hub is, where its files are kept, and whether it may be asked: from the environment as it is now.

huggingface_hub reads its variables once, at its import; a notebook that sets one later means it all the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

__all__ = ["endpoint", "hub_cache", "hub_host", "hub_is_offline"]


def endpoint() -> str:
    """The hub's address: `$HF_ENDPOINT`, else https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_host() -> str:
    """The hub's host, and its port if the address has one."""
    return urlsplit(endpoint()).netloc.rpartition("@")[2]


def hub_cache() -> Path:
    """The folder that all tools of the hub share: `$HF_HUB_CACHE`, else `$HF_HOME/hub`."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def hub_is_offline() -> bool:
    """Whether downloads are forbidden (`HF_HUB_OFFLINE`)."""
    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return bool(constants.HF_HUB_OFFLINE) or said
