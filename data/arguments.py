"""The options that every constructor of image data has, and what is refused before any data is read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from flashtask.core.errors import UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.number_checks import is_whole
from flashtask.core.preprocessing import Preprocessing, as_value_range
from flashtask.data.checks import check_policy
from flashtask.data.groups import compiled_pattern
from flashtask.data.layout import existing_folder
from flashtask.data.samplers import SamplerLike, check_sampler
from flashtask.data.splits import Fold, check_share, read_fold
from flashtask.data.transforms import AugmentLike, check_augment

__all__ = [
    "ImageOptions",
    "MaskOptions",
    "PathLike",
    "TargetOptions",
    "check_files",
    "check_folders",
    "check_numbers",
    "check_split",
    "checked_options",
    "one_augment",
    "read_preprocessing",
    "takes",
]

PathLike = str | os.PathLike[str]

F = TypeVar("F", bound=Callable[..., Any])


class ImageOptions(TypedDict, total=False):
    """Options of every constructor.

    Args:
        batch_size: images a step, at least 1.
        val_split: the part of the training images to validate on: a share in (0, 1) or a number of images,
            stratified; 0 for none.
        fold: which fold validates, in place of `val_split`: `(2, 5)` or `"2/5"` is the second of five. Over the folds
            each training image validates once; the single image of a class always trains.
        group_pattern: a regular expression, searched in the relative path of each image; images with the same first
            group are never split between training and validation. "" says that there are no groups.
        split_seed: the split's own seed.
        num_workers: processes that load images; None decides by itself (none unless processes are
            forked).
        augment: one of flashtask.data.transforms.AUGMENTATIONS; a list of transforms of torchvision by name
            (`[{"RandomRotation": {"degrees": 10}}, "RandomGrayscale"]`); or a callable on PIL images; training
            only.
        transform: another name for `augment` with a callable.
        flip: `none`, `horizontal`, `vertical` or `both`: how a named augmentation mirrors images; None means
            `horizontal`, and warns of class names such as left and right.
        random_erasing: probability that a part of a training image is erased; None means that of `augment`.
        sampler: `balanced` draws every class equally often; `weighted` draws by the numbers of `weight_field`; or
            a torch sampler. All draw from (seed, epoch) in a fit. None means each sample once an epoch.
        on_bad_image: `error` refuses the data, naming every bad image; `skip` leaves them out and says
            so.
        preprocessing: size, mean, std and crop in place of the model's; also the attribute `preprocessing`.
        value_range: (low, high), the values of images with more than 8 bits a channel (16-bit and
            floating-point files, `.npy` arrays) that are black and white; None finds the least and the
            greatest value over the training images. More in `Preprocessing`.
    """

    batch_size: int
    val_split: float | int | None
    fold: Fold | None
    group_pattern: str | None
    split_seed: int
    num_workers: int | None
    augment: AugmentLike
    transform: Callable[[Any], Any] | None
    flip: str | None
    random_erasing: float | None
    sampler: SamplerLike | None
    on_bad_image: str
    preprocessing: Preprocessing | Mapping[str, Any] | None
    value_range: Sequence[float] | str | None


class TargetOptions(ImageOptions, total=False):
    """Options of constructors whose targets are not the names of folders.

    Args:
        label_separator: what separates several labels in one cell or text.
        target_format: how targets are written: `label`, `one_hot`, `multi_hot`, `list` (of labels), `separated`,
            `soft` (the share of each class),
            `number`; `auto` takes the only reading that is possible.
        labels: names of the classes, in the order of their numbers or of the columns of targets.
    """

    label_separator: str | None
    target_format: str
    labels: Sequence[str] | None


class MaskOptions(ImageOptions, total=False):
    """Options of constructors of images with masks.

    Args:
        labels: names of the classes, in the order of their numbers (or colours) in masks.
        ignore_index: the number in masks of pixels that do not count; masks of 0 and 255 alone have none.
    """

    labels: Sequence[str] | None
    ignore_index: int | None


class KeypointOptions(ImageOptions, total=False):
    """Options of constructors of images with keypoints.

    Args:
        flip_pairs: keypoints that change sides in a mirrored picture, by name or position, such as
            `[("left_eye", "right_eye")]`; none of the others does. Found by `left` and `right` in the names if not
            given.
    """

    flip_pairs: Sequence[tuple[str | int, str | int]] | None


_DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "val_split": None,
    "fold": None,
    "group_pattern": None,
    "split_seed": 0,
    "num_workers": None,
    "augment": "auto",
    "transform": None,
    "flip": None,
    "random_erasing": None,
    "sampler": None,
    "on_bad_image": "error",
    "preprocessing": None,
    "value_range": None,
    "label_separator": None,
    "target_format": "auto",
    "labels": None,
    "ignore_index": 255,
    "flip_pairs": None,
}


def takes(options: type) -> Callable[[F], F]:
    """Give a constructor with `**options: Unpack[...]` the signature, the documentation and the checks of its options.

    Args:
        options: `ImageOptions`, or one that adds to it.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=kind)
            for name, kind in options.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        before, raises, after = inspect.cleandoc(function.__doc__ or "").partition("\n\nRaises:")
        words = [inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2] for base in _bases(options)]
        function.__doc__ = "\n".join([before, *words]) + raises + after
        return named_arguments(function)

    return decorate


