"""Descriptions of backbones in files: `config.json` of a folder in timm's layout, and the arguments in a checkpoint.

They are written by others. Nothing in them names a file, an address or code that would be used: what could is refused,
and weights are always those of the same folder or file. All is checked before anything is built from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.backbones.backbone import BACKBONES, Backbone, is_address
from flashtask.core.errors import IntegrityError, MissingInputError, UsageError, did_you_mean
from flashtask.core.foreign_config import read_foreign_config
from flashtask.core.preprocessing import TIMM_FIELDS, Preprocessing

if TYPE_CHECKING:  # the hub's client takes long to import
    from flashtask.core.hub.address import HubAddress
    from flashtask.core.hub.snapshot import Snapshot

__all__ = [
    "CONFIG_FILE",
    "WEIGHT_FILES",
    "TimmFolder",
    "check_model_args",
    "check_stored_backbone",
    "fetch_timm_folder",
    "read_timm_folder",
    "stored_arguments",
]

CONFIG_FILE = "config.json"
#: In the order in which they are looked for.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

#: What reads a file or an address, swaps code, or makes another kind of model.
_REFUSED_ARGS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "checkpoint_path", "cache_dir", "file", "url", "state_dict", "source"),
        *("hf_hub_id", "hf_hub_filename", "custom_load", "features_only", "out_indices", "feature_cls", "feature_cfg"),
        *("model_cls", "model_cfg", "cfg", "variant", "model_name", "kwargs_filter", "pruned", "weights"),
        *("scriptable", "exportable", "no_jit", "args", "kwargs"),
    )
)
_MAX_BLOCKS = 2_000  # the deepest model of timm has some hundred
_MAX_SIZE = 65_536
_ABOUT_DEPTH = re.compile(r"depth|layers|blocks|repeat|num_stages|num_heads")
_MAX_CLASSES = 1_000_000
_MAX_OFFSET = 10


# ---- the arguments of a builder


def check_model_args(values: Any) -> dict[str, Any]:
    """Arguments for timm's builder that come from a file: plain values of modest size, none that reads anything.

    Raises:
        UsageError: there are others.
    """
    if not isinstance(values, Mapping) or len(values) > 100:
        raise UsageError("model_args is not a table of at most 100 arguments")
    for name, value in values.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,60}", name):
            raise UsageError(f"model_args has the key {str(name)[:60]!r}, which is not the name of an argument")
        if name in _REFUSED_ARGS:
            raise UsageError(f"model_args has {name!r}, which a file may not set")
        _check_size(name, value)
    return dict(values)


def _check_size(name: str, value: Any, depth: int = 0) -> None:
    """Numbers, texts and short lists of them; what counts blocks stays below what any model has."""
    if depth > 5:
        raise UsageError(f"model_args: {name} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        parts = list(_parts_of(value))
        if len(parts) > 1_000 or (isinstance(value, dict) and not all(len(key) <= 60 for key in value)):
            raise UsageError(f"model_args: {name} has too many parts")
        for part in parts:
            _check_size(name, part, depth + 1)
    elif isinstance(value, str):
        if len(value) > 200 or "/" in value or "\\" in value or ":" in value:
            raise UsageError(f"model_args: {name} is a text that is not accepted: {value[:60]!r}")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UsageError(f"model_args: {name} is a {type(value).__name__}")
    elif value is not None and abs(value) > _MAX_SIZE:
        raise UsageError(f"model_args: {name} = {str(value)[:40]} is far too large")
    if depth == 0 and _ABOUT_DEPTH.search(name) and sum(_numbers(value)) > _MAX_BLOCKS:
        raise UsageError(f"model_args: {name} makes more than {_MAX_BLOCKS:,} blocks")


def _parts_of(value: Any) -> Iterable[Any]:
    """What a table or list holds; nothing for other values."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield abs(value)
    for part in _parts_of(value):
        yield from _numbers(part)


# ---- a folder in timm's layout


