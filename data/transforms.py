"""From a PIL image to the tensor a backbone takes: the evaluation transform and the training augmentations.

Evaluation follows timm's meaning of size, crop and interpolation to the pixel, so that weights see what they
were trained on. Validation, test and prediction all use it; only training can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import GENERATORS
from flashtask.data.decoding import Decoding, FirstSteps, Fitting, Pixels

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Evaluation",
    "Transform",
    "check_augment",
    "description",
    "eval_transform",
    "first_steps",
    "is_fixed",
    "train_transform",
]

#: PIL image to float32 tensor (C, H, W), normalised.
Transform = Callable[[Image.Image], torch.Tensor]

#: What `augment` may name: how far training images are changed.
AUGMENTATIONS = {
    "auto": "none while the whole backbone is frozen, light from the first epoch in which any of it trains",
    "none": "as for evaluation",
    "light": "random crop of 70 to 100 % of the area, horizontal flip, a little brightness and contrast",
    # Where masks, boxes or points move with the image: brightness, contrast and saturation in place of TrivialAugment.
    "medium": "random crop of 35 to 100 % of the area, horizontal flip, TrivialAugment (one operation)",
    "strong": "random crop of 8 to 100 % of the area, horizontal flip, TrivialAugment, random erasing",
}

#: How far beyond the values of a normalised image those of a transform of the user's may be.
_SPARE = 10
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


def eval_transform(preprocessing: Preprocessing) -> Evaluation:
    """The transform of validation, test and prediction; deterministic."""
    return Evaluation(preprocessing)


def first_steps(transform: Transform, channels: int) -> FirstSteps:
    """What of a transform is deterministic and comes first; for a transform of a user's own it is the decoding.

    Args:
        transform: of images.
        channels: 3 or 1.
    """
    if isinstance(transform, (Evaluation, _Augment)):
        return transform.first
    value_range = transform.rest.preprocessing.value_range if isinstance(transform, _Own) else None
    return Decoding(channels, value_range=value_range)


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
    return isinstance(transform, Evaluation)


def description(transform: Transform) -> str | None:
    """What a transform does, so that two that say the same do the same; None for a user's own."""
    if isinstance(transform, Evaluation):
        return f"evaluate {transform.preprocessing.to_dict()}"
    if isinstance(transform, _Augment):
        return f"{transform.name} {transform.preprocessing.to_dict()}"
    return None


class Evaluation:
    """Resize, crop at the centre, normalise, by timm's three crop modes.

    Args:
        preprocessing: of the backbone.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.first = Fitting(preprocessing)
        self._normalise = _Normalise(preprocessing)
        self.shape = preprocessing.input_size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The tensor of a decoded picture in mode RGB or L."""
        return self.rest(self.first.fit(image))

    def joint(self, image: Image.Image, target: Any, fill: int = 0) -> tuple[torch.Tensor, Any]:
        """The tensor, and the picture's tv_tensors as they lie in it."""
        return self(image), self.first.geometry(image.size).apply(target, fill)

    def rest(self, pixels: Pixels, out: torch.Tensor | None = None) -> torch.Tensor:
        """What is left to do after the first steps.

        Args:
            pixels: of the final size.
            out: float32 (C, H, W) in any memory format, to write into.
        """
        if out is None:
            out = torch.empty(self.shape)
        return self._normalise(pixels, out)


