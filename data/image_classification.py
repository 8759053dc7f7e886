"""`ImageClassificationData`: folders of images as the data of a run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.preprocessing import Preprocessing, ValueRange, as_value_range
from flashtask.data.arguments import (
    PathLike,
    check_folders,
    check_numbers,
    check_split,
    one_augment,
    read_preprocessing,
)
from flashtask.data.checks import BadImage, check_policy, describe, find_leaks, look_at_images, refuse_bad
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import FirstSteps
from flashtask.data.folders import ImageSet, list_class_folders, list_images, match_classes
from flashtask.data.layout import DEFAULT_VAL_SPLIT, resolve_layout
from flashtask.data.loaders import image_loader
from flashtask.data.splits import stratified_split
from flashtask.data.transforms import eval_transform, first_steps, train_transform
from flashtask.data.value_range import Bounds, about_range, joined_bounds, range_of_bounds, unknown_range
from flashtask.trainer.datamodule import DataModule

__all__ = ["ImageClassificationData"]

_PARTS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageClassificationData(DataModule):
    """Images with one label each, made by `from_folders` or `from_root`.

    Labels are known from the listing, before any image is read. `setup` reads every image of the stage once
    until it changes, and names all bad ones; validation, test and prediction images see the backbone's own
    preprocessing, whatever training does.

    Args:
        parts: the images of `train`, `val`, `test` and `predict`, those there are.
        arguments: the arguments of `from_folders`, for the recipe.
    """

    #: What a recipe may call.
    constructors = ("from_folders",)

    def __init__(self, parts: Mapping[str, ImageSet], arguments: Mapping[str, Any]) -> None:
        self._parts = dict(parts)
        self._arguments = dict(arguments)
        self.batch_size: int = arguments["batch_size"]
        self.num_workers: int | None = arguments["num_workers"]
        #: The user's own preprocessing: what it gives wins over that of any model. None leaves all to the model.
        self.preprocessing: Preprocessing | None = None
        self._of_model: Preprocessing | None = None
        #: Labels that a part has no folder for, by part.
        self.missing_classes: dict[str, tuple[str, ...]] = {}
        #: Images that `on_bad_image="skip"` left out.
        self.skipped: tuple[BadImage, ...] = ()
        #: Files whose content is also in the training part: (the file, the training file).
        self.leaks: tuple[tuple[str, str], ...] = ()
        self._checked: set[str] = set()
        # Of the images with more than 8 bits a channel: the bounds of each, by part and path.
        self._wide: dict[str, dict[str, Bounds]] = {}
        self._said_of_range = ""
        self._cache = DecodedCache()
        self._datasets: dict[str, ImageFileDataset] = {}
        self._manifest: tuple[str, ...] = ()
        self._labels: tuple[str, ...] = ()
        self._against = "the model"
        if arguments["val_split"] is not None:
            self._split(arguments["val_split"], arguments["split_seed"])
        if "train" in self._parts:
            self._match(self._parts["train"].classes, "train_folder")
        elif named := {name for part in ("val", "test") if part in self._parts for name in self._parts[part].classes}:
            self._match(tuple(sorted(named)), "val_folder and test_folder")

    @classmethod
    @named_arguments
    def from_folders(
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        *,
        batch_size: int = 32,
        val_split: float | int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        augment: str | Callable[[Any], Any] = "auto",
        transform: Callable[[Any], Any] | None = None,
        on_bad_image: str = "error",
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        value_range: Sequence[float] | str | None = None,
    ) -> ImageClassificationData:
        """Take class folders: `train_folder/cat/1.jpg` is an image of a cat.

        Args:
            train_folder: defines the classes, sorted by name as text.
            val_folder: matched to the classes by name; a class may be missing, none may be added.
            test_folder: as `val_folder`.
            predict_folder: images without classes, at any depth.
            batch_size: images a step, at least 1.
            val_split: the part of `train_folder` to validate on: a share in (0, 1) or a number of images,
                stratified.
            split_seed: the split's own seed.
            num_workers: processes that load images; None decides by itself (none unless processes are
                forked).
            augment: one of flashtask.data.transforms.AUGMENTATIONS, or a callable on PIL images; training
                only.
            transform: another name for `augment` with a callable.
            on_bad_image: `error` refuses the data, naming every bad image; `skip` leaves them out and says
                so.
            preprocessing: size, mean, std and crop in place of the model's; also the attribute `preprocessing`.
            value_range: (low, high), the values of images with more than 8 bits a channel (16-bit and
                floating-point files, `.npy` arrays) that are black and white; None finds the least and the
                greatest value over the training images. More in `Preprocessing`.

        Raises:
            UsageError: a value that cannot be meant, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: folders that are no class folders, or class names that do not match.
        """
        check_numbers(batch_size=batch_size, num_workers=num_workers, split_seed=split_seed)
        check_policy(on_bad_image)
        augment = one_augment(augment, transform)
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        check_split(val_split, given)
        folders = check_folders(given)
        parts = {part: _list_part(part, folder) for part, folder in folders.items()}
        arguments = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        options: dict[str, Any] = {"batch_size": batch_size, "val_split": val_split, "split_seed": split_seed}
        options |= {"num_workers": num_workers, "augment": augment, "on_bad_image": on_bad_image}
        ends = as_value_range(value_range)
        options["value_range"] = list(ends) if isinstance(ends, tuple) else ends
        made = cls(parts, {**arguments, **options})
        made.preprocessing = read_preprocessing(preprocessing)
        return made

    @classmethod
    def from_root(
        cls, root: PathLike, *, val_split: float | int | None = None, **options: Any
    ) -> ImageClassificationData:
        """Take one folder: of `train/` (and `val/`, `test/`, `predict/`), or of class folders.

        Without validation images of its own, `val_split` (0.2 unless given) of the training images validate.

        Args:
            root: the folder.
            val_split: as in `from_folders`.
            options: as in `from_folders`.
        """
        layout = resolve_layout(root)
        if val_split is None and layout.val is None:
            val_split = DEFAULT_VAL_SPLIT
        return cls.from_folders(layout.train, layout.val, layout.test, layout.predict, val_split=val_split, **options)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names; a position is a class index. Empty if there are only images to predict."""
        return self._labels

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self._labels)

    def set_labels(self, labels: Sequence[str]) -> None:
        """Take the classes of a model that is already trained: folders are matched to them by name.

        Raises:
            UsageError: labels that are not different strings.
            BadDataError: a folder is named after none of them.
        """
        if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
            raise UsageError(f"labels must be a list of names, not {labels!r}")
        if len(set(labels)) != len(labels):
            raise UsageError(f"labels has a name twice: {sorted(n for n in labels if labels.count(n) > 1)[0]!r}")
        self._match(tuple(labels), "the model")

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Take the preprocessing of the model that the data is connected to now; what the user gave still wins.

        Raises:
            UsageError: the user's own is for another number of channels.
        """
        before, self._of_model = self._of_model, preprocessing
        if preprocessing != before:
            # Those that were made for another model are made again.
            self._datasets = {part: self._dataset(part) for part in self._datasets}

    @property
    def used_preprocessing(self) -> Preprocessing:
        """What is used: the user's own fields, the others of the model, and after `setup` the range of the values.

        Raises:
            UsageError: the user's own is for another number of channels, or gives another range than `value_range`.
        """
        # A module that names no preprocessing gets the defaults: 224 x 224, ImageNet's mean and deviation.
        known = (self._of_model or Preprocessing()).resolved()
        if self.preprocessing is not None:
            known = self.preprocessing.filled_from(known)
        own = self._own_range()
        return known if own is None else replace(known, value_range=own)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class, by part of the data, without those that were left out."""
        found = {part: Counter(images.names) for part, images in self._parts.items() if part != "predict"}
        return {part: {label: count[label] for label in self._labels} for part, count in found.items()}

    @property
    def augments_while_frozen(self) -> bool:
        """Whether `augment` is anything but `auto` and `none`."""
        return self._arguments["augment"] not in ("auto", "none")

    def split_manifest(self) -> tuple[str, ...]:
        """The images that `val_split` chose, relative to the training folder; empty without a split."""
        return self._manifest

    def state_dict(self) -> dict[str, Any]:
        """Which files the run trains and validates on, as a digest, and the split; a resume compares them."""
        manifest = np.frombuffer(json.dumps(self._manifest).encode(), dtype=np.uint8)
        return {"labels": list(self._labels), "files": self._digest(), "split": manifest.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with what the run was started on.

        Raises:
            BadDataError: files or labels are other ones.
        """
        if tuple(state["labels"]) != self._labels or state["files"] != self._digest():
            raise BadDataError(
                "the images are not those that the run was started on",
                why="a resumed run sees the same samples in the same order; files or classes were added or removed",
                fix="start a new run, or put the folders back as they were",
            )

    def _digest(self) -> dict[str, str]:
        return {
            part: hashlib.sha256("\0".join(self._parts[part].relative_paths()).encode()).hexdigest()
            for part in ("train", "val")
            if part in self._parts
        }

    def recipe(self) -> dict[str, Any]:
        """The call that makes this data again, as a recipe holds it: absolute paths, plain values.

        A transform of the user's own is `{"not_saved": "<its class>"}`.
        """
        arguments = {**self._arguments, "batch_size": self.batch_size, "num_workers": self.num_workers}
        if not isinstance(arguments["augment"], str):
            arguments["augment"] = {"not_saved": type(arguments["augment"]).__name__}
        if self.preprocessing is not None:
            arguments["preprocessing"] = self.preprocessing.to_dict()
        return {"from_folders": arguments}

    def setup(self, stage: str) -> None:
        """Read every image of the stage that was not read before, and make its datasets.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            BadDataError: images that cannot be read (with `on_bad_image="error"`), or a class that has none
                left.
            UsageError: an unknown stage.
        """
        if stage not in _PARTS_OF_STAGE:
            raise UsageError(f"no stage {stage!r}; there are: {', '.join(_PARTS_OF_STAGE)}")
        parts = [part for part in _PARTS_OF_STAGE[stage] if part in self._parts]
        self._check_in_turn([part for part in parts if part not in self._checked])
        self._settle_range(parts)
        for part in parts:
            self._datasets[part] = self._dataset(part)

    def train_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, labels), shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, labels), in the order of the listing."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, labels), in the order of the listing."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | None:
        """Batches of images, in the order of the listing."""
        return self._loader("predict")

    def _split(self, share: float | int, seed: int) -> None:
        whole = self._parts["train"]
        names = whole.relative_paths()
        train, val = stratified_split(names, whole.names, share, seed)
        self._parts |= {"train": whole.subset(train), "val": whole.subset(val)}
        self._manifest = tuple(names[i] for i in val)

    def _match(self, labels: tuple[str, ...], against: str) -> None:
        for part in ("train", "val", "test"):
            if part in self._parts:
                argument = f"{part}_folder"
                _, self.missing_classes[part] = match_classes(self._parts[part], labels, argument, against)
        self._labels, self._against = labels, against
        self._datasets.clear()

    def _check_in_turn(self, parts: list[str]) -> None:
        """Of the processes of a run, one on each machine reads all files; the others then find its notes."""
        strategy = None if self.trainer is None else self.trainer.strategy
        if strategy is None or not parts:
            self._check(parts)
            return
        if strategy.local_rank:
            strategy.barrier("images are checked")
        self._check(parts)
        if not strategy.local_rank:
            strategy.barrier("images are checked")

    def _check(self, parts: list[str]) -> None:
        # What is decoded to be checked is kept: the first epoch has it already.
        steps = {part: self._first_steps(part) for part in parts}
        reads = {path: steps[part] for part in reversed(parts) for path in self._parts[part].paths}
        paths = [path for part in parts for path in self._parts[part].paths]
        # A training set is measured, whatever the model says: only the user knows better.
        known = self._own_range() if "train" in parts else self.used_preprocessing.value_range
        looked = look_at_images(paths, self._channels(), lambda path: self._cache.read(reads[path], path), known)
        if self._arguments["on_bad_image"] == "error":
            refuse_bad(looked.bad, len(paths))
        if looked.bad:
            self._leave_out(parts, looked.bad)
        for part in parts:
            self._wide[part] = {p: looked.bounds[p] for p in self._parts[part].paths if p in looked.bounds}
        for part in parts:
            self._say_ignored(part, self._parts[part].ignored)
        if "train" in parts and (inside := self._parts["train"].same_subfolders()):
            classes, folders = ", ".join(self._labels[:8]), ", ".join(inside[:8])
            self._say(f"warning: train_folder: every class has the same folders ({folders}); the classes are {classes}")
        for part in ("val", "test"):
            if part in parts and "train" in self._parts:
                self._report_leaks(part)
        self._checked.update(parts)

    def _leave_out(self, parts: list[str], bad: list[BadImage]) -> None:
        names = {image.path for image in bad}
        for part in parts:
            images = self._parts[part]
            kept = images.subset(i for i, path in enumerate(images.paths) if path not in names)
            lost = sorted(set(images.names) - set(kept.names))
            if not kept or (part == "train" and lost):
                what = f"class {lost[0]!r}" if lost else f"the {part} part"
                raise BadDataError(f"no image of {what} can be read", why="\n    ".join(describe(bad)))
            self._parts[part] = kept
        self.skipped += tuple(bad)
        self._say(f"left out {len(bad)} image(s) that cannot be read: {'; '.join(describe(bad))}")

    def _report_leaks(self, part: str) -> None:
        found = find_leaks(self._parts["train"].paths, self._parts[part].paths)
        if found:
            self.leaks += tuple(found)
            pairs = "; ".join(f"{ours!r} is {theirs!r}" for ours, theirs in found[:3])
            self._say(f"warning: {len(found)} {part} image(s) are also training images: {pairs}")

    def _say_ignored(self, part: str, files: Sequence[str]) -> None:
        if files:
            names = ", ".join(repr(os.path.basename(file)) for file in files[:3]) + (", ..." if len(files) > 3 else "")
            what = f"{len(files)} file(s) that are no images by their extension are not used"
            self._say(f"{part}_folder: {what}: {names}")

    def _say(self, line: str) -> None:
        # On stderr: stdout may be read by a program. Only the first process of several speaks.
        if self.trainer is not None:
            self.trainer.say(line)
        elif os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)

    def _settle_range(self, parts: Sequence[str]) -> None:
        """Find the range of values over the training images, unless it is known, and say which it is."""
        wide = self._wide.get("train", {}) if "train" in parts else {}
        if wide and self._own_range() is None:
            found = joined_bounds(wide.values())
            known = self.used_preprocessing.value_range
            used = known if isinstance(known, tuple) else range_of_bounds(found, next(iter(wide)))
            self._of_model = replace((self._of_model or Preprocessing()).resolved(), value_range=used)
            said = about_range(found, used, len(wide), len(self._parts["train"]))
            if said != self._said_of_range:
                self._say(said)
                self._said_of_range = said
        of_all = {path: bounds for part in parts for path, bounds in self._wide.get(part, {}).items()}
        if of_all and self.used_preprocessing.value_range is None:
            path = next(iter(of_all))
            raise unknown_range(f"the image {path!r}", of_all[path])

    def _own_range(self) -> ValueRange | None:
        """The value range that the user gave.

        Raises:
            UsageError: two that differ.
        """
        given = as_value_range(self._arguments.get("value_range"))
        own = None if self.preprocessing is None else self.preprocessing.value_range
        if given is not None and own is not None and given != own:
            raise UsageError(f"value_range={given} and preprocessing.value_range={own} differ", fix="give one of them")
        return own if given is None else given

    def _channels(self) -> int:
        return self.used_preprocessing.input_size[0]

    def _dataset(self, part: str) -> ImageFileDataset:
        preprocessing = self.used_preprocessing
        images = self._parts[part]
        targets = None
        if part != "predict":
            targets, _ = match_classes(images, self._labels, f"{part}_folder", self._against)
        if part == "train":
            augmentation = train_transform(preprocessing, self._arguments["augment"])
            return ImageFileDataset(images.paths, targets, augmentation, self._channels(), self._cache)
        return ImageFileDataset(images.paths, targets, eval_transform(preprocessing), self._channels(), self._cache)

    def _first_steps(self, part: str) -> FirstSteps:
        """What most likely happens to an image of a part first; it is where the module is frozen that is not known."""
        preprocessing = self.used_preprocessing
        if part != "train":
            return eval_transform(preprocessing).first
        return first_steps(train_transform(preprocessing, self._arguments["augment"]).frozen, self._channels())

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any] | None:
        if part not in self._parts:
            return None
        if part not in self._datasets:
            stage = next(stage for stage, parts in _PARTS_OF_STAGE.items() if part in parts)
            raise UsageError(f"the {part} data is not set up", fix=f'data.setup("{stage}")')
        return image_loader(self._datasets[part], self.batch_size, self.num_workers, shuffle=shuffle)


def _list_part(part: str, folder: Path) -> ImageSet:
    argument = f"{part}_folder"
    if part == "predict":
        return list_images(folder, argument)
    return list_class_folders(folder, argument, min_classes=2 if part == "train" else 1)