@dataclass(frozen=True)
class TimmFolder:
    """What a folder in timm's layout holds.

    Args:
        architecture: a model name of timm without a tag.
        num_classes: outputs of the classifier in the weights; 0 if they have none.
        labels: the classes' names in the order of the outputs; None if the folder does not say. A name that occurs
            twice is followed by its index.
        preprocessing: of the images that the weights were trained with.
        label_offset: outputs before the first class.
        model_args: further arguments for timm's builder of the architecture, plain and checked; neither `num_classes`
            nor `in_chans`, which are in `num_classes` and `preprocessing.input_size[0]`.
        config: the whole of config.json.
        weights: `model.safetensors`, else `pytorch_model.bin`.
    """

    architecture: str
    num_classes: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    label_offset: int
    model_args: dict[str, Any]
    config: dict[str, Any]
    weights: Path

    @property
    def in_chans(self) -> int:
        """Channels of the images that the weights are for."""
        return self.preprocessing.input_size[0]


def fetch_timm_folder(address: HubAddress, *, weights: bool = True, optional: Sequence[str] = ()) -> Snapshot:
    """Fetch a repository in timm's layout: its configuration, and its weights as `read_timm_folder` looks for them.

    Args:
        address: repository and revision.
        weights: without, only the configuration and the optional files are fetched.
        optional: further files that are fetched if the repository has them.

    Raises:
        HubError: the repository cannot be reached or read, or has no configuration or no weights.
        IntegrityError: a file is not the one that the hub promised.
        StorageError: a cache cannot be read or written.
    """
    from flashtask.core.hub.snapshot import fetch

    safe, pickled = WEIGHT_FILES
    snapshot = fetch(address, [CONFIG_FILE], optional=[*([safe] if weights else []), *optional])
    if weights and not (snapshot.folder / safe).is_file():
        # At the same commit, whatever the branch has become meanwhile.
        snapshot = fetch(replace(address, revision=snapshot.commit), [CONFIG_FILE, pickled])
    return snapshot


def read_timm_folder(folder: Path, *, needs_weights: bool = True) -> TimmFolder:
    """Read and check the configuration of a folder, and find its weights without reading them.

    Args:
        folder: with config.json and model.safetensors or pytorch_model.bin.
        needs_weights: weights that are missing are an error; else `weights` may be the path of a missing file.

    Raises:
        MissingInputError: there is no such folder, configuration or weights file.
        IntegrityError: the configuration is damaged or hostile, is not timm's, or contradicts itself.
        StorageError: the disk cannot be read.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = read_foreign_config(path)
    try:
        return _parse(folder, config, needs_weights)
    except _Wrong as error:
        raise IntegrityError(f"{path} was refused: {error}", fix=error.fix) from error


def _timm_architecture(name: Any) -> str:
    """The plain name of an architecture that the installed timm has; a deprecated name is mapped to the one in use."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise UsageError(f"the architecture {str(name)[:100]!r} is not the plain name of a timm model")
    from timm.models import get_deprecated_models, is_model, list_models

    if current := get_deprecated_models().get(name):
        return current.partition(".")[0]
    if is_model(name):
        return name
    near = did_you_mean(name, list_models())
    raise UsageError(
        f"the installed timm has no architecture {name!r}",
        fix=near or "a newer one may have it: pip install --upgrade timm",
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
        architecture = _timm_architecture(config["architecture"])
        model_args = check_model_args(_table(config, "model_args"))
    except UsageError as error:
        raise _Wrong(error.what, error.fix) from error
    # In older, flat configurations the description of the weights is beside the architecture.
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
        label_offset=_count(weights_config, "label_offset", _MAX_OFFSET) or 0,
        model_args={name: value for name, value in model_args.items() if name not in ("num_classes", "in_chans")},
        config=config,
        weights=_find_weights(folder, needs_weights),
    )


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise _Wrong(f"{key} is a {type(value).__name__}, not a table")
    return value or {}


def _count(values: Mapping[str, Any], key: str, most: int = _MAX_CLASSES) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= most:
        raise _Wrong(f"{key} is {str(value)[:60]!r}, not a whole number from 0 to {most:,}")
    return value


