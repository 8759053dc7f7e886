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
from flashtask.core.number_checks import is_number
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import GENERATORS
from flashtask.data.decoding import Decoding, FirstSteps, Fitting, Pixels
from flashtask.data.transform_list import check_transform_list, compose

__all__ = [
    "AUGMENTATIONS",
    "FLIPS",
    "AugmentLike",
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
    # As torchvision's own training.
    "trivial_augment": "random crop of 8 to 100 % of the area, horizontal flip, TrivialAugment (one operation)",
    "rand_augment": "random crop of 8 to 100 % of the area, horizontal flip, RandAugment (two operations)",
    "aug_mix": "random crop of 8 to 100 % of the area, horizontal flip, AugMix (three chains of operations)",
}
#: What `flip` may be: how named augmentations mirror images, each way half of them.
FLIPS = ("none", "horizontal", "vertical", "both")
#: What a user gives as `augment`: a name, a list of transforms by name, or a callable.
AugmentLike = str | Sequence[Any] | Callable[[Any], Any]

#: How far beyond the values of a normalised image those of a transform of the user's may be.
_SPARE = 10
_CROP_SCALE = {"light": (0.7, 1.0), "medium": (0.35, 1.0)}
_WHOLE_SCALE = (0.08, 1.0)
_ERASING = {"strong": 0.25}


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


def check_augment(augment: object, flip: object = None, random_erasing: object = None) -> None:
    """Refuse what is no augmentation, or a flip or erasing that does not go with it.

    Raises:
        UnknownNameError: a name that is not in AUGMENTATIONS or FLIPS, or that no transform has.
        UsageError: something else.
    """
    if isinstance(augment, str):
        if augment not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", augment, AUGMENTATIONS)
    elif isinstance(augment, (list, tuple)):
        check_transform_list(augment)
    elif not callable(augment):
        raise UsageError(
            f"augment must be a name or a callable that takes a PIL image, not {augment!r}",
            fix=f"augment one of: {', '.join(AUGMENTATIONS)}",
        )
    if flip is not None and flip not in FLIPS:
        raise UnknownNameError("flip", str(flip), FLIPS)
    if flip is not None and (augment == "none" or not isinstance(augment, str)) and flip != "none":
        raise UsageError(
            f"flip={flip!r} is for named augmentations, not for {_shown(augment)}",
            fix='augment="light", or a RandomHorizontalFlip among your own transforms',
        )
    if random_erasing is not None and (not is_number(random_erasing) or not 0 <= random_erasing <= 1):
        raise UsageError(f"random_erasing must be a probability from 0 to 1, not {random_erasing!r}")
    if random_erasing and augment == "none":
        raise UsageError('random_erasing changes images, and augment="none" does not', fix="leave out one of them")


def _shown(augment: object) -> str:
    return f"augment={augment!r}" if isinstance(augment, str) else "transforms of your own"


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


def train_transform(
    preprocessing: Preprocessing,
    augment: AugmentLike = "auto",
    flip: str | None = None,
    random_erasing: float | None = None,
) -> Augmentation:
    """The transforms of training.

    Args:
        preprocessing: what the backbone takes.
        augment: one of AUGMENTATIONS; a list of transforms of torchvision by name, as `transform_list.compose` takes
            it; or a callable (a torchvision Compose) that takes a PIL image. If the last two return a PIL image or a
            uint8 tensor, the evaluation transform follows; a floating-point tensor is used as it is.
        flip: one of FLIPS, for named augmentations; None means `horizontal`.
        random_erasing: probability that a part of an image is set to the mean (Zhong et al., 2020); None means that of
            the augmentation.

    Raises:
        UnknownNameError: a name that does not exist.
        UsageError: neither a name, a list nor a callable, or arguments that contradict each other.
    """
    check_augment(augment, flip, random_erasing)
    plain: Evaluation | _Augment = eval_transform(preprocessing)
    if isinstance(plain, Evaluation) and plain.is_tiled:
        plain = _Augment(preprocessing, "none", "none", None)
    if augment == "none":
        return Augmentation(plain, plain, () if isinstance(plain, Evaluation) else ("torch",))
    if isinstance(augment, str):
        name = "light" if augment == "auto" else augment
        changed: Transform = _Augment(preprocessing, name, flip or "horizontal", random_erasing)
        return Augmentation(changed, plain if augment == "auto" else changed, ("torch",))
    if isinstance(augment, Sequence):
        listed = _Own(compose(augment, preprocessing.input_size[1:]), plain, random_erasing, repr(list(augment)))
        return Augmentation(listed, listed, ("torch",))
    own = _Own(augment, plain, random_erasing)
    return Augmentation(own, own, GENERATORS)


def is_fixed(transform: Transform) -> bool:
    """Whether a transform is known to give the same tensor each time."""
    return isinstance(transform, Evaluation)


def description(transform: Transform) -> str | None:
    """What a transform does, so that two that say the same do the same; None for a user's own."""
    if isinstance(transform, Evaluation):
        return f"evaluate {transform.preprocessing.to_dict()}"
    if isinstance(transform, (_Augment, _Own)) and transform.name:
        return f"{transform.name} {transform.preprocessing.to_dict()}"
    return None


