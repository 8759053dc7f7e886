"""Folders in timm's layout: what `config.json` says about the model, checked before anything is built from it.

`config.json` is written by others. Nothing in it names a file, an address or code that would be used: what could is
refused, and the weights are always the file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtask.backbones.model_args import check_model_args
from flashtask.backbones.sources import library_names
from flashtask.backbones.weight_files import read_weights
from flashtask.core.errors import (
    IntegrityError,
    MissingInputError,
    UsageError,
    did_you_mean,
)
from flashtask.core.foreign_config import read_foreign_config
from flashtask.core.preprocessing import TIMM_FIELDS, Preprocessing

__all__ = [
    "CONFIG_FILE",
    "WEIGHT_FILES",
    "TimmFolder",
    "read_timm_folder",
    "read_weights",
    "timm_architecture",
]

CONFIG_FILE = "config.json"
#: In the order in which they are looked for.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class TimmFolder:
    """What a folder in timm's layout holds.

    Args:
        architecture: a model name of timm without a tag.
        num_classes: outputs of the classifier in the weights; 0 if they have none.
        labels: the classes' names in the order of the outputs; None if the folder does not say. A name that stands
            twice gets its index behind it.
        preprocessing: of the images that the weights were trained with.
        model_args: further arguments for timm's builder of the architecture, plain and checked; neither `num_classes`
            nor `in_chans`, which stand in `num_classes` and `preprocessing.input_size[0]`.
        config: the whole of config.json.
        weights: `model.safetensors`, else `pytorch_model.bin`.
    """

    architecture: str
    num_classes: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    model_args: dict[str, Any]
    config: dict[str, Any]
    weights: Path

    @property
    def in_chans(self) -> int:
        """Channels of the images that the weights are for."""
        return self.preprocessing.input_size[0]


def read_timm_folder(folder: Path, *, needs_weights: bool = True) -> TimmFolder:
    """Read and check the configuration of a folder, and find its weights without reading them.

    Args:
        folder: with config.json and model.safetensors or pytorch_model.bin.
        needs_weights: weights that are missing are an error; else `weights` may be a file that is not there.

    Raises:
        MissingInputError: there is no such folder, configuration or weights file.
        IntegrityError: the configuration is damaged or hostile, is not timm's, or contradicts itself.
        StorageError: the disk does not give the bytes back.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = read_foreign_config(path)
    try:
        return _parse(folder, config, needs_weights)
    except _Wrong as error:
        raise IntegrityError(f"{path} was refused: {error}", fix=error.fix) from error


