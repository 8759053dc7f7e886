"""What a search for backbones may ask: what the libraries say of their models and weights, and how large these are.

A library is loaded only when asked about its model, and a fact that the source does not state is left out, never
guessed. Sizes are counted once on the meta device and remembered in the cache folder, for one version of a library. A
user's own model, or one of another package, is counted each time, because nothing says when it changes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flashtask.core.cache_folder import cache_folder
from flashtask.core.errors import StorageError, UnknownNameError, UsageError
from flashtask.core.files import atomic_write_text
from flashtask.core.library_internals import hub_weight_names
from flashtask.core.registry import Registry, RegistryEntry
from flashtask.core.registry_search import Filter

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import OwnBackbone, PackagedWeights

__all__ = ["BACKBONE_FILTERS", "FACTS", "BackboneSize", "own_facts", "remembered_sizes", "sizes_of"]

_FORMAT = 1
_MAX_BYTES = 8 << 20
_SECONDS_BETWEEN_WRITES = 5.0


# ---- facts


def _timm_facts(name: str) -> dict[str, Any]:
    """What timm's pretrained configuration says of `NAME` (its default weights) or `NAME.TAG`.

    Raises:
        UnknownNameError: the architecture has no weights of this tag.
    """
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    architecture, _, tag = name.partition(".")
    configs = get_arch_pretrained_cfgs(architecture)
    if tag and name not in configs:
        tags = [known.partition(".")[2] for known in configs]
        raise UnknownNameError(f"weights of timm/{architecture}", tag, [known for known in tags if known])
    config: Any = get_pretrained_cfg(name)
    with_weights = [known.partition(".")[2] for known, other in configs.items() if other.has_weights]
    facts: dict[str, Any] = {"input_size": list(config.input_size), "pretrained": bool(config.has_weights)}
    if config.license and config.license != "unknown":
        facts["licence"] = config.license
    if config.has_weights:
        facts |= {"weights": config.tag, "cached": _timm_file_is_here(config)}
    if config.hf_hub_id:
        facts["repository"] = config.hf_hub_id
    if config.origin_url:
        facts["origin"] = config.origin_url
    if any(with_weights):
        facts["weights_to_choose"] = sorted(with_weights)
    return facts


def _torchvision_facts(name: str) -> dict[str, Any]:
    """What torchvision's enumeration of weights says of `NAME` (its default weights) or `NAME.WEIGHTS`.

    Raises:
        UnknownNameError: the architecture has no weights of this name.
    """
    import torch
    from torchvision.models import get_model_weights

    architecture, _, tag = name.partition(".")
    known = get_model_weights(architecture)
    if tag and tag not in known.__members__:
        raise UnknownNameError(f"weights of torchvision/{architecture}", tag, known.__members__)
    if not len(known):
        return {"pretrained": False}
    weights: Any = known[tag or "DEFAULT"]
    size = weights.transforms().crop_size[0]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(weights.url).path).name)
    facts = {
        "input_size": [3, size, size],
        "pretrained": True,
        "weights": weights.name,
        "cached": file.is_file(),
        "parameters_with_classifier": weights.meta["num_params"],
        "origin": weights.meta["recipe"],
        "weights_to_choose": [each.name for each in known],
    }
    if "license" in weights.meta:
        facts["licence"] = weights.meta["license"]
    return facts


def own_facts(own: OwnBackbone) -> dict[str, Any]:
    """What is known of an entry of a zoo file: what its source says, and over it what the entry says."""
    library, _, name = own.source.partition("/")
    facts = FACTS[library](name) if library in FACTS else _hub_facts(own.source)
    if own.weights is not None:  # other weights than the source's: only what the entry says of them holds
        for fact in ("licence", "weights", "repository", "origin", "weights_to_choose"):
            facts.pop(fact, None)
        facts |= {"pretrained": True, "cached": _packaged_file_is_here(own.weights)}
        facts["weights"] = own.weights.model_dump(exclude_none=True)
    if (size := own.options.get("img_size")) is not None:
        facts["input_size"] = [3, size, size] if isinstance(size, int) else [3, *size]
    if (input_size := own.preprocessing.input_size) is not None:
        facts["input_size"] = input_size
    return facts | ({"licence": own.licence} if own.licence else {})


def _hub_facts(source: str) -> dict[str, Any]:
    """What is known of a repository that may never have been fetched."""
    from flashtask.core.hub.address import HubAddress, hub_cache

    address = HubAddress.parse(source)
    is_here = _is_in_hub_cache(str(address).removeprefix("hf://"), None, hub_cache())
    return {"pretrained": True, "cached": is_here, "repository": address.repository, "revision": address.revision}


#: library -> what it says of a model
FACTS = {"timm": _timm_facts, "torchvision": _torchvision_facts}


def _timm_file_is_here(config: Any) -> bool:
    """Whether timm would find the file of these weights without a network, in the order in which it looks."""
    if config.file:
        return Path(config.file).is_file()
    if config.hf_hub_id:
        return _is_in_hub_cache(config.hf_hub_id, config.hf_hub_filename)
    import torch

    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(config.url or "").path)).is_file()


def _is_in_hub_cache(address: str, filename: str | None, cache: Path | None = None) -> bool:
    """Whether one of the files that timm looks for is there; without `cache`, in the one that timm uses."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = address.partition("@")
    names = hub_weight_names(filename)
    found = (try_to_load_from_cache(repository, name, cache, revision or None) for name in names)
    return any(isinstance(path, str) for path in found)


