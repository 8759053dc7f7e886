"""Which names and addresses of backbones there are, without importing torch, timm or torchvision.

A library's names are read from its source files: each model is a function under `@register_model`. An address is found
from how it is written; nothing is loaded and no network is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.backbones.backbone import CHECKPOINT_PREFIX, FOLDER_PREFIX, HUB_PREFIX, WEIGHT_SUFFIXES
from flashtask.backbones.search import FACTS, own_facts
from flashtask.core.errors import MissingInputError, UsageError, did_you_mean
from flashtask.core.hub.address import HubAddress, is_hub_address
from flashtask.core.model_path import model_path
from flashtask.core.registry import RegistryEntry, Source
from flashtask.core.zoo import (
    ZooFile,
    load_zoo,
    name_is_taken,
    nothing_to_replace,
    own_file_of,
    own_zoo_files,
    shipped_zoo,
    tell,
)

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import OwnBackbone, Zoo

__all__ = ["SOURCES", "library_names"]

Builder = Callable[..., Any]

_MODEL = re.compile(r"^@register_model\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def library_names(library: str) -> tuple[str, ...]:
    """The architectures of an installed library, sorted; read once from its `models` folder.

    Files of subfolders are read too for timm; torchvision's subfolders hold detection, segmentation, video,
    quantized and optical flow models, which are no backbones.

    Raises:
        MissingInputError: the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise MissingInputError(f"{library} is not installed", fix=f"pip install {library}")
    folder = Path(spec.origin).parent / "models"
    files = sorted(folder.rglob("*.py") if library == "timm" else folder.glob("*.py"))
    return tuple(sorted({name for file in files for name in _MODEL.findall(file.read_text("utf-8"))}))


class LibrarySource:
    """The models of one library as registry entries named `LIBRARY/NAME` or `LIBRARY/NAME.TAG`.

    Args:
        library: import name of the library, and its key under `providers` in zoo.yaml.
        load_builder: gives the function `(name, *, pretrained, in_chans, **options)` that builds one.
        is_default: bare names mean this library's.
    """

    def __init__(self, library: str, load_builder: Callable[[], Builder], *, is_default: bool = False) -> None:
        self.library, self._load_builder, self._is_default = library, load_builder, is_default

    def names(self) -> Iterator[str]:
        """`LIBRARY/NAME` of every architecture."""
        return (f"{self.library}/{name}" for name in library_names(self.library))

    def spellings(self) -> Iterator[str]:
        """Bare names for the default library, canonical names for another."""
        return iter(library_names(self.library)) if self._is_default else self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of `NAME` (of the default library) or `LIBRARY/NAME`, each with or without `.TAG`."""
        prefix, slash, bare = name.rpartition("/")
        if prefix != self.library if slash else not self._is_default:
            return None
        if bare.partition(".")[0] not in library_names(self.library):
            return None
        name = f"{self.library}/{bare}"
        return RegistryEntry(
            name, "backbone", self._metadata(bare), partial(self._load, bare), partial(FACTS[self.library], bare)
        )

    def _metadata(self, bare: str) -> dict[str, Any]:
        provider = load_zoo().providers[self.library]
        architecture, _, tag = bare.partition(".")
        metadata = {
            "provider": self.library,
            "library_version": _installed_version(self.library),
            "library_licence": provider.licence,
            "url": provider.url,
            "credit": provider.credit,
            "architecture": architecture,
        }
        return {**metadata, "weights": tag} if tag else metadata

    def _load(self, bare: str) -> Builder:
        return partial(self._load_builder(), bare)


class ZooSource:
    """The zoo's own backbones: a model of a library with its own weights, preprocessing or options.

    Args:
        libraries: what an entry may be made from, and what a bare name means where the zoo has no entry of it.
    """

    def __init__(self, libraries: Sequence[LibrarySource]) -> None:
        self._libraries = {source.library: source for source in libraries}
        self._checked: list[ZooFile] = []

    def names(self) -> Iterator[str]:
        """The names under `backbones` in zoo.yaml and in the user's own zoo files."""
        return iter(self._entries())

    def spellings(self) -> Iterator[str]:
        """The same: these names are bare."""
        return self.names()

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name under `backbones` in zoo.yaml or in a user's zoo file."""
        own = self._entries().get(name)
        if own is None:
            return None
        provider = load_zoo().providers.get(own.source.partition("/")[0])
        metadata = {
            "provider": "zoo",
            **own.model_dump(exclude_defaults=True, exclude={"override"}),
            "credit": provider.credit if provider else f"who made {own.source.partition('@')[0]}",
        }
        if (file := own_file_of("backbones", name)) is not None:
            metadata["zoo_file"] = str(file.path)
        return RegistryEntry(name, "backbone", metadata, partial(_load_own, name), partial(own_facts, own))

    def _entries(self) -> Mapping[str, OwnBackbone]:
        for file in own_zoo_files():
            if not any(file is checked for checked in self._checked):
                for name, entry in file.zoo.backbones.items():
                    self._check(file, name, entry)
                self._checked.append(file)
        return load_zoo().backbones

    def _check(self, file: ZooFile, name: str, entry: OwnBackbone) -> None:
        """A user's entry is made from a model that there is, and replaces another only where it says so.

        Raises:
            UsageError: with the file, line and column.
        """
        is_hub = entry.source.startswith("hf-hub:")  # what a repository holds is known when it is fetched
        source = self._libraries.get(entry.source.partition("/")[0])
        if not is_hub and (source is None or source.find(entry.source) is None):
            known = [known for library in self._libraries.values() for known in library.names()]
            raise file.error(
                *("backbones", name, "source"),
                what=f"backbones.{name}.source: there is no model {entry.source!r}",
                fix=did_you_mean(entry.source, known) or "`flashtask zoo backbones` lists all",
            )
        if entry.weights is not None and not entry.source.startswith("timm/"):
            what = f"backbones.{name}.weights: weights from a package are for a model of timm, not {entry.source!r}"
            raise file.error("backbones", name, "weights", what=what)
        replaced = next((found for library in self._libraries.values() if (found := library.find(name))), None)
        if replaced is not None and not entry.override:
            raise name_is_taken(file, "backbones", name, f"a model {replaced.name}")
        if replaced is not None:
            tell(f"the backbone {name!r} is that of {file.path}; {replaced.name!r} is still the library's")
        elif entry.override and not any(name in zoo.backbones for zoo in _below(file)):
            known = [known for zoo in _below(file) for known in zoo.backbones]
            raise nothing_to_replace(file, "backbones", name, known)