def timm_architecture(name: Any) -> str:
    """The plain name of an architecture that the installed timm has; a name that timm has given up is mapped.

    Raises:
        UsageError: it is no such name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise UsageError(f"the architecture {str(name)[:100]!r} is no plain name of a timm model")
    if name in library_names("timm"):
        return name
    from timm.models import get_deprecated_models

    if current := get_deprecated_models().get(name):
        return current.partition(".")[0]
    near = did_you_mean(name, library_names("timm"))
    raise UsageError(
        f"the installed timm has no architecture {name!r}", fix=near or "a newer one may: pip install --upgrade timm"
    )


class _Wrong(ValueError):  # noqa: N818 - never leaves this module
    """What is wrong with a configuration; becomes an IntegrityError that names the file."""

    def __init__(self, text: str, fix: str = "") -> None:
        super().__init__(text)
        self.fix = fix


def _parse(folder: Path, config: dict[str, Any], needs_weights: bool) -> TimmFolder:
    if "architecture" not in config:
        other = "model_type" in config or "architectures" in config
        why = "it is the configuration of transformers" if other else "it names no architecture"
        raise _Wrong(f"{why}, not timm's", "use a repository in timm's layout: its config.json has an `architecture`")
    try:
        architecture = timm_architecture(config["architecture"])
        model_args = check_model_args(_table(config, "model_args"))
    except UsageError as error:
        raise _Wrong(error.what, error.fix) from error
    # Older configurations are flat: what the weights are like stands beside the architecture.
    nested = "pretrained_cfg" in config
    weights_config = _table(config, "pretrained_cfg") if nested else config
    counts = [_count(each, "num_classes") for each in (config, model_args, weights_config)]
    known = [count for count in counts if count is not None]
    if not known:
        raise _Wrong("it does not say num_classes")
    names = config.get("label_names", weights_config.get("label_names", weights_config.get("labels")))
    in_chans = _count(model_args, "in_chans")
    return TimmFolder(
        architecture=architecture,
        num_classes=known[0],
        labels=_labels(names, known[0]),
        preprocessing=_preprocessing(weights_config, in_chans, model_args.get("img_size")),
        model_args={name: value for name, value in model_args.items() if name not in ("num_classes", "in_chans")},
        config=config,
        weights=_find_weights(folder, needs_weights),
    )


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise _Wrong(f"{key} is a {type(value).__name__}, not a table")
    return value or {}


def _count(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= _MAX_CLASSES:
        raise _Wrong(f"{key} is {str(value)[:60]!r}, not a whole number from 0 to {_MAX_CLASSES:,}")
    return value


def _labels(names: Any, num_classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, dict):  # index -> name, where some outputs have no name
        if not all(re.fullmatch(r"\d{1,7}", key) and int(key) < max(num_classes, 1) for key in names):
            raise _Wrong(f"a key of label_names is no index below {num_classes:,}")
        by_index = {int(key): name for key, name in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_classes)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Wrong("label_names is no list of texts")
    if num_classes and len(names) != num_classes:
        raise _Wrong(f"it has {len(names):,} label_names and num_classes = {num_classes:,}")
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return tuple(f"{name} ({index})" if name in twice else name for index, name in enumerate(names))


def _preprocessing(values: Mapping[str, Any], in_chans: int | None, img_size: Any) -> Preprocessing:
    from flashtask.backbones.weights import for_channels

    defaults = Preprocessing(interpolation="bicubic")  # timm's own
    given = {key: values[key] for key in TIMM_FIELDS if values.get(key) is not None}
    try:
        channels, *size = _sizes(given.pop("input_size", list(defaults.input_size)), 3)
        if img_size is not None:
            size = [img_size, img_size] if type(img_size) is int else _sizes(img_size, 2)
        for key in ("mean", "std"):
            numbers = given.get(key, list(getattr(defaults, key)))
            numbers = [numbers] if type(numbers) in (int, float) else numbers
            if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
                raise _Wrong(f"{key} is no list of numbers")
            given[key] = numbers * channels if len(numbers) == 1 else numbers
        if type(given.get("crop_pct", 1.0)) not in (int, float):
            raise _Wrong("crop_pct is no number")
        given["crop_pct"] = min(given.get("crop_pct", defaults.crop_pct), 1.0)  # as for timm's own models
        if len(given["mean"]) == len(given["std"]) != channels and in_chans == channels:
            # Files of timm before 1.0.20 keep the mean of the colours beside another number of channels.
            channels = len(given["mean"])
        known = Preprocessing(**{"interpolation": "bicubic", **given, "input_size": (channels, *size)}).resolved()
        return for_channels(known, in_chans or channels)
    except UsageError as error:
        raise _Wrong(error.what, error.fix) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, _Wrong):
            raise
        raise _Wrong(f"it does not describe images: {error}") from error


def _sizes(value: Any, length: int) -> list[int]:
    if not isinstance(value, list) or len(value) != length or not all(type(n) is int for n in value):
        raise _Wrong(f"a size is {str(value)[:60]!r}, not {length} whole numbers")
    return list(value)


def _find_weights(folder: Path, needed: bool) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if needed:
        raise MissingInputError(
            f"{folder} holds no weights", why=f"there is no {' and no '.join(WEIGHT_FILES)}", fix=f"ls -l {folder}"
        )
    return folder / WEIGHT_FILES[0]
