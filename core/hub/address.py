"""Repositories of the Hugging Face hub and their revisions; the hub itself, its cache, and whether it may be asked.

Nothing here loads huggingface_hub before it is needed: the command line imports this file.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flashtask.core.errors import UsageError

__all__ = ["HubAddress", "branch_address", "endpoint", "hub_cache", "hub_host", "hub_is_offline", "is_hub_address"]
__all__ += ["longest_fetch"]

_PREFIXES = ("hf://", "hf-hub:")
_DATASETS = "datasets/"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
# What git allows in the name of a branch or tag, without the characters that mean something in an address.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAddress:
    """A repository of the hub, `org/name`, at a branch, tag or commit; None means its main branch.

    Args:
        repository: an owner and a name.
        revision: a branch, tag or commit.
        kind: `model` or `dataset`, whose address is `hf://datasets/org/name`; or `space`, which is only written.
    """

    repository: str
    revision: str | None = None
    kind: Literal["model", "dataset", "space"] = "model"

    def __post_init__(self) -> None:
        """Refuse whatever could be read as something else: a path, an option, a part of a web address."""
        name, revision = self.repository, self.revision
        if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name or len(name) > 96:
            raise UsageError(
                f"{name[:100]!r} is not the name of a hub repository",
                why="a name is an owner and a repository, in letters, digits, '-', '_' and '.'",
                fix="write it like timm/resnet18.a1_in1k",
            )
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise UsageError(
                f"{revision[:100]!r} is not a revision of {name}",
                why="a revision is the name of a branch or tag, or a commit of 40 hexadecimal digits",
                fix=f"leave it out for the main branch: hf://{name}",
            )

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Read `org/name`, `org/name@revision`, or one of these after `hf://`, `hf-hub:` or `hf://datasets/`.

        Raises:
            UsageError: the text is not such an address.
        """
        rest = text.strip()
        rest = rest.removeprefix(next(filter(rest.startswith, _PREFIXES), ""))
        kind: Literal["model", "dataset"] = "dataset" if rest.startswith(_DATASETS) else "model"
        repository, at, revision = rest.removeprefix(_DATASETS).partition("@")
        if at and not revision:
            raise UsageError(f"{text!r} names no revision after '@'", fix=f"write {text.strip()}main")
        return cls(repository, revision or None, kind)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit, which can never move."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"hf://{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def path(self) -> str:
        """What follows the hub's own address on its pages: `org/name`, `datasets/org/name`, `spaces/org/name`."""
        return self.repository if self.kind == "model" else f"{self.kind}s/{self.repository}"


def is_hub_address(text: str) -> bool:
    """Whether a text begins like an address of the hub (`hf://` or `hf-hub:`); the rest may be invalid."""
    return text.startswith(_PREFIXES)


def branch_address(repository: str, branch: str | None) -> HubAddress:
    """Where to push to: `org/name` in any spelling of an address, with a branch in either place.

    Raises:
        UsageError: an invalid name, two branches, or a commit, which cannot be added to.
    """
    address = HubAddress.parse(repository)
    if branch is not None and address.revision not in (None, branch):
        raise UsageError(f"two branches: {address} and {branch!r}", fix="give one of them")
    address = HubAddress(address.repository, branch or address.revision)
    if address.is_pinned:
        raise UsageError(f"{address} is a commit, to which nothing can be added", fix="give a branch, or leave it out")
    return address


# huggingface_hub reads these variables once, at its import. A notebook may set them later, so they are read here when
# they are used, and passed on.


def endpoint() -> str:
    """The hub's address: `$HF_ENDPOINT`, else https://huggingface.co."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_host() -> str:
    """The hub's host, and its port if the address has one."""
    return urlsplit(endpoint()).netloc.rpartition("@")[2]


def hub_cache() -> Path:
    """The folder that all tools of the hub share: `$HF_HUB_CACHE`, else `$HF_HOME/hub`."""
    from huggingface_hub import constants

    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(constants.HF_HUB_CACHE)


def longest_fetch() -> float:
    """Seconds that the files of one repository may take: `$FLASHTASK_HUB_TIMEOUT`, else six hours.

    Raises:
        UsageError: it is not a whole number of at least 1.
    """
    text = os.environ.get("FLASHTASK_HUB_TIMEOUT", "").strip() or "21600"
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= threading.TIMEOUT_MAX):
        raise UsageError(
            f"FLASHTASK_HUB_TIMEOUT={text[:40]!r} must be a whole number of seconds",
            fix="export FLASHTASK_HUB_TIMEOUT=3600",
        )
    return float(text)


def hub_is_offline() -> bool:
    """Whether downloads are forbidden (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
