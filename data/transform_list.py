"""Transforms of torchvision by name, as a recipe holds them: `[{RandomRotation: {degrees: 10}}, RandomGrayscale]`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.named_choice import name_and_arguments

__all__ = ["check_transform_list", "compose"]

#: Transforms of whole batches: switches of the model.
_OF_BATCHES = {"MixUp": "mixup_alpha", "CutMix": "cutmix_alpha"}
#: What takes other transforms.
_OF_TRANSFORMS = ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
#: What gives several images, or needs a function.
_LEFT_OUT = ("FiveCrop", "TenCrop", "Lambda", "LinearTransformation", "Transform", "UniformTemporalSubsample")


def check_transform_list(given: Sequence[Any]) -> None:
    """Refuse names, arguments and values that no transform has.

    Raises:
        UnknownNameError, UsageError: as `compose`.
    """
    compose(given, (224, 224))


def compose(given: Sequence[Any], size: tuple[int, int]) -> Any:
    """The Compose of torchvision.transforms.v2 that a list of names means.

    Args:
        given: of each transform its name, or its name with arguments. Arguments that are transforms are such lists.
        size: (height, width) that a transform with a `size` gets if none is given.

    Raises:
        UnknownNameError: no transform, or no argument of one, has this name.
        UsageError: the list is empty, an entry is something else, or a transform refuses its arguments.
    """
    from torchvision.transforms import v2

    if not given:
        raise UsageError("the list of transforms is empty", fix='augment="none"')
    return v2.Compose([_transform(one, size) for one in given])


def _transform(one: Any, size: tuple[int, int]) -> Any:
    from torchvision.transforms import InterpolationMode, v2

    choice = name_and_arguments(one)
    if choice is None:
        raise UsageError(
            f"a transform in a list is a name, or a name with arguments, not {one!r}",
            fix="augment=[{'RandomRotation': {'degrees': 10}}, 'RandomHorizontalFlip']",
        )
    name, arguments = choice
    if name in _OF_BATCHES:
        raise UsageError(f"{name} changes whole batches", fix=f"{_OF_BATCHES[name]}=0.2 of the model")
    kinds = {
        known: kind
        for known, kind in vars(v2).items()
        if isinstance(kind, type) and issubclass(kind, v2.Transform) and known not in (*_LEFT_OUT, *_OF_BATCHES)
    }
    if name not in kinds:
        raise UnknownNameError("transform of torchvision.transforms.v2", name, kinds)
    parameters = inspect.signature(kinds[name]).parameters
    for argument in arguments:
        if argument not in parameters:
            raise UnknownNameError(f"argument of {name}", argument, parameters)
    if "size" in parameters and parameters["size"].default is inspect.Parameter.empty:
        arguments.setdefault("size", list(size))
    try:
        if isinstance(arguments.get("interpolation"), str):
            arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
        if name in _OF_TRANSFORMS and isinstance(inner := arguments.get("transforms"), Sequence):
            arguments["transforms"] = [_transform(each, size) for each in inner]
        return kinds[name](**arguments)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        shown = {key: value for key, value in arguments.items() if key != "transforms"}
        raise UsageError(f"{name} cannot be made with {shown}", why=str(error)) from None
