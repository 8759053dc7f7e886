"""MixUp and CutMix: batches whose images are mixtures of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_number
from flashtask.core.seeding import derive_seed

__all__ = ["Mixing", "mixed_images", "rolled"]


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed; where both are wanted, each batch is mixed in one of the two ways, by equal chances.

    Args:
        mixup_alpha: of MixUp (Zhang et al., arXiv:1710.09412): the share of an image is drawn from Beta(alpha, alpha);
            0 for none.
        cutmix_alpha: of CutMix (Yun et al., arXiv:1905.04899), the same for the area of a rectangle; 0 for none.

    Raises:
        UsageError: a number that is below 0.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise UsageError(f"{name} must be a number of 0 or more, not {value!r}", fix=f"{name}=0.2")

    def __bool__(self) -> bool:
        return bool(self.mixup_alpha or self.cutmix_alpha)

    @property
    def described(self) -> str:
        """`mixup_alpha=0.2`."""
        values = {name: getattr(self, name) for name in ("mixup_alpha", "cutmix_alpha")}
        return ", ".join(f"{name}={value:g}" for name, value in values.items() if value)

    def draw(self, seed: int, epoch: int, batch: int, size: tuple[int, int]) -> tuple[float, tuple[int, int, int, int]]:
        """What a batch is mixed with, the same in every process.

        Args:
            seed: of the run.
            epoch: from 0.
            batch: its number in the epoch, from 0.
            size: (height, width) of the images.

        Returns:
            The share that an image keeps; and (top, bottom, left, right) of the rectangle that comes from the other
            image, empty for MixUp.
        """
        generator = np.random.Generator(np.random.PCG64(derive_seed("mix", seed, epoch, batch)))
        is_cut = bool(self.cutmix_alpha) and (not self.mixup_alpha or generator.random() < 0.5)
        alpha = self.cutmix_alpha if is_cut else self.mixup_alpha
        kept = float(generator.beta(alpha, alpha))
        if not is_cut:
            return kept, (0, 0, 0, 0)
        height, width = size
        middle = generator.integers(height), generator.integers(width)
        half = [round(0.5 * side * (1 - kept) ** 0.5) for side in size]
        top, bottom = max(0, middle[0] - half[0]), min(height, middle[0] + half[0])
        left, right = max(0, middle[1] - half[1]), min(width, middle[1] + half[1])
        # A rectangle that leaves the image is smaller than was drawn.
        return 1 - (bottom - top) * (right - left) / (height * width), (int(top), int(bottom), int(left), int(right))


def mixed_images(images: torch.Tensor, kept: float, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Each image of a batch mixed with the one before it, the first with the last.

    Args:
        images: (B, C, H, W).
        kept: the share that an image keeps.
        box: (top, bottom, left, right) of what it loses; empty to lose some of every pixel.
    """
    others, (top, bottom, left, right) = rolled(images), box
    if box == (0, 0, 0, 0):
        mixed: torch.Tensor = images * kept + others * (1 - kept)
        return mixed
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


def rolled(values: Any) -> Any:
    """What belongs to the images that were mixed in: tensors (B, ...), also in lists, tuples and dictionaries."""
    if isinstance(values, torch.Tensor):
        return values.roll(1, 0)
    if isinstance(values, dict):
        return {name: rolled(value) for name, value in values.items()}
    parts = [rolled(value) for value in values]
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