class Evaluation:
    """Resize, crop at the centre, normalise, by timm's three crop modes; or cut into tiles and normalise.

    Args:
        preprocessing: of the backbone.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.first = Fitting(preprocessing)
        #: Whether a picture becomes several inputs (T, C, H, W), and not one (C, H, W).
        self.is_tiled = self.first.is_tiled
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
            pixels: of the final size; of the whole picture where it is cut into tiles.
            out: float32 (C, H, W) in any memory format, to write into; not for tiles.
        """
        if self.is_tiled:
            parts = self.first.cut(pixels)
            tiles = torch.empty((len(parts), *self.shape))
            for part, tile in zip(parts, tiles, strict=True):
                self._normalise(part, tile)
            return tiles
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
    """The named augmentations; all draws come from torch's default generator.

    Where pictures are cut into tiles, a tile is taken at random first.
    """

    def __init__(self, preprocessing: Preprocessing, name: str, flip: str, random_erasing: float | None) -> None:
        from torchvision.transforms import InterpolationMode, v2  # a second that evaluation and prediction save

        self.preprocessing = preprocessing
        erasing = _ERASING.get(name, 0.0) if random_erasing is None else random_erasing
        #: what it does, with what differs from the usual
        self.name = name + ("" if flip == "horizontal" else f" flip={flip}")
        self.name += "" if random_erasing is None else f" erasing={erasing}"
        self._normalise = _Normalise(preprocessing)
        self.shape = preprocessing.input_size
        scale = _CROP_SCALE.get(name, _WHOLE_SCALE)
        # So that the smallest crop, in its narrowest shape (3 to 4), is still twice as large as what becomes of it.
        least = math.ceil(2 * max(self.shape[1:]) / math.sqrt(scale[0] * 3 / 4))
        is_tiled = preprocessing.crop_mode == "tile"
        least_side = least if preprocessing.decode == "scaled" and not is_tiled else None
        self.first = Decoding(self.shape[0], least_side, preprocessing.value_range)
        mode = InterpolationMode(preprocessing.interpolation)
        steps: list[Any] = []
        if name != "none":
            steps += [v2.RandomResizedCrop(preprocessing.input_size[1:], scale=scale, interpolation=mode)]
        steps += [v2.RandomHorizontalFlip()] if flip in ("horizontal", "both") else []
        steps += [v2.RandomVerticalFlip()] if flip in ("vertical", "both") else []
        policies = {"rand_augment": v2.RandAugment, "aug_mix": v2.AugMix}
        simple = {"none": v2.Identity(), "light": v2.ColorJitter(brightness=0.1, contrast=0.1)}
        change = simple.get(name) or policies.get(name, v2.TrivialAugmentWide)()
        self.change = v2.Compose([*steps, change])
        # The policies do not take masks and boxes.
        self._joint_change = v2.Compose([*steps, simple.get(name, v2.ColorJitter(0.4, 0.4, 0.4))])
        self._is_tiled = is_tiled
        self.erase = v2.RandomErasing(p=erasing) if erasing else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self._is_tiled:
            image = self._tile()(image)
        return self._finished(self.change(image))

    def joint(self, image: Image.Image, target: Any, fill: int = 0) -> tuple[torch.Tensor, Any]:
        """The tensor, and the picture's tv_tensors changed alike."""
        if self._is_tiled:
            image, target = self._tile(fill)(image, target)
        image, target = self._joint_change(image, target)
        return self._finished(image), target

    def _tile(self, fill: int = 0) -> Any:
        """What takes a tile of a picture, and fills up one that the picture is smaller than."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        mean = [round(255 * value) for value in self.preprocessing.mean]
        fills = {tv_tensors.Mask: fill, "others": mean if len(mean) > 1 else mean[0]}
        return v2.RandomCrop(self.shape[1:], pad_if_needed=True, fill=fills)

    def _finished(self, image: Image.Image) -> torch.Tensor:
        values = self._normalise(np.array(image), torch.empty(self.shape))
        if self.erase is not None:
            values = self.erase(values)
        return values


class _Own:
    """A user's own transform, followed by the evaluation transform where it leaves an image."""

    def __init__(
        self,
        transform: Callable[[Any], Any],
        rest: Evaluation | _Augment,
        random_erasing: float | None = None,
        listed: str = "",
    ) -> None:
        self.transform, self.rest, self.preprocessing = transform, rest, rest.preprocessing
        #: what it does, if it is a list of names
        self.name = listed and f"{listed} erasing={random_erasing or 0}"
        self._random_erasing = random_erasing

    def __call__(self, image: Image.Image) -> torch.Tensor:
        result = self._picture_or_values(self.transform(image))
        return self._erased(self.rest(result) if isinstance(result, Image.Image) else result)

    def _erased(self, values: torch.Tensor) -> torch.Tensor:
        if not self._random_erasing:
            return values
        from torchvision.transforms import v2

        erased: torch.Tensor = v2.RandomErasing(p=self._random_erasing)(values)
        return erased

    def joint(self, image: Image.Image, target: Any, fill: int = 0) -> tuple[torch.Tensor, Any]:
        """What the user's transform of both gives, as a v2 transform of torchvision does."""
        results = self.transform(image, target)  # type: ignore[call-arg]  # two arguments for such data
        if not isinstance(results, (tuple, list)) or len(results) != 2:
            raise UsageError(
                f"the augment callable returned {type(results).__name__}, not the image and its target",
                fix="a Compose of torchvision.transforms.v2, or a function (image, target) -> (image, target)",
            )
        result = self._picture_or_values(results[0])
        if isinstance(result, Image.Image):
            values, target = self.rest.joint(result, results[1], fill)
            return self._erased(values), target
        return self._erased(result), results[1]

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