def _labels(names: Any, num_classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, dict):  # index -> name, where some outputs have no name
        if not all(re.fullmatch(r"\d{1,7}", key) and int(key) < max(num_classes, 1) for key in names):
            raise _Wrong(f"a key of label_names is not an index below {num_classes:,}")
        by_index = {int(key): name for key, name in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_classes)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Wrong("label_names is not a list of texts")
    if num_classes and len(names) != num_classes:
        raise _Wrong(f"it has {len(names):,} label_names and num_classes = {num_classes:,}")
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return tuple(f"{name} ({index})" if name in twice else name for index, name in enumerate(names))


def _preprocessing(values: Mapping[str, Any], in_chans: int | None, img_size: Any) -> Preprocessing:
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
                raise _Wrong(f"{key} is not a list of numbers")
            given[key] = numbers * channels if len(numbers) == 1 else numbers
        if type(given.get("crop_pct", 1.0)) not in (int, float):
            raise _Wrong("crop_pct is not a number")
        given["crop_pct"] = min(given.get("crop_pct", defaults.crop_pct), 1.0)  # as for timm's own models
        if len(given["mean"]) == len(given["std"]) != channels and in_chans == channels:
            # Files of timm before 1.0.20 keep the mean of the colours beside another number of channels.
            channels = len(given["mean"])
        known = Preprocessing(**{"interpolation": "bicubic", **given, "input_size": (channels, *size)}).resolved()
        return known.for_channels(in_chans or channels)
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


# ---- what a task's files say of its backbone


def stored_arguments(backbone: Any, built: Backbone, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a task's files store for its backbone, where they differ from those that were given.

    A backbone from an address is stored by the commit or the whole path, with a description of what was there, so that
    it can be built again when nothing is left there.

    Args:
        backbone: the argument as it was given.
        built: what was built from it.
        options: the argument `backbone_options` as it was given.
    """
    if not isinstance(backbone, str):
        return {}
    changed: dict[str, Any] = {}
    if built.description:
        changed = {"backbone": built.name, "backbone_options": {**options, **built.description}}
    if isinstance(options.get("weights"), (str, os.PathLike)):
        path = os.path.abspath(os.path.expanduser(options["weights"]))
        changed["backbone_options"] = {**changed.get("backbone_options", options), "weights": path}
    return changed


def check_stored_backbone(name: Any, options: Any) -> None:
    """Make sure that building a backbone for a file's own weights neither reads another file nor asks the network.

    Args:
        name: as the file has it; a module that was given instead is not looked at.
        options: the builder's arguments, as the file has them.

    Raises:
        IntegrityError: it would, or the arguments are not plain.
        UnknownNameError: no backbone has this name.
    """
    if not isinstance(name, str):
        return
    if not isinstance(options, Mapping):
        raise IntegrityError(f"backbone_options is {type(options).__name__}, not a table of arguments")
    entry = BACKBONES.entry(name)
    if entry.metadata.get("provider") == "user":
        return  # what its arguments mean is known to its own function alone
    # `weights` is used only when weights are fetched, and here they are not.
    rest = {key: value for key, value in options.items() if key not in ("architecture", "model_args", "weights")}
    scales = rest.pop("out_indices", None)  # of maps; a list of whole numbers cannot ask for more than the model has
    if scales is not None and not (isinstance(scales, list) and all(type(index) is int for index in scales)):
        raise IntegrityError("the arguments of its backbone were refused: out_indices is not a list of whole numbers")
    try:
        check_model_args(rest)
        check_model_args(options.get("model_args") or {})
    except UsageError as error:
        raise IntegrityError(f"the arguments of its backbone were refused: {error.what}") from error
    if is_address(entry.name):
        held = options.get("architecture")
        if not isinstance(held, str) or is_address(BACKBONES.entry(held).name):
            raise IntegrityError(
                f"its backbone {name[:200]!r} is an address, and the file does not describe the model that was there"
            )
