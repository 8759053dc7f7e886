"""The contract of a backbone: a module from images to pooled features, and what others must know about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing

__all__ = ["Backbone", "check_groups"]


@dataclass
class Backbone:
    """A feature extractor with everything a task needs to know about it.

    Args:
        module: images (B, C, H, W) to features (B, num_features).
        num_features: features an image.
        preprocessing: how its images are resized, cropped and normalised.
        name: the canonical registry name.
        layer_groups: names of the parameters of `module`, in groups ordered from the input to the output,
            each parameter in exactly one group.
        description: of a backbone from a place (a hub repository, a folder, a checkpoint): the options by which
            `build_backbone` makes the same module when the place is gone, without weights; empty for others.

    Raises:
        UsageError: the groups do not cover the parameters exactly once.
    """

    module: nn.Module
    num_features: int
    preprocessing: Preprocessing
    name: str
    layer_groups: list[list[str]]
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_groups(self.module, self.layer_groups, self.name)


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
