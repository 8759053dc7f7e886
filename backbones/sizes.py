"""Backbones for images of another size than their own: with resampled position embeddings where they have these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from flashtask.backbones import build_backbone
from flashtask.backbones.backbone import BACKBONES, Backbone
from flashtask.backbones.inspection import built_without_values, run_without_values
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.number_checks import is_number, is_whole
from flashtask.core.preprocessing import MOST_PIXELS

__all__ = ["as_image_size", "build_for_size", "depth_option"]

#: What timm and torchvision call the size that a model is built for; None: a model that takes images of any size.
_OPTIONS = ("img_size", "image_size", None)
#: What the sides may have to be multiples of: patches, times the strides of later stages, times windows.
_STEPS = (2, 4, 8, 14, 16, 32, 56, 64, 112, 128)


def as_image_size(given: Any) -> tuple[int, int]:
    """(height, width) of an image size.

    Raises:
        UsageError: it is not one whole number above 0, or two, or an image of too many pixels.
    """
    sides = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise UsageError(f"image_size must be pixels, or (height, width), not {given!r}", fix="image_size=224")
    if sides[0] * sides[1] > MOST_PIXELS:
        raise UsageError(
            f"image_size: {sides[0]} x {sides[1]} is more than {MOST_PIXELS:,} pixels", fix="image_size=224"
        )
    return sides


def depth_option(name: Any, drop_path_rate: float | None, options: Mapping[str, Any]) -> dict[str, float]:
    """The option of a backbone for its stochastic depth, as its library calls it; empty if there is no rate.

    Raises:
        UsageError: not a number from 0 to below 1, a module, or the rate is among the options too.
    """
    if drop_path_rate is None:
        return {}
    if not is_number(drop_path_rate) or not 0 <= drop_path_rate < 1:
        raise UsageError(f"drop_path_rate must be from 0 to below 1, not {drop_path_rate!r}", fix="drop_path_rate=0.1")
    if isinstance(name, nn.Module):
        raise UsageError("drop_path_rate is for a backbone that is built by name", fix="build the module with it")
    is_torchvision = isinstance(name, str) and BACKBONES.entry(name).metadata.get("provider") == "torchvision"
    option = "stochastic_depth_prob" if is_torchvision else "drop_path_rate"
    if option in options:
        raise UsageError(f"drop_path_rate is in backbone_options too, as {option}", fix="drop one of them")
    return {option: float(drop_path_rate)}


def build_for_size(name: Any, image_size: tuple[int, int], **options: Any) -> Backbone:
    """A backbone that takes images of a size, or of the next larger one that its patches and windows allow.

    Args:
        name: as for `build_backbone`.
        image_size: (height, width); the size that is used is the backbone's `preprocessing.input_size`.
        options: of `build_backbone`.

    Raises:
        UsageError: the backbone takes only images of its own size, or a size is among the options too.
    """
    if taken := [option for option in _OPTIONS[:2] if option in options]:
        raise UsageError(f"image_size and the backbone's option {taken[0]} are the same", fix=f"leave out {taken[0]}")
    try:
        return _built(name, image_size, options)
    except UsageError as error:
        refused = error
        if not isinstance(name, str) or not _is_about_size(error):
            raise
    plain = {key: value for key, value in options.items() if key not in ("weights", "pretrained")}
    for larger in _larger_sizes(*image_size):
        try:
            built_without_values(lambda size=larger: _built(name, size, {**plain, "pretrained": False}))  # type: ignore[misc]
        except UsageError as error:
            if not _is_about_size(error):
                raise
        else:
            return _built(name, larger, options)
    height, width = image_size
    raise UsageError(
        f"the backbone {name!r} cannot take images of {height} x {width} pixels, or somewhat larger ones",
        why=refused.why or refused.what,
        fix="leave out image_size: it takes its own size",
    )


def _built(name: Any, size: tuple[int, int], options: dict[str, Any]) -> Backbone:
    given = size[0] if size[0] == size[1] else size  # some models take squares alone, as one number
    for option in (None,) if isinstance(name, nn.Module) else _OPTIONS:
        try:
            built = build_backbone(name, **(options if option is None else {**options, option: given}))
        except UsageError as error:
            if option is None or not _is_unknown(error, option):
                raise
        else:
            break
    if option is None:
        channels = built.preprocessing.input_size[0]
        built = replace(built, preprocessing=replace(built.preprocessing, input_size=(channels, *size)))
        _require_that_it_runs(built)
    for patch in _patches(built.module):
        if size[0] % patch[0] or size[1] % patch[1]:
            raise _SizeError(f"the patches of {built.name} are {patch[0]} x {patch[1]} pixels")
    return built


class _SizeError(UsageError):
    """A size that a backbone does not take as it is."""


def _is_unknown(error: UsageError, option: str) -> bool:
    """Whether the builder has no such option."""
    is_named = isinstance(error, UnknownNameError) and error.name == option
    return is_named or f"unexpected keyword argument '{option}'" in error.why


def _is_about_size(error: UsageError) -> bool:
    return isinstance(error, _SizeError) or "cannot be run on images" in error.what or "cannot be built" in error.what


def _require_that_it_runs(built: Backbone) -> None:
    try:
        run_without_values(built.module, built.preprocessing.input_size)
    except Exception as error:
        raise _SizeError(
            f"the backbone {built.name!r} cannot be run on images of {built.preprocessing.input_size}",
            why=f"{type(error).__name__}: {error}",
        ) from error


def _patches(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The patches that a model cuts its images into; what is beyond the last whole one it would not see."""
    from timm.layers.patch_embed import PatchEmbed

    for part in module.modules():
        if isinstance(part, PatchEmbed):
            yield part.patch_size


def _larger_sizes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Sizes that are rounded up to multiples, the smallest first."""
    sizes = {(-(-height // step) * step, -(-width // step) * step) for step in _STEPS}
    yield from sorted(sizes - {(height, width)}, key=lambda size: size[0] * size[1])