class _Normalise:
    """From bytes to float32 (C, H, W): divided by 255, less the mean, divided by the deviation.

    In NumPy, which stays in its thread: torch would start threads of its own in each thread that decodes.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mean = np.array(preprocessing.mean, dtype=np.float32)[:, None, None]
        self.std = np.array(preprocessing.std, dtype=np.float32)[:, None, None]

    def __call__(self, pixels: Pixels, out: torch.Tensor) -> torch.Tensor:
        channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        values = out.numpy()
        np.subtract(channels.astype(np.float32) / np.float32(255), self.mean, out=values)
        np.divide(values, self.std, out=values)
        return out


class _Augment:
    """The named augmentations; all draws come from torch's default generator."""

    def __init__(self, preprocessing: Preprocessing, name: str) -> None:
        from torchvision.transforms import InterpolationMode, v2  # a second that evaluation and prediction save

        self.preprocessing, self.name = preprocessing, name
        self._normalise = _Normalise(preprocessing)
        self.shape = preprocessing.input_size
        # So that the smallest crop, in its narrowest shape (3 to 4), is still twice as large as what becomes of it.
        least = math.ceil(2 * max(self.shape[1:]) / math.sqrt(_CROP_SCALE[name][0] * 3 / 4))
        least_side = least if preprocessing.decode == "scaled" else None
        self.first = Decoding(self.shape[0], least_side, preprocessing.value_range)
        mode = InterpolationMode(preprocessing.interpolation)
        steps = [
            v2.RandomResizedCrop(preprocessing.input_size[1:], scale=_CROP_SCALE[name], interpolation=mode),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.1, contrast=0.1) if name == "light" else v2.TrivialAugmentWide(),
        ]
        self.change = v2.Compose(steps)
        # TrivialAugment does not take masks and boxes.
        self._joint_change = self.change if name == "light" else v2.Compose([*steps[:2], v2.ColorJitter(0.4, 0.4, 0.4)])
        self.erase = v2.RandomErasing(p=0.25) if name == "strong" else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self._finished(self.change(image))

    def joint(self, image: Image.Image, target: Any, fill: int = 0) -> tuple[torch.Tensor, Any]:
        """The tensor, and the picture's tv_tensors changed alike."""
        image, target = self._joint_change(image, target)
        return self._finished(image), target

    def _finished(self, image: Image.Image) -> torch.Tensor:
        values = self._normalise(np.array(image), torch.empty(self.shape))
        if self.erase is not None:
            values = self.erase(values)
        return values


class _Own:
    """A user's own transform, followed by the evaluation transform where it leaves an image."""

    def __init__(self, transform: Callable[[Any], Any], rest: Evaluation) -> None:
        self.transform, self.rest = transform, rest

    def __call__(self, image: Image.Image) -> torch.Tensor:
        result = self._picture_or_values(self.transform(image))
        return self.rest(result) if isinstance(result, Image.Image) else result

    def joint(self, image: Image.Image, target: Any, fill: int = 0) -> tuple[torch.Tensor, Any]:
        """What the user's transform of both gives, as a v2 transform of torchvision does."""
        results = self.transform(image, target)  # type: ignore[call-arg]  # two arguments for such data
        if not isinstance(results, (tuple, list)) or len(results) != 2:
            raise UsageError(
                f"the augment callable returned {type(results).__name__}, not the image and its target",
                fix="a Compose of torchvision.transforms.v2, or a function (image, target) -> (image, target)",
            )
        result = self._picture_or_values(results[0])
        return self.rest.joint(result, results[1], fill) if isinstance(result, Image.Image) else (result, results[1])

    def _picture_or_values(self, result: Any) -> Image.Image | torch.Tensor:
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8:
            from torchvision.transforms.v2.functional import to_pil_image

            result = to_pil_image(result)
        if isinstance(result, Image.Image):
            return result
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim == 3:
            _check_floats(result, self.rest.preprocessing)
            return result.as_subclass(torch.Tensor)
        raise UsageError(
            f"the augment callable returned {type(result).__name__}, not a PIL image or a tensor (C, H, W)",
            fix="return a PIL image, a uint8 tensor, or a normalised floating-point tensor",
        )


def _check_floats(result: torch.Tensor, preprocessing: Preprocessing) -> None:
    """Refuse floats that are no normalised image.

    Raises:
        UsageError: there are other channels than the model takes, or values that no normalised pixel has.
    """
    channels, *_ = preprocessing.input_size
    if result.shape[0] != channels:
        is_last = result.shape[-1] == channels
        raise UsageError(
            f"the augment callable returned a tensor of shape {tuple(result.shape)}, and the model takes "
            f"({channels}, height, width)",
            fix="tensor.permute(2, 0, 1)" if is_last else f"return {channels} channels, or a PIL image",
        )
    pairs = zip(preprocessing.mean, preprocessing.std, strict=True)
    most = _SPARE * max(max(1 - mean, mean) / std for mean, std in pairs)
    found = float(result.detach().abs().max()) if result.numel() else 0.0
    if found > most:
        raise UsageError(
            f"the augment callable returned floats up to {found:g}, which are not normalised",
            why="validation and prediction normalise with the mean and the deviation of the model",
            fix="return a uint8 tensor or a PIL image, which is normalised afterwards",
        )
