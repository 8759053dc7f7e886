"""What a backbone wants its images to look like: the one record that the data room and the checkpoint share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flashtask.core.errors import IntegrityError, UnknownNameError, UsageError, did_you_mean, key_fix
from flashtask.core.keywords import named_arguments
from flashtask.core.number_checks import is_number

__all__ = ["MOST_PIXELS", "RESIZES", "TIMM_FIELDS", "Preprocessing", "ValueRange", "as_value_range", "check_resize"]
__all__ += ["resized_by", "stored_preprocessing"]

#: (low, high) of the values that become 0..255; or `format`, what the file format itself has.
ValueRange = tuple[float, float] | str

#: The fields that timm's own records have too, under the same names.
TIMM_FIELDS = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")

_DECODINGS = ("scaled", "whole")
_CROP_MODES = ("center", "squash", "border", "tile")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# Of ImageNet, for three channels.
_DEFAULTS: dict[str, Any] = {
    "input_size": (224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "crop_mode": "center",
    "decode": "scaled",
    "value_range": None,
    "tile_overlap": 0.25,
}
#: Pixels of an input at the most.
MOST_PIXELS = 2048 * 2048
# Pixels of the resized image that it is cropped from, at the most.
_MOST_RESIZED = 4096 * 4096
#: So that a picture of any size has few tiles.
_MOST_OVERLAP = 0.75
# So that no byte becomes a number that float32 cannot hold.
_LEAST_STD, _MOST = 1e-6, 1e6


@dataclass(frozen=True, init=False)
class Preprocessing:
    """Size, crop, normalisation and value range of images for evaluation, as the backbone's weights were trained.

    A field that is left out is the backbone's own once a model meets the data (see `filled_from`). Until then, and
    for a module that has no preprocessing, it is ImageNet's. `dataclasses.replace` gives every field of the new record.

    Args:
        input_size: (channels, height, width) in pixels; or (height, width), or one number for a square, with the
            backbone's channels. At most 2048 x 2048 pixels.
        mean: per channel, in units of 0..1.
        std: per channel, in units of 0..1, above 0.
        crop_pct: share of the resized image that the centre crop keeps, in (0, 1].
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_mode: `center` (shorter side to size / crop_pct, then centre crop), `squash` (both sides) or
            `border` (longer side, then pad), with timm's meanings; or `tile`: nothing is resized, and a picture is cut
            into as many inputs as cover it.
        decode: `scaled` lets a JPEG file that is much too large be decoded at a half, a quarter or an eighth of its
            size, at least twice as large as what the resize makes of it; `whole` decodes every pixel.
        value_range: (low, high): the values of images with more than 8 bits a channel that become 0 and 255; what is
            outside is clipped. None: not known, so that such images are refused until a range is found over
            training images. `format`: 0..65535 for 16 bits and 0..1 for floating point, which is what a checkpoint
            means that was written before there were ranges.
        tile_overlap: share of a tile, along each side, that the next tile has too, at least; from 0 to 0.75.

    Raises:
        UsageError: a value that is out of bounds, or values that contradict each other.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: str
    decode: str
    value_range: ValueRange | None
    tile_overlap: float
    #: The names of the fields that were given; `channels` is the first number of `input_size`.
    given: frozenset[str] = field(init=False, compare=False, repr=False)

    def __init__(
        self,
        input_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        crop_mode: str | None = None,
        decode: str | None = None,
        value_range: Sequence[float] | str | None = None,
        tile_overlap: float | None = None,
    ) -> None:
        size = None if input_size is None else _as_size(input_size)
        share = None if crop_pct is None else next(iter(_floats([crop_pct])), crop_pct)
        given: dict[str, Any] = {"input_size": size, "crop_pct": share, "interpolation": interpolation}
        given |= {"crop_mode": crop_mode, "decode": decode, "value_range": as_value_range(value_range)}
        given["tile_overlap"] = tile_overlap
        given |= {name: None if v is None else _numbers(name, v) for name, v in (("mean", mean), ("std", std))}
        given = {name: value for name, value in given.items() if value is not None}
        channels = _channels(size, given.get("mean") or given.get("std"))
        values = _DEFAULTS | given
        values["input_size"] = (channels or 3, *values["input_size"][-2:])
        for name in ("mean", "std"):
            if name not in given and channels not in (None, 3):
                values[name] = (sum(values[name]) / 3,) * channels
        for name, value in values.items():
            object.__setattr__(self, name, value)
        names = {*given, "channels"} if channels else {*given}
        # With all fields of timm's records given, nothing is left to the backbone.
        object.__setattr__(self, "given", frozenset(names | {"decode"} if names.issuperset(TIMM_FIELDS) else names))
        self._check()

    def _check(self) -> None:
        channels, height, width = self.input_size
        if min(self.input_size) < 1 or channels > 1024 or height * width > MOST_PIXELS:
            raise UsageError(
                f"input_size must be (channels, height, width) with at most {MOST_PIXELS:,} pixels, "
                f"not {self.input_size}",
                fix="input_size=(3, 224, 224)",
            )
        if len(self.mean) != channels or len(self.std) != channels:
            raise UsageError(
                f"mean and std need {channels} values, one for each channel, not mean={self.mean} std={self.std}"
            )
        if max(map(abs, (*self.mean, *self.std))) > _MOST or min(self.std) < _LEAST_STD:
            raise UsageError(
                f"mean and std must be numbers in units of 0..1 (std above 0), not mean={self.mean} std={self.std}"
            )
        if not is_number(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        if not is_number(self.tile_overlap) or not 0 <= self.tile_overlap <= _MOST_OVERLAP:
            raise UsageError(f"tile_overlap must be from 0 to {_MOST_OVERLAP}, not {self.tile_overlap}")
        if height * width > _MOST_RESIZED * self.crop_pct**2:
            raise UsageError(
                f"crop_pct={self.crop_pct:g} asks for a resize to more than {_MOST_RESIZED:,} pixels "
                f"before the crop to {height} x {width}",
                fix="crop_pct=0.875",
            )
        for name, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES), ("decode", _DECODINGS)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}",
                    fix=did_you_mean(str(value), known) or f'{name}="{_DEFAULTS[name]}"',
                )

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left for a backbone to set, the value range apart."""
        return self.given.issuperset(TIMM_FIELDS) and "channels" in self.given

    def filled_from(self, other: Preprocessing) -> Preprocessing:
        """The complete record: the fields that were given here, and the others of `other`, the backbone's.

        Raises:
            UsageError: this one is for another number of channels.
        """
        channels = other.input_size[0]
        if "channels" in self.given and self.input_size[0] != channels:
            raise UsageError(
                f"the preprocessing of the data is for {self.input_size[0]} channel(s), but the model takes {channels}",
                fix=f"in_chans={self.input_size[0]} for the model, or Preprocessing(input_size={self.input_size[1:]})",
            )
        values = {name: getattr(self if name in self.given else other, name) for name in _DEFAULTS}
        return Preprocessing(**{**values, "input_size": (channels, *values["input_size"][1:])})

    def resolved(self) -> Preprocessing:
        """The same values, each of them given."""
        return self if self.is_complete else self.filled_from(Preprocessing(**self._values()))

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for images of another number of channels: each gets the mean of the known `mean` and `std`."""
        known = self.input_size[0]
        if known == channels:
            return self
        values = {name: (sum(getattr(self, name)) / known,) * channels for name in ("mean", "std")}
        return Preprocessing(**{**self._values(), **values, "input_size": (channels, *self.input_size[1:])})

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _DEFAULTS}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON: every field, or the given ones where the others are the backbone's."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in self._values().items()}
        if self.crop_mode != "tile":
            del values["tile_overlap"]
        if self.is_complete:
            return values
        if "channels" not in self.given:
            values["input_size"] = values["input_size"][1:]
        return {name: value for name, value in values.items() if name in self.given}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The record that `to_dict` wrote, or one with some of its fields.

        A complete record without `decode` means `whole`: it was written when that was the only way.

        Raises:
            UsageError: an unknown key, or values as in the constructor.
        """
        if not isinstance(values, Mapping):
            raise UsageError(
                f"preprocessing must be a mapping of keys, not {values!r}", fix="preprocessing: {input_size: 224}"
            )
        if unknown := sorted(map(str, set(values) - set(_DEFAULTS))):
            raise UsageError(
                f"preprocessing has unknown keys: {', '.join(unknown)}", fix=key_fix(unknown[0], _DEFAULTS)
            )
        is_whole = all(values.get(name) is not None for name in TIMM_FIELDS)
        return cls(**{**({"decode": "whole"} if is_whole else {}), **values})


#: What `resize` may be -> the fields of a preprocessing; `crop` keeps the backbone's share.
RESIZES: Mapping[str, Mapping[str, Any]] = {
    "crop": {"crop_mode": "center"},
    "pad": {"crop_mode": "border", "crop_pct": 1.0},
    "squash": {"crop_mode": "squash", "crop_pct": 1.0},
    "tile": {"crop_mode": "tile", "crop_pct": 1.0},
}


def check_resize(resize: Any) -> None:
    """Refuse what is neither None nor one of RESIZES.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if resize is not None and resize not in RESIZES:
        raise UnknownNameError("way to resize", str(resize), RESIZES)


