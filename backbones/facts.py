"""What the libraries themselves say about their models and weights. Loads a library only when asked about its model.

A fact that the source does not state is left out, never guessed.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flashtask.core.errors import UnknownNameError

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import OwnBackbone, PackagedWeights

__all__ = ["FACTS", "own_facts", "timm_facts", "torchvision_facts"]


def timm_facts(name: str) -> dict[str, Any]:
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


def torchvision_facts(name: str) -> dict[str, Any]:
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
    from flashtask.core.hub.address import HubAddress
    from flashtask.core.hub.store import Store

    address = HubAddress.parse(source)
    commit = str(address.revision)
    is_here = any(Store(address).has(commit, name) for name in ("model.safetensors", "pytorch_model.bin"))
    return {"pretrained": True, "cached": is_here, "repository": address.repository, "revision": commit}


#: library -> what it says of a model
FACTS = {"timm": timm_facts, "torchvision": torchvision_facts}


def _timm_file_is_here(config: Any) -> bool:
    """Whether timm would find the file of these weights without a network, in the order in which it looks."""
    if config.file:
        return Path(config.file).is_file()
    if config.hf_hub_id:
        return _is_in_hub_cache(config.hf_hub_id, config.hf_hub_filename)
    import torch

    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(config.url or "").path)).is_file()


def _is_in_hub_cache(address: str, filename: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives

    repository, _, revision = address.partition("@")
    wanted = filename or HF_WEIGHTS_NAME
    names = [*_get_safe_alternatives(wanted), wanted]
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return any(isinstance(path, str) for path in found)


def _packaged_file_is_here(weights: PackagedWeights) -> bool:
    try:
        return Path(str(distribution(weights.package).locate_file(weights.file))).is_file()
    except PackageNotFoundError:
        return False
