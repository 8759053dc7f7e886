"""The contract of a backbone, and the registry of those that there are. Importing this loads no library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.feature_info import FeatureInfo, check_kind
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BACKBONES",
    "CHECKPOINT_PREFIX",
    "FOLDER_PREFIX",
    "HUB_PREFIX",
    "WEIGHT_SUFFIXES",
    "Backbone",
    "check_groups",
    "is_address",
]

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CHECKPOINT_PREFIX = "checkpoint:"
#: Files of weights alone, which do not say of which architecture.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".pth.tar")


@dataclass
class Backbone:
    """A feature extractor with everything a task needs to know about it.

    Args:
        module: images (B, C, H, W) to features (B, num_features), or to those that `features` describes.
        num_features: features an image; of maps the channels of the coarsest, of tokens the features of each.
        preprocessing: how its images are resized, cropped and normalised.
        name: the canonical registry name.
        layer_groups: names of the parameters of `module`, in groups ordered from the input to the output,
            each parameter in exactly one group.
        description: of a backbone from an address (a hub repository, a folder, a checkpoint): the options by which
            `build_backbone` makes the same module, without weights, when nothing is left at the address; empty for
            others.
        features: what the module gives; one vector an image if it is left out.

    Raises:
        UsageError: the groups do not cover the parameters exactly once.
    """

    module: nn.Module
    num_features: int
    preprocessing: Preprocessing
    name: str
    layer_groups: list[list[str]]
    description: dict[str, Any] = field(default_factory=dict)
    features: FeatureInfo = None  # type: ignore[assignment]  # set in __post_init__

    def __post_init__(self) -> None:
        check_groups(self.module, self.layer_groups, self.name)
        if self.features is None:
            self.features = FeatureInfo("pooled", (self.num_features,))
        check_kind(self.features.kind, f"the kind of features of the backbone {self.name!r}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each map, the finest first."""
        return self.features.channels

    @property
    def reductions(self) -> tuple[int, ...]:
        """Pixels of the image in a pixel of each map, along one side."""
        return self.features.reductions


#: Empty here, at the bottom of the room; `flashtask.backbones` itself adds the sources and the filters of searches.
BACKBONES: Registry[Callable[..., nn.Module | Backbone]] = Registry("backbone", group="flashtask.backbones")


def is_address(name: str) -> bool:
    """Whether a canonical name is an address: of a hub repository, a folder or a checkpoint."""
    return name.startswith((HUB_PREFIX, FOLDER_PREFIX, CHECKPOINT_PREFIX))


def check_groups(module: nn.Module, groups: list[list[str]], name: str) -> None:
    """Make sure that groups hold each parameter of a module exactly once.

    Raises:
        UsageError: they do not.
    """
    times = Counter(parameter for group in groups for parameter in group)
    names = {parameter for parameter, _ in module.named_parameters()}
    wrong = sorted((names ^ set(times)) | {parameter for parameter, count in times.items() if count > 1})
    if wrong:
        shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise UsageError(
            f"the layer groups of the backbone {name!r} do not hold each parameter exactly once",
            why=f"missing, unknown or repeated: {shown}",
        )