def resized_by(preprocessing: Preprocessing, resize: str | None, tile_overlap: float | None = None) -> Preprocessing:
    """The same with the crop mode that `resize` names, if it is given, and the overlap of tiles."""
    changes: dict[str, Any] = {} if resize is None else {**RESIZES[resize]}
    changes |= {} if tile_overlap is None else {"tile_overlap": tile_overlap}
    return replace(preprocessing, **changes) if changes else preprocessing


Preprocessing.__init__ = named_arguments(Preprocessing.__init__)  # type: ignore[method-assign]


def stored_preprocessing(values: Any) -> Preprocessing:
    """The record that a checkpoint or a saved model holds, which need not be one of ours.

    Without `value_range` it means `format`: it was written when that was the only way.

    Raises:
        IntegrityError: it cannot be used.
    """
    try:
        return Preprocessing.from_dict({"value_range": "format", **values})
    except (UsageError, TypeError, ValueError) as error:
        what = error.what if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        raise IntegrityError("its preprocessing cannot be used", why=what) from error


def as_value_range(value: Any) -> ValueRange | None:
    """A value range in its one form: two floats, `format`, or None.

    Raises:
        UsageError: something else, or a low end that is not below the high end.
    """
    if value is None or (isinstance(value, str) and value == "format"):
        return value
    ends = _floats(value)
    if len(ends) != 2 or max(map(abs, ends)) > 1e30 or not ends[1] - ends[0] > 1e-30:
        raise UsageError(
            f"value_range must be (low, high), the pixel values that are black and white, not {value!r}",
            fix="value_range=(0, 4095)",
        )
    return ends[0], ends[1]


def _floats(value: Any) -> tuple[float, ...]:
    """Several finite numbers; empty if they are none."""
    try:
        numbers = () if isinstance(value, str) else tuple(float(number) for number in value)
    except (TypeError, ValueError, OverflowError):
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()


def _as_size(value: Any) -> tuple[int, ...]:
    try:
        sides = value if isinstance(value, Iterable) else (value, value)
        size = () if isinstance(value, str) else tuple(int(side) for side in sides)
    except (TypeError, ValueError, OverflowError):
        size = ()
    if len(size) not in (2, 3):
        raise UsageError(
            f"input_size must be (channels, height, width), (height, width) or one number, not {value!r}",
            fix="input_size=(3, 224, 224)",
        )
    return size


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    numbers = _floats(value)
    if not numbers:
        raise UsageError(f"{name} must be one number for each channel, not {value!r}", fix=f"{name}={_DEFAULTS[name]}")
    return numbers


def _channels(size: tuple[int, ...] | None, by_channel: tuple[float, ...] | None) -> int | None:
    """How many channels a record is for, None if that is open."""
    if size is not None and len(size) == 3:
        return size[0]
    return len(by_channel) if by_channel else None
