"""Where a pretrained task is: a run, a checkpoint file, a folder in timm's layout, or the hub; and its record."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.backbones.descriptions import WEIGHT_FILES, fetch_timm_folder
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.files import sha256_file
from flashtask.core.hub.address import HubAddress, is_hub_address
from flashtask.core.model_path import model_path
from flashtask.tasks.fetching import local_file
from flashtask.tasks.pretrained.timm_layout import CARD, HEAD, WEIGHTS

__all__ = ["Source", "find_source"]

_BARE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./+-]+)?")


@dataclass(frozen=True)
class Source:
    """A pretrained task on this disk.

    Args:
        path: a folder or a checkpoint file.
        record: what a checkpoint that is trained from it says: `{"repository", "commit"}` or `{"path", "sha256"}`.
    """

    path: Path
    record: dict[str, str]

    @property
    def is_folder(self) -> bool:
        """A folder, rather than one checkpoint file."""
        return self.path.is_dir()


def find_source(given: Any, revision: str | None = None, *, bare_is_hub: bool = False, sha256: str = "") -> Source:
    """Find a pretrained task, and fetch it if it is not here.

    Args:
        given: a run folder (its best checkpoint, else its last), a folder in timm's layout, a `.ckpt` file or its
            https address, `hf://org/name@revision`; also `org/name` if `bare_is_hub` and there is no such path.
        revision: branch, tag or commit of a repository on the hub.
        bare_is_hub: whether `org/name` may mean the hub.
        sha256: what the file, or the weights in the folder, must have; empty for anything.

    Raises:
        UsageError: a revision of something that has none, or two of them.
        MissingInputError: there is no such path, or no model in the folder.
        HubError: the hub cannot be reached, or refuses.
        IntegrityError: what is there is not what was wanted.
    """
    text = os.fspath(given)
    is_bare = bare_is_hub and not os.path.exists(text) and _BARE.fullmatch(text) is not None
    if is_hub_address(text) or is_bare:
        return _on_the_hub(HubAddress.parse(text), revision)
    if revision is not None:
        raise UsageError(f"{text} is not on the hub, so it has no revision {revision!r}", fix="leave revision out")
    try:
        path = local_file(text) if "://" in text else model_path(text)
    except MissingInputError as error:
        if _BARE.fullmatch(text) and not os.path.exists(text) and not error.fix.startswith("did you mean"):
            error.fix = f"for a repository on the hub: hf://{text}"
        raise
    weights = _weights_of(path)
    found = sha256_file(weights)
    if sha256 and found != sha256:
        raise IntegrityError(
            f"{weights} is not the file that the recipe started from",
            why=f"its sha256 is {found}, not {sha256}",
            fix="restore the original file, or delete from_sha256 from the recipe to start from this one",
        )
    return Source(path, {"path": text if "://" in text else str(path.absolute()), "sha256": found})


def _on_the_hub(address: HubAddress, revision: str | None) -> Source:
    if revision is not None:
        if address.revision not in (None, revision):
            raise UsageError(f"two revisions: {address} and revision={revision!r}", fix="give one of them")
        address = HubAddress(address.repository, revision)
    snapshot = fetch_timm_folder(address, optional=[HEAD, CARD])
    return Source(snapshot.folder, {"repository": address.repository, "commit": snapshot.commit})


def _weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise MissingInputError(
            f"{path} holds no pretrained model: there is no {WEIGHTS} in it",
            fix="model.save_pretrained(folder) writes one",
        )
    return found[0]