def _bases(options: type) -> list[type]:
    """The groups of options, the more special ones first; a TypedDict does not keep its bases as classes."""
    return [ImageOptions] if options is ImageOptions else [options, ImageOptions]


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `ImageOptions` with their defaults, as a recipe holds them.

    Raises:
        UsageError: an invalid value.
    """
    given = {**_DEFAULTS, **options}
    check_numbers(**{name: given[name] for name in ("batch_size", "num_workers", "split_seed")})
    check_policy(given["on_bad_image"])
    check_sampler(given["sampler"])
    if given["group_pattern"]:
        compiled_pattern(given["group_pattern"])
    kept = {name: given[name] for name in ("batch_size", "val_split", "split_seed", "num_workers")}
    kept |= {
        "fold": None if given["fold"] is None else "{}/{}".format(*read_fold(given["fold"])),
        "group_pattern": given["group_pattern"],
    }
    kept |= {name: given[name] for name in ("flip", "random_erasing", "sampler")}
    ends = as_value_range(given["value_range"])
    return kept | {
        "augment": one_augment(*(given[name] for name in ("augment", "transform", "flip", "random_erasing"))),
        "on_bad_image": given["on_bad_image"],
        "value_range": list(ends) if isinstance(ends, tuple) else ends,
    }


def check_numbers(*, batch_size: object, num_workers: object, split_seed: object) -> None:
    """Refuse numbers that are not whole or too small; `num_workers` may be None.

    Raises:
        UsageError: naming the first that is wrong.
    """
    rules = [("batch_size", batch_size, 1, 32), ("split_seed", split_seed, 0, 0)]
    if num_workers is not None:
        rules.append(("num_workers", num_workers, 0, 0))
    for name, value, least, example in rules:
        if not is_whole(value, least):
            raise UsageError(
                f"{name} must be a whole number of at least {least}, not {value!r}", fix=f"{name}={example}"
            )


def one_augment(
    augment: AugmentLike,
    transform: Callable[[Any], Any] | None,
    flip: str | None = None,
    random_erasing: float | None = None,
) -> AugmentLike:
    """The one of `augment` and `transform` that says what training does to images.

    Raises:
        UsageError: both say it, or the one that does is neither a known name nor a callable.
    """
    check_augment(augment)
    if transform is not None:
        if augment != "auto":
            raise UsageError(
                "augment and transform both set the transform of training images", fix="leave one of them out"
            )
        if not callable(transform):
            raise UsageError(f"transform must be a callable that takes a PIL image, not {transform!r}")
        augment = transform
    check_augment(augment, flip, random_erasing)
    return augment


def read_preprocessing(given: Preprocessing | Mapping[str, Any] | None) -> Preprocessing | None:
    """A preprocessing as an object or, as a recipe holds it, by the names of its parts.

    Raises:
        UsageError: something else, or a part that there is not or that cannot have this value.
    """
    if given is None or isinstance(given, Preprocessing):
        return given
    example = "preprocessing: {input_size: [3, 160, 160]}"
    if not isinstance(given, Mapping):
        raise UsageError(f"preprocessing must be a mapping of its fields, not {given!r}", fix=example)
    try:
        return Preprocessing.from_dict({"decode": "scaled", **given})
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"preprocessing cannot be {dict(given)!r}", why=str(error), fix=example) from None


def check_split(options: Mapping[str, Any], given: Mapping[str, object], what: str = "folder") -> None:
    """Refuse a `val_split` that is not a share, a `fold` that there is not, or that there is nothing to split.

    Args:
        options: those of the constructor, of which `val_split` and `fold` count.
        given: the folders or files by part (`train`, `val`, ...), as the user gave them.
        what: `folder` or `file`.

    Raises:
        UsageError: it contradicts the folders.
    """
    val_split, fold = options.get("val_split"), options.get("fold")
    if val_split is not None and fold is not None:
        raise UsageError("val_split and fold both define the validation data", fix="leave one of them out")
    if val_split is not None:
        check_share(val_split)
    if fold is not None:
        read_fold(fold)
    if not val_split and fold is None:
        return
    name = "val_split" if fold is None else "fold"
    if given.get("val") is not None:
        raise UsageError(f"{name} and val_{what} both define the validation data", fix="leave one of them out")
    if given.get("train") is None:
        raise UsageError(f"{name} takes a part of train_{what}, but there is none", fix=f"train_{what}=...")


def check_folders(given: Mapping[str, PathLike | None]) -> dict[str, Path]:
    """The absolute paths of the folders that were given.

    Raises:
        MissingInputError: one does not exist.
        UsageError: there is none, or training and evaluation have the same.
    """
    folders = {p: existing_folder(path, f"{p}_folder") for p, path in given.items() if path is not None}
    if not folders:
        raise UsageError("from_folders needs a folder", fix='from_folders(train_folder="data/train")')
    for part in ("val", "test"):
        if "train" in folders and part in folders and folders["train"].samefile(folders[part]):
            raise UsageError(
                f"train_folder and {part}_folder are the same folder: {str(folders[part])!r}",
                why="a model would be judged on what it was trained on",
                fix="val_split=0.2 instead of val_folder" if part == "val" else "leave out test_folder",
            )
    return folders


def check_files(given: Mapping[str, Any], constructor: str, what: str, example: str) -> dict[str, Any]:
    """What was given of `train_<what>`, `val_<what>`, ..., by part.

    Args:
        given: by part.
        constructor: for messages.
        what: `file`, `files`, `data`.
        example: a value for `train_<what>`.

    Raises:
        UsageError: there is none, or training and evaluation have the same.
    """
    found = {part: one for part, one in given.items() if one is not None}
    if not found:
        noun = {"file": "a file", "files": "files", "data": "data"}.get(what, what)
        raise UsageError(f"{constructor} needs {noun}", fix=f"{constructor}(train_{what}={example})")
    for part in ("val", "test"):
        if "train" in found and part in found and _are_the_same(found["train"], found[part]):
            shown = f": {os.fspath(found[part])!r}" if isinstance(found[part], (str, os.PathLike)) else ""
            raise UsageError(
                f"train_{what} and {part}_{what} are the same {what}{shown}",
                why="a model would be judged on what it was trained on",
                fix=f"val_split=0.2 instead of val_{what}" if part == "val" else f"leave out test_{what}",
            )
    return found


def _are_the_same(one: Any, two: Any) -> bool:
    if isinstance(one, (str, os.PathLike)) and isinstance(two, (str, os.PathLike)):
        return os.path.realpath(one) == os.path.realpath(two)
    return one is two