def _packaged_file_is_here(weights: PackagedWeights) -> bool:
    try:
        return Path(str(distribution(weights.package).locate_file(weights.file))).is_file()
    except PackageNotFoundError:
        return False


# ---- sizes


@dataclass(frozen=True)
class BackboneSize:
    """The size of a backbone without a classifier.

    Args:
        num_params: its parameters; shared ones count once.
        num_features: it gives for an image.
        num_layers: groups for milestones and layer-wise rates.
    """

    num_params: int
    num_features: int
    num_layers: int


def sizes_of(entries: Iterable[RegistryEntry]) -> dict[str, BackboneSize]:
    """The size of each backbone; one that cannot be built on the meta device is left out.

    Args:
        entries: of `BACKBONES`.
    """
    sizes: dict[str, BackboneSize] = {}
    files: dict[Path, list[RegistryEntry]] = {}
    for entry in entries:
        if (file := _file(entry)) is not None:
            files.setdefault(file, []).append(entry)
        elif (size := _measure(entry.name)) is not None:
            sizes[entry.name] = size
    for file, listed in files.items():
        sizes |= _remembering(file, [entry.name for entry in listed])
    return sizes


def remembered_sizes(entries: Iterable[RegistryEntry]) -> dict[str, BackboneSize]:
    """Those sizes that are known without building anything."""
    files = {entry.name: _file(entry) for entry in entries}
    known: dict[Path, dict[str, BackboneSize]] = {file: _read(file) for file in set(files.values()) if file}
    return {name: known[file][name] for name, file in files.items() if file and name in known[file]}


def _remembering(file: Path, names: list[str]) -> dict[str, BackboneSize]:
    known = _read(file)
    missing = [name for name in names if name not in known]
    last = time.monotonic()
    try:
        for name in missing:
            if (size := _measure(name)) is not None:
                known[name] = size
            if time.monotonic() - last > _SECONDS_BETWEEN_WRITES:
                _write(file, known)
                last = time.monotonic()
    finally:
        if missing:
            _write(file, known)  # after Ctrl-C too: what was counted stays
    return {name: known[name] for name in names if name in known}


def _measure(name: str) -> BackboneSize | None:
    from flashtask.backbones.building import build_without_values

    try:
        backbone = build_without_values(name)
    except Exception:  # code of other packages may raise anything; what cannot be built has no known size
        return None
    num_params = sum(parameter.numel() for parameter in backbone.module.parameters())
    return BackboneSize(num_params, backbone.num_features, len(backbone.layer_groups))


def _file(entry: RegistryEntry) -> Path | None:
    """Where the sizes of an entry's library are kept; None for what does not come from a versioned library."""
    version = entry.metadata.get("library_version")
    if version in (None, "unknown"):
        return None
    return cache_folder() / "backbone_sizes" / f"{entry.metadata['provider']}-{version}.json"


def _read(file: Path) -> dict[str, BackboneSize]:
    """What a file holds; one that is missing or damaged holds nothing and is written again."""
    try:
        with file.open("rb") as opened:
            content: Any = json.loads(opened.read(_MAX_BYTES))
        if content["format"] != _FORMAT:
            return {}
        sizes = {str(name): BackboneSize(**values) for name, values in content["sizes"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    is_whole = all(type(number) is int and number >= 0 for size in sizes.values() for number in asdict(size).values())
    return sizes if is_whole else {}


def _write(file: Path, sizes: dict[str, BackboneSize]) -> None:
    merged = {**_read(file), **sizes}  # another process may have counted meanwhile
    content = {"format": _FORMAT, "sizes": {name: asdict(size) for name, size in sorted(merged.items())}}
    with suppress(StorageError, OSError):  # a home that cannot be written costs counting again, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(content))


# ---- filters

Entries = Sequence[RegistryEntry]


def _by_input_size(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
    """Those whose weights take images of this height and width: 224, (224, 192) or (3, 224, 192)."""
    sizes = [value, value] if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(sizes, (list, tuple)) or len(sizes) not in (2, 3) or not all(type(n) is int for n in sizes):
        raise UsageError(
            f"input_size cannot be {value!r}",
            why="it must be a number of pixels, or (height, width)",
            fix="input_size=224",
        )
    wanted = [*sizes[-2:]]
    return [entry for entry in entries if entry.known().get("input_size", [])[-2:] == wanted]


def _by_flag(fact: str) -> Filter:
    def keep(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
        if not isinstance(value, bool):
            raise UsageError(f"{fact} must be True or False, not {value!r}", fix=f"{fact}=True")
        return [entry for entry in entries if entry.known().get(fact, False) is value]

    return keep


def _by_params(name: str, sign: int) -> Filter:
    def keep(registry: Registry[Any], entries: Entries, value: Any) -> list[RegistryEntry]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UsageError(f"{name} must be a number of parameters above 0, not {value!r}", fix=f"{name}=10e6")
        sizes = sizes_of(entries)
        return [e for e in entries if e.name in sizes and sign * sizes[e.name].num_params <= sign * value]

    return keep


#: The cheap ones first: names, then what libraries say, then what must be built to be known.
BACKBONE_FILTERS: Mapping[str, Filter] = {
    "input_size": _by_input_size,
    "pretrained": _by_flag("pretrained"),
    "cached": _by_flag("cached"),
    "max_params": _by_params("max_params", 1),
    "min_params": _by_params("min_params", -1),
}
