"""Backbones that are no registered name but a place: a hub repository, a folder in timm's layout, a checkpoint.

Knowing that a text is such a place loads nothing and asks no network.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flashtask.core.errors import UsageError
from flashtask.core.hub.address import HubAddress, is_hub_address
from flashtask.core.model_path import model_path
from flashtask.core.registry import RegistryEntry

__all__ = ["CHECKPOINT_PREFIX", "FOLDER_PREFIX", "HUB_PREFIX", "AddressSource", "is_address"]

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CHECKPOINT_PREFIX = "checkpoint:"
_WEIGHTS_ALONE = (".safetensors", ".pth", ".pt", ".bin")
_PROVIDER = "flashtask.backbones.address_provider"


class AddressSource:
    """What `hf-hub:org/name@revision` (or `hf://`), `local-dir:FOLDER`, `checkpoint:FILE` and paths mean.

    A path without a prefix counts where it cannot be a name: it begins with `/`, `./`, `../` or `~/`, or has a slash or
    the ending `.ckpt` and exists. Registered names win, since this source is asked last.
    """

    def names(self) -> Iterator[str]:
        """None: places cannot be listed."""
        return iter(())

    def spellings(self) -> Iterator[str]:
        """None: places cannot be listed."""
        return iter(())

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a place, whether or not it can be reached.

        Raises:
            UsageError: it is written as one and cannot be meant.
        """
        if is_hub_address(name):
            address = HubAddress.parse(name)
            return _entry(str(address).replace("hf://", HUB_PREFIX, 1), "hub", "build_from_hub", address)
        for prefix, provider, builder in (
            (FOLDER_PREFIX, "folder", "build_from_folder"),
            (CHECKPOINT_PREFIX, "checkpoint", "build_from_checkpoint"),
        ):
            if name.startswith(prefix):
                path = _absolute(name.removeprefix(prefix))
                return _entry(f"{prefix}{path}", provider, builder, path)
        return self._find_path(name)

    def _find_path(self, name: str) -> RegistryEntry | None:
        sure = name.startswith(("/", "./", "../", "~/", "~\\", ".\\", "..\\"))
        if not sure and not ((os.sep in name or name.endswith(".ckpt")) and Path(name).exists()):
            return None
        path = _absolute(name)
        if path.suffix in _WEIGHTS_ALONE:
            raise UsageError(
                f"{name} holds weights, and does not say of which architecture",
                fix=f'name the architecture: build_backbone("resnet18", weights={name!r})',
            )
        if path.is_dir():
            path = model_path(path, quiet=True)
        return self.find(f"{CHECKPOINT_PREFIX if path.suffix == '.ckpt' else FOLDER_PREFIX}{path}")


def is_address(name: str) -> bool:
    """Whether a canonical name is that of a place."""
    return name.startswith((HUB_PREFIX, FOLDER_PREFIX, CHECKPOINT_PREFIX))


def _absolute(text: str) -> Path:
    if not text:
        raise UsageError("a backbone's address has no path", fix="local-dir:PATH")
    return Path(os.path.abspath(Path(text).expanduser()))


def _entry(name: str, provider: str, builder: str, place: HubAddress | Path) -> RegistryEntry:
    metadata = {"provider": provider, "source": str(place)}
    return RegistryEntry(name, "backbone", metadata, partial(_load, builder, place))


def _load(builder: str, place: HubAddress | Path) -> Callable[..., Any]:
    return partial(getattr(importlib.import_module(_PROVIDER), builder), place)