def _below(file: ZooFile) -> list[Zoo]:
    """The zoo files that one is merged over."""
    own = own_zoo_files()
    position = next(i for i, each in enumerate(own) if each is file)
    return [shipped_zoo(), *(each.zoo for each in own[:position])]


def _load_own(name: str) -> Builder:
    from flashtask.backbones.packaged import build_model

    return partial(build_model, name)


@cache
def _installed_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"


class AddressSource:
    """What `hf-hub:org/name@revision` (or `hf://`), `local-dir:FOLDER`, `checkpoint:FILE` and paths mean.

    A path without a prefix counts where it cannot be a name: it begins with `/`, `./`, `../` or `~/`, or has a slash or
    the ending `.ckpt` and exists. Registered names win, since this source is asked last.
    """

    def names(self) -> Iterator[str]:
        """Nothing: addresses cannot be listed."""
        return iter(())

    spellings = names

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of an address, whether or not it can be reached.

        Raises:
            UsageError: it is written like an address and is not valid.
        """
        if is_hub_address(name):
            address = str(HubAddress.parse(name))
            return _address_entry(address.replace("hf://", HUB_PREFIX, 1), "hub", address)
        for prefix, provider in ((FOLDER_PREFIX, "folder"), (CHECKPOINT_PREFIX, "checkpoint")):
            if name.startswith(prefix):
                path = _absolute(name.removeprefix(prefix))
                return _address_entry(f"{prefix}{path}", provider, str(path))
        return self._find_path(name)

    def _find_path(self, name: str) -> RegistryEntry | None:
        sure = name.startswith(("/", "./", "../", "~/", "~\\", ".\\", "..\\"))
        if not sure and not ((os.sep in name or name.endswith(".ckpt")) and Path(name).exists()):
            return None
        path = _absolute(name)
        if path.name.endswith(WEIGHT_SUFFIXES):
            raise UsageError(
                f"{name} holds weights, but does not say for which architecture",
                fix=f'name the architecture: build_backbone("resnet18", weights={name!r})',
            )
        if path.is_dir():
            path = model_path(path, quiet=True)
        return self.find(f"{CHECKPOINT_PREFIX if path.suffix == '.ckpt' else FOLDER_PREFIX}{path}")


def _absolute(text: str) -> Path:
    if not text:
        raise UsageError("a backbone's address has no path", fix="local-dir:PATH")
    return Path(os.path.abspath(Path(text).expanduser()))


def _address_entry(name: str, provider: str, source: str) -> RegistryEntry:
    return RegistryEntry(name, "backbone", {"provider": provider, "source": source}, partial(_load_address, name))


def _load_address(name: str) -> Builder:
    from flashtask.backbones.addresses import build_from_address

    return partial(build_from_address, name)


def _load_timm() -> Builder:
    from flashtask.backbones.timm_provider import build_model

    return build_model


def _load_torchvision() -> Builder:
    from flashtask.backbones.torchvision_provider import build_model

    return build_model


_LIBRARIES = (
    LibrarySource("timm", _load_timm, is_default=True),
    LibrarySource("torchvision", _load_torchvision),
)
#: The earlier ones win.
SOURCES: tuple[Source, ...] = (ZooSource(_LIBRARIES), *_LIBRARIES, AddressSource())
