"""The contract of a backbone: a module from images to pooled features, and what others must know about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing

__all__ = ["Backbone"]


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

    Raises:
        UsageError: the groups do not cover the parameters exactly once.
    """

    module: nn.Module
    num_features: int
    preprocessing: Preprocessing
    name: str
    layer_groups: list[list[str]]

    def __post_init__(self) -> None:
        times = Counter(name for group in self.layer_groups for name in group)
        names = {name for name, _ in self.module.named_parameters()}
        wrong = sorted((names ^ set(times)) | {name for name, count in times.items() if count > 1})
        if wrong:
            shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise UsageError(
                f"the layer groups of the backbone {self.name!r} do not hold each parameter exactly once",
                why=f"missing, unknown or repeated: {shown}",
            )
