"""From a PIL image to the tensor a backbone takes: the evaluation transform and the training augmentations.

Evaluation follows timm's meaning of size, crop and interpolation to the pixel, so that weights see what they
were trained on. Validation, test and prediction all use it; only training can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import GENERATORS

__all__ = ["AUGMENTATIONS", "Augmentation", "Transform", "check_augment", "description", "eval_transform", "is_fixed"]
__all__ += ["train_transform"]

#: PIL image to float32 tensor (C, H, W), normalised.
Transform = Callable[[Image.Image], torch.Tensor]

#: What `augment` may name: how far training images are changed.
AUGMENTATIONS = {
    "auto": "none while the whole backbone is frozen, light from the first epoch in which any of it trains",
    "none": "as for evaluation",
    "light": "random crop of 70 to 100 % of the area, horizontal flip, a little brightness and contrast",
    "medium": "random crop of 35 to 100 % of the area, horizontal flip, TrivialAugment (one operation)",
    "strong": "random crop of 8 to 100 % of the area, horizontal flip, TrivialAugment, random erasing",
}

_CROP_SCALE = {"light": (0.7, 1.0), "medium": (0.35, 1.0), "strong": (0.08, 1.0)}


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image, as a function of whether the backbone is frozen.

    Args:
        trained: the transform while any of the backbone trains.
        frozen: the transform while the whole backbone is frozen.
        generators: the global random generators that they draw from.
    """

    trained: Transform
    frozen: Transform
    generators: Sequence[str]


def check_augment(augment: object) -> None:
    """Refuse what is neither one of AUGMENTATIONS nor a callable.

    Raises:
        UnknownNameError: a name that is not in AUGMENTATIONS.
        UsageError: something else.
    """
    if isinstance(augment, str):
        if augment not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", augment, AUGMENTATIONS)
    elif not callable(augment):
        raise UsageError(
            f"augment must be a name or a callable that takes a PIL image, not {augment!r}",
            fix=f"augment one of: {', '.join(AUGMENTATIONS)}",
        )


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """The transform of validation, test and prediction; deterministic."""
    return _Evaluate(preprocessing)


def train_transform(preprocessing: Preprocessing, augment: str | Callable[[Any], Any] = "auto") -> Augmentation:
    """The transforms of training.

    Args:
        preprocessing: what the backbone takes.
        augment: one of AUGMENTATIONS, or a callable (a torchvision Compose) that takes a PIL image. If it
            returns a PIL image or a uint8 tensor, the evaluation transform follows; a floating-point tensor
            is used as it is.

    Raises:
        UnknownNameError: a name that is not in AUGMENTATIONS.
        UsageError: neither a name nor a callable.
    """
    check_augment(augment)
    plain = eval_transform(preprocessing)
    if augment == "none":
        return Augmentation(plain, plain, ())
    if augment == "auto":
        return Augmentation(_Augment(preprocessing, "light"), plain, ("torch",))
    if isinstance(augment, str):
        changed: Transform = _Augment(preprocessing, augment)
        return Augmentation(changed, changed, ("torch",))
    own = _Own(augment, plain)
    return Augmentation(own, own, GENERATORS)


def is_fixed(transform: Transform) -> bool:
    """Whether a transform is known to give the same tensor each time."""
    return isinstance(transform, _Evaluate)


def description(transform: Transform) -> str | None:
    """What a transform does, so that two that say the same do the same; None for a user's own."""
    if isinstance(transform, _Evaluate):
        return f"evaluate {transform.preprocessing.to_dict()}"
    if isinstance(transform, _Augment):
        return f"{transform.name} {transform.preprocessing.to_dict()}"
    return None


def _to_tensor(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    values: torch.Tensor = F.pil_to_tensor(image).to(torch.float32).div_(255)
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return values.sub_(mean).div_(std)


class _Evaluate:
    """Resize, crop at the centre, normalise, by timm's three crop modes."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.size = preprocessing.input_size[1:]
        self.resized = tuple(math.floor(side / preprocessing.crop_pct) for side in self.size)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        mode = InterpolationMode(self.preprocessing.interpolation)
        image = F.resize(image, self._resized_size(image), interpolation=mode)
        if self.preprocessing.crop_mode == "border":
            image = self._pad(image)
        return _to_tensor(F.center_crop(image, list(self.size)), self.preprocessing)

    def _resized_size(self, image: Image.Image) -> list[int]:
        height, width = self.resized
        crop_mode = self.preprocessing.crop_mode
        if crop_mode == "squash":
            return [height, width]
        if crop_mode == "center" and height == width:
            return [height]  # the shorter side; torchvision then rounds the longer one down
        ratios = (image.height / height, image.width / width)
        ratio = max(ratios) if crop_mode == "border" else min(ratios)
        return [round(image.height / ratio), round(image.width / ratio)]

    def _pad(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        down, across = max(height - image.height, 0), max(width - image.width, 0)
        fill = [round(255 * value) for value in self.preprocessing.mean]
        padding = [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2]
        padded: Image.Image = F.pad(image, padding, fill=fill)
        return padded


class _Augment:
    """The named augmentations; all draws come from torch's default generator."""

    def __init__(self, preprocessing: Preprocessing, name: str) -> None:
        self.preprocessing, self.name = preprocessing, name
        mode = InterpolationMode(preprocessing.interpolation)
        steps = [
            v2.RandomResizedCrop(preprocessing.input_size[1:], scale=_CROP_SCALE[name], interpolation=mode),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.1, contrast=0.1) if name == "light" else v2.TrivialAugmentWide(),
        ]
        self.change = v2.Compose(steps)
        self.erase = v2.RandomErasing(p=0.25) if name == "strong" else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        values = _to_tensor(self.change(image), self.preprocessing)
        if self.erase is not None:
            values = self.erase(values)
        return values


class _Own:
    """A user's own transform, followed by the evaluation transform where it leaves an image."""

    def __init__(self, transform: Callable[[Any], Any], rest: Transform) -> None:
        self.transform, self.rest = transform, rest

    def __call__(self, image: Image.Image) -> torch.Tensor:
        result = self.transform(image)
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8:
            result = F.to_pil_image(result)
        if isinstance(result, Image.Image):
            return self.rest(result)
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim == 3:
            return result.as_subclass(torch.Tensor)
        raise UsageError(
            f"the augment callable returned {type(result).__name__}, not a PIL image or a tensor (C, H, W)",
            fix="return a PIL image, a uint8 tensor, or a normalised floating-point tensor",
        )
