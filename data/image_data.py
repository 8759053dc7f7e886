"""`ImageData`: images with targets, from folders or from tables, as the data of a run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from torch.utils.data import DataLoader

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.preprocessing import Preprocessing, ValueRange, as_value_range
from flashtask.core.seeding import SampleKey, permutation, sample_seeds
from flashtask.data.arguments import (
    PathLike,
    check_files,
    check_folders,
    check_numbers,
    check_split,
    one_augment,
    read_preprocessing,
)
from flashtask.data.audit import Examiner, audit_table
from flashtask.data.batch_picture import BatchPicture, check_shown, picture_of_samples
from flashtask.data.checks import BadImage, Looked, check_policy, describe, find_leaks, look_at_images, refuse_bad
from flashtask.data.copies import warnings_of_copies
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import FirstSteps
from flashtask.data.findings import Audit, read_ignored
from flashtask.data.folders import ImageSet, list_class_folders, list_images
from flashtask.data.images import bounds_of_file
from flashtask.data.layout import DEFAULT_VAL_SPLIT, is_table_name, part_in_name, resolve_layout, stage_folder
from flashtask.data.loaders import image_loader
from flashtask.data.samples import PARTS, Column, SampleTable, as_text
from flashtask.data.spatial import SpatialReader
from flashtask.data.splits import grouped_split, stratified_split
from flashtask.data.tables import Table
from flashtask.data.targets import LabelReader, LabelsReader, Source, TargetReader, number_or_nan
from flashtask.data.transforms import eval_transform, first_steps, train_transform
from flashtask.data.value_range import Bounds, about_range, joined_bounds, range_of_bounds, unknown_range
from flashtask.trainer.datamodule import DataModule

__all__ = ["ImageData"]

_PARTS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageData(DataModule):
    """Base of image data: a table of samples, and a reader that makes targets of what the table has.

    A kind of data is a subclass that names its `readers`. Targets are read when the data is made, before any image.
    `setup` reads every image of the stage once until it changes, and names all bad ones; validation, test and
    prediction images see the model's own preprocessing, whatever training does.

    Args:
        table: all samples.
        reader: of the targets. If there are training samples, it learns from them; else it knows already, or a model
            gives its own to `use_targets`.
        recipe: the constructor's name and its arguments, for the recipe.
        remarks: what to say of each part when it is set up.
    """

    #: What a recipe may call.
    constructors = ("from_folders", "from_csv")
    #: The kinds of targets that such data may have; the first is the one of folders.
    readers: ClassVar[tuple[type[TargetReader], ...]] = ()

    def __init__(
        self,
        table: SampleTable,
        reader: TargetReader,
        recipe: tuple[str, Mapping[str, Any]],
        remarks: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._constructor, arguments = recipe
        self._table = table
        self._arguments = dict(arguments)
        self._remarks = dict(remarks or {})
        self.batch_size: int = arguments["batch_size"]
        self.num_workers: int | None = arguments["num_workers"]
        #: The user's own preprocessing: what it gives wins over that of any model. None leaves all to the model.
        self.preprocessing: Preprocessing | None = None
        self._of_model: Preprocessing | None = None
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
        self._against = "the model"
        self._reader = reader
        if arguments["val_split"] is not None:
            self._split(arguments["val_split"], arguments["split_seed"])
        self._learn()

    def _learn(self) -> None:
        """Learn from the training samples what targets there are; without any, from all others that have targets."""
        parts = ["train"] if self._table.has("train") else [p for p in ("val", "test") if self._table.has(p)]
        if not parts or self._table.targets is None:
            return
        raw = np.concatenate([self._table.of(part).targets for part in parts])
        where = " and ".join(dict.fromkeys(self._argument(part) for part in parts))
        self._take_reader(self._reader.learned(raw, replace(self._source(parts[0]), argument=where)), where)

    # ---- constructors

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
    ) -> Self:
        """Take folders whose names are the targets: `train_folder/cat/1.jpg` is an image of a cat.

        Args:
            train_folder: defines the classes, sorted by name as text.
            val_folder: matched to the classes by name; a class may be missing, none may be added.
            test_folder: as `val_folder`.
            predict_folder: images without targets, at any depth.
            batch_size: images a step, at least 1.
            val_split: the part of the training images to validate on: a share in (0, 1) or a number of images,
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
            UsageError: an invalid value, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: folders that are not class folders, or class names that do not match.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        options = _checked_options(batch_size, val_split, split_seed, num_workers, augment, transform, on_bad_image)
        check_split(val_split, given, "folder")
        folders = check_folders(given)
        listed = {part: _list_part(part, folder) for part, folder in folders.items()}
        table = SampleTable.joined(
            [
                SampleTable.of_part(
                    part, images.paths, as_text(images.names) if images.names else None, root=images.root
                )
                for part, images in listed.items()
            ]
        )
        arguments = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        remarks = {part: list(_remarks(part, images)) for part, images in listed.items()}
        recipe = ("from_folders", {**arguments, **options, **_value_range(value_range)})
        made = cls(table, cls.readers[0](), recipe, remarks)
        made.preprocessing = read_preprocessing(preprocessing)
        return made

    @classmethod
    @named_arguments
    def from_csv(
        cls,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        train_file: PathLike | None = None,
        val_file: PathLike | None = None,
        test_file: PathLike | None = None,
        predict_file: PathLike | None = None,
        *,
        images_root: PathLike | None = None,
        split_field: str | None = None,
        group_field: str | None = None,
        weight_field: str | None = None,
        label_separator: str | None = None,
        batch_size: int = 32,
        val_split: float | int | None = None,
        split_seed: int = 0,
        num_workers: int | None = None,
        augment: str | Callable[[Any], Any] = "auto",
        transform: Callable[[Any], Any] | None = None,
        on_bad_image: str = "error",
        preprocessing: Preprocessing | Mapping[str, Any] | None = None,
        value_range: Sequence[float] | str | None = None,
    ) -> Self:
        """Take CSV or TSV files with a header: a row an image.

        Args:
            input_field: the column with the paths of the images; the only one that holds names of images if not given.
            target_fields: the column or columns with the targets; the only other column if not given.
            train_file: the table to train on.
            val_file: as `train_file`, to validate on; it has the same columns.
            test_file: as `val_file`.
            predict_file: images without targets.
            images_root: the folder that relative paths count from; that of each table if not given.
            split_field: a column of `train_file` that names the part of each row (train, val, test).
            group_field: a column of `train_file`; rows with the same value (a patient, a site) are never split
                between training and validation by `val_split`.
            weight_field: a column of `train_file` with numbers of 0 or more: how much each row counts in the training
                loss, as a share of their mean. Validation and test count all rows alike.
            label_separator: what separates several labels in one column.
            batch_size: as in `from_folders`, and so are all that follow.
            val_split: of the training rows.
            split_seed: the split's own seed.
            num_workers: processes that load images.
            augment: of training images.
            transform: another name for `augment` with a callable.
            on_bad_image: `error` or `skip`.
            preprocessing: in place of the model's.
            value_range: of images with more than 8 bits a channel.

        Raises:
            UsageError: an invalid value, or a column that is not there.
            MissingInputError: a file that is not there.
            BadDataError: a file that is not a table, or targets that cannot be read.
        """
        given = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        options = _checked_options(batch_size, val_split, split_seed, num_workers, augment, transform, on_bad_image)
        check_split(val_split, given, "file")
        files = {part: Table(file, f"{part}_file") for part, file in check_files(given).items()}
        first = files.get("train") or next(iter(files.values()))
        inputs = first.input_field(input_field)
        has_targets = set(files) != {"predict"}
        used = (inputs, split_field, group_field, weight_field)
        fields = first.target_fields(target_fields, used) if has_targets else ()
        columns = {"inputs": inputs, "split": split_field, "group": group_field, "weight": weight_field}
        tables = [_rows_of(part, table, fields, columns, images_root) for part, table in files.items()]
        arguments: dict[str, Any] = {f"{part}_file": str(table.path) for part, table in files.items()}
        arguments |= {"input_field": inputs, "target_fields": list(fields)}
        own = {"images_root": None if images_root is None else os.path.abspath(images_root)}
        own |= {"split_field": split_field, "group_field": group_field, "weight_field": weight_field}
        own |= {"label_separator": label_separator}
        arguments |= {name: value for name, value in own.items() if value is not None}
        reader = cls.reader_of_columns(fields, label_separator)
        made = cls(
            SampleTable.joined(tables), reader, ("from_csv", {**arguments, **options, **_value_range(value_range)})
        )
        made.preprocessing = read_preprocessing(preprocessing)
        return made

    @classmethod
    def reader_of_columns(cls, fields: tuple[str, ...], separator: str | None) -> TargetReader:
        """The reader for targets in these columns of a table.

        Raises:
            UsageError: such data cannot have them.
        """
        if separator is not None:
            raise UsageError(f"{cls.__name__} has no labels to separate", fix="leave out label_separator")
        return cls.readers[0](fields)

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Whether what a recipe describes is such data: `certain`, `possible` or `no`, and in words what was seen.

        Args:
            constructor: one of `constructors`.
            arguments: its arguments.
        """
        if constructor == "from_folders":
            is_labels = cls.readers[:1] == (LabelReader,)
            return ("certain", "class folders") if is_labels else ("no", "")
        if constructor != "from_csv":
            return "certain", constructor
        if arguments.get("label_separator"):
            return ("certain", "several labels in a column") if LabelsReader in cls.readers else ("no", "")
        argument = next(name for name in (f"{part}_file" for part in PARTS) if arguments.get(name))
        table = Table(arguments[argument], argument)
        used = (arguments.get(f"{name}_field") for name in ("split", "group", "weight"))
        inputs = table.input_field(arguments.get("input_field"))
        fields = table.target_fields(arguments.get("target_fields"), (inputs, *used))
        columns = table.columns(fields)
        raw = np.stack(columns, axis=1) if len(columns) > 1 else columns[0]
        readings = [reader.suits(raw) for reader in cls.readers]
        reading, seen = min(readings, key=lambda one: ("certain", "possible", "no").index(one[0]))
        named = f"column{'s' if len(fields) > 1 else ''} {', '.join(map(repr, fields))}"
        return reading, f"{seen} in the {named}"

    @classmethod
    def from_root(cls, root: PathLike, *, val_split: float | int | None = None, **options: Any) -> Self:
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

    @classmethod
    def for_evaluation(
        cls, source: PathLike, part: str, targets: Mapping[str, Any] | None = None, **options: Any
    ) -> Self:
        """What a trained model is measured on: a table with the columns that it was trained on, or a folder.

        Args:
            source: a CSV or TSV file; else a folder that holds one for the part, or the folder of the part itself.
            part: `val` or `test`.
            targets: of the model, as its reader describes them.
            options: of the constructor.
        """
        if not is_table_name(source):
            folders: dict[str, Any] = {f"{part}_folder": stage_folder(source, part)}
            return cls.from_folders(**folders, **options)
        known = targets or {}
        own: dict[str, Any] = {"target_fields": known.get("fields"), "label_separator": known.get("separator")}
        tables: dict[str, Any] = {f"{part}_file": source, **{name: value for name, value in own.items() if value}}
        return cls.from_csv(**{**tables, **options})

    # ---- targets

    @property
    def targets(self) -> dict[str, Any]:
        """How the targets are read, as plain values that a checkpoint keeps."""
        return self._reader.to_dict()

    def describe_targets(self) -> str:
        """What was understood of the targets, in words."""
        return self._reader.describe()

    def sizes(self) -> dict[str, int]:
        """How many samples each part has, without those that were left out."""
        return {part: len(self._table.of(part)) for part in PARTS if self._table.has(part)}

    def use_targets(self, targets: Mapping[str, Any]) -> None:
        """Read the targets as those were read that a model was trained on.

        Args:
            targets: as the property `targets` of that data gave them.

        Raises:
            BadDataError: targets that the model does not know.
            UsageError: targets of another kind.
        """
        kinds = {reader.kind: reader for reader in self.readers}
        if (kind := targets.get("kind")) not in kinds or type(self._reader) is not kinds[kind]:
            raise UsageError(
                f"the model was trained on targets of the kind {kind!r}, but this data has {self._reader.kind!r}"
            )
        stored = kinds[kind].from_dict(targets)
        self._take_reader(replace(stored, fields=self._reader.fields), "the model")

    def _take_reader(self, reader: TargetReader, against: str) -> None:
        self._reader, self._against = reader, against
        for part in ("train", "val", "test"):
            if self._table.has(part):
                self._read_targets(part)
        self._datasets.clear()

    def _read_targets(self, part: str) -> Any:
        raw = self._table.of(part).targets
        return None if raw is None else self._reader.read(raw, self._source(part))

    def _argument(self, part: str) -> str:
        """The argument that a part came from."""
        own = f"{part}_{'folder' if self._constructor == 'from_folders' else 'file'}"
        return own if own in self._arguments else own.replace(part, "train")

    def _source(self, part: str) -> Source:
        argument = self._argument(part)
        noun = "class folder(s)" if argument.endswith("folder") else "label(s)"
        return Source(argument, str(self._arguments.get(argument, "")), noun, self._against)

    # ---- preprocessing

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
        return {"targets": self.targets, "files": self._digest(), "split": manifest.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with what the run was started on.

        Raises:
            BadDataError: files or labels are other ones.
        """
        if not self._are_the_targets_of(state) or state["files"] != self._digest():
            raise BadDataError(
                "the images are not those that the run was started on",
                why="a resumed run sees the same samples in the same order; files or classes were added or removed",
                fix="start a new run, or put the folders back as they were",
            )

    def _digest(self) -> dict[str, str]:
        """For each part a digest of the names of its files, and of targets that the names do not tell."""
        found = {}
        for part in ("train", "val"):
            if self._table.has(part):
                table = self._table.of(part)
                told: list[str] = []
                if self._constructor != "from_folders" and table.targets is not None:
                    told += table.targets.ravel().tolist()
                if part == "train" and table.weights is not None:
                    told += map(str, table.weights.tolist())
                found[part] = hashlib.sha256("\0".join([*table.names(), *told]).encode()).hexdigest()
        return found

    def _are_the_targets_of(self, state: Mapping[str, Any]) -> bool:
        if "targets" not in state:  # written when labels were all that targets could be
            return tuple(state["labels"]) == getattr(self._reader, "labels", ())
        return bool(state["targets"] == self.targets)

    def recipe(self) -> dict[str, Any]:
        """The call that makes this data again, as a recipe holds it: absolute paths, plain values.

        A transform of the user's own is `{"not_saved": "<its class>"}`.
        """
        arguments = {**self._arguments, "batch_size": self.batch_size, "num_workers": self.num_workers}
        if not isinstance(arguments["augment"], str):
            arguments["augment"] = {"not_saved": type(arguments["augment"]).__name__}
        if self.preprocessing is not None:
            arguments["preprocessing"] = self.preprocessing.to_dict()
        return {self._constructor: arguments}

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
        parts = [part for part in _PARTS_OF_STAGE[stage] if self._table.has(part)]
        self._check_in_turn([part for part in parts if part not in self._checked])
        self._settle_range(parts)
        for part in parts:
            self._datasets[part] = self._dataset(part)

    def train_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), in the order of the listing."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), in the order of the listing."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | None:
        """Batches of images, in the order of the listing."""
        return self._loader("predict")

    def _split(self, share: float | int, seed: int) -> None:
        rows = np.flatnonzero(self._table.parts == PARTS.index("train"))
        whole = self._table.at(rows)
        names = whole.names()
        strata = self._reader.strata(whole.targets) if whole.targets is not None else [""] * len(rows)
        if whole.groups is not None:
            val = grouped_split(whole.groups.tolist(), share, seed)
        else:
            _, val = stratified_split(names, strata, share, seed)
        self._table = self._table.with_part(rows[val], "val")
        self._manifest = tuple(names[i] for i in val)

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

    def audit(self, model: Examiner | None = None, *, ignore: PathLike | Sequence[str] = ()) -> Audit:
        """Look for what is suspicious: unreadable files, copies, wrong labels, odd pictures. Nothing is changed.

        Args:
            model: a task such as `ImageEmbedder("efficientnet_lite0")`, which also finds suspected label errors and
                neighbours in its features; None looks only at files, pictures and the table.
            ignore: an ignore file, or its lines: findings that were looked at and are left out.

        Raises:
            MissingInputError, BadDataError, UsageError: an ignore file that cannot be used.
        """
        looked = look_at_images(self._table.inputs.tolist(), self._channels(), value_range=self._own_range())
        ignored = read_ignored(ignore) if isinstance(ignore, (str, os.PathLike)) else list(ignore)
        return audit_table(self._table, looked, self._reader, self._comparable_targets(), model, ignored)

    def _comparable_targets(self) -> Column | None:
        """The targets of all samples as a model takes them, -1 where there is none; None if they are in the image."""
        if self._table.targets is None or self.has_spatial_targets:
            return None
        found: Column | None = None
        for part in PARTS[:3]:
            if self._table.has(part):
                values = np.asarray(self._read_targets(part))
                if found is None:
                    found = np.full((len(self._table), *values.shape[1:]), -1, dtype=values.dtype)
                found[self._table.parts == PARTS.index(part)] = values
        return found

    def show_batch(
        self,
        part: str = "train",
        *,
        num_samples: int = 12,
        epoch: int = 0,
        seed: int = 0,
        output: PathLike | None = None,
    ) -> BatchPicture:
        """Draw samples as a model gets them, after augmentation, with their targets.

        Args:
            part: train, val, test or predict.
            num_samples: how many, at least 1. Of training they are the first of an epoch, else the first of the part.
            epoch: whose order and augmentation is drawn, from 0, as if the backbone trained in it.
            seed: of the run.
            output: the name of an image file, which is written too.

        Returns:
            A picture that a notebook shows; its `image` is a PIL image.

        Raises:
            UsageError: there is no such part, or an invalid number or name of a file.
            BadDataError: an image cannot be read.
        """
        check_shown(part, self._table, num_samples=num_samples, epoch=epoch, seed=seed)
        paths = self._table.of(part).inputs.tolist()
        order = permutation(len(paths), seed, epoch) if part == "train" else np.arange(len(paths))
        rows = order[:num_samples]
        if self.used_preprocessing.value_range is None and any(bounds_of_file(paths[row]) for row in rows):
            self.setup(next(stage for stage, parts in _PARTS_OF_STAGE.items() if part in parts))
        dataset = self._datasets.get(part) or self._dataset(part)
        seeds = sample_seeds(rows, seed, epoch).tolist()
        keys = [SampleKey(row, epoch, own) for row, own in zip(rows.tolist(), seeds, strict=True)]
        size = "x".join(map(str, self.used_preprocessing.input_size[:0:-1]))
        augment = self._arguments["augment"] if part == "train" else "none"
        how = augment if isinstance(augment, str) else type(augment).__name__
        title = f"{part}: {len(rows)} of {len(paths):,}, {size} pixels, augment {how}"
        made = picture_of_samples(dataset, keys, self._reader, self.used_preprocessing, title)
        if output is not None:
            made.save(output)
        return made

    def _check(self, parts: list[str]) -> None:
        # What is decoded to be checked is kept: the first epoch has it already.
        steps = {part: self._first_steps(part) for part in parts}
        inputs = {part: self._table.of(part).inputs.tolist() for part in parts}
        reads = {path: steps[part] for part in reversed(parts) for path in inputs[part]}
        paths = [path for part in parts for path in inputs[part]]
        # A training set is measured, whatever the model says: only the user knows better.
        known = self._own_range() if "train" in parts else self.used_preprocessing.value_range
        looked = look_at_images(
            paths, self._channels(), lambda path, seen: self._cache.read(reads[path], path, seen), known
        )
        if self._arguments["on_bad_image"] == "error":
            refuse_bad(looked.bad, len(paths))
        if looked.bad:
            self._leave_out(parts, looked.bad)
        for part in parts:
            self._wide[part] = {path: looked.bounds[path] for path in inputs[part] if path in looked.bounds}
        for part in parts:
            for line in self._remarks.get(part, ()):
                self._say(line)
        for part in ("val", "test"):
            if part in parts and self._table.has("train"):
                self._report_leaks(part)
        self._report_copies(parts, looked)
        self._checked.update(parts)

    def _leave_out(self, parts: list[str], bad: list[BadImage]) -> None:
        names = {image.path for image in bad}
        before = {part: self._table.of(part) for part in parts}
        of_parts = np.isin(self._table.parts, [PARTS.index(part) for part in parts])
        is_bad = np.fromiter((path in names for path in self._table.inputs), dtype=bool, count=len(self._table))
        self._table = self._table.at(~(is_bad & of_parts))
        for part in parts:
            lost = self._lost_targets(before[part], self._table.of(part)) if part == "train" else ""
            if lost or not self._table.has(part):
                what = lost or f"the {part} part"
                raise BadDataError(f"no image of {what} can be read", why="\n    ".join(describe(bad)))
        self.skipped += tuple(bad)
        self._say(f"left out {len(bad)} image(s) that cannot be read: {'; '.join(describe(bad, 20))}")

    def _lost_targets(self, before: SampleTable, after: SampleTable) -> str:
        """Which targets no training sample has any more, now that some are left out; empty if a model needs none."""
        return ""

    def _report_leaks(self, part: str) -> None:
        found = find_leaks(self._table.of("train").inputs.tolist(), self._table.of(part).inputs.tolist())
        if found:
            self.leaks += tuple(found)
            pairs = "; ".join(f"{ours!r} is {theirs!r}" for ours, theirs in found[:3])
            self._say(f"warning: {len(found)} {part} image(s) are also training images: {pairs}")

    def _report_copies(self, parts: list[str], looked: Looked) -> None:
        """Warn of pictures in two parts that are not equal files, and of those with two targets."""
        is_looked_at = np.isin(self._table.parts, [PARTS.index(part) for part in parts])
        values = self._comparable_targets()
        own = None if values is None else values[is_looked_at]
        for line in warnings_of_copies(self._table.at(is_looked_at), looked.fingerprints, own, self.leaks):
            self._say(line)

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
            said = about_range(found, used, len(wide), int((self._table.parts == PARTS.index("train")).sum()))
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
        inputs = self._table.of(part).inputs
        targets = None if part == "predict" else self._read_targets(part)
        is_training = part == "train"
        transform = (
            train_transform(preprocessing, self._arguments["augment"]) if is_training else eval_transform(preprocessing)
        )
        spatial = self._reader if isinstance(self._reader, SpatialReader) else None
        weights = self._weights() if is_training else None
        return ImageFileDataset(
            inputs, targets, transform, self._channels(), self._cache, spatial=spatial, weights=weights
        )

    def _weights(self) -> Any:
        """Of the training samples, 1 on average; None if all count alike.

        Raises:
            BadDataError: all are 0.
        """
        weights = self._table.of("train").weights
        if weights is None:
            return None
        if not (mean := float(weights.mean(dtype=np.float64))):
            raise BadDataError("the weights of all training samples are 0")
        return (weights / mean).astype(np.float32)

    @property
    def has_spatial_targets(self) -> bool:
        """Whether targets are places in the image, which move with it."""
        return isinstance(self._reader, SpatialReader)

    def _first_steps(self, part: str) -> FirstSteps:
        """What most likely happens to an image of a part first; it is where the module is frozen that is not known."""
        preprocessing = self.used_preprocessing
        if part != "train":
            return eval_transform(preprocessing).first
        return first_steps(train_transform(preprocessing, self._arguments["augment"]).frozen, self._channels())

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any] | None:
        if not self._table.has(part):
            return None
        if part not in self._datasets:
            stage = next(stage for stage, parts in _PARTS_OF_STAGE.items() if part in parts)
            raise UsageError(f"the {part} data is not set up", fix=f'data.setup("{stage}")')
        return image_loader(self._datasets[part], self.batch_size, self.num_workers, shuffle=shuffle)


def _rows_of(
    part: str,
    table: Table,
    fields: tuple[str, ...],
    columns: Mapping[str, str | None],
    images_root: PathLike | None,
) -> SampleTable:
    """The samples of one file; with a column for the part, those of several parts."""
    inputs, split, group, weight = (columns[name] for name in ("inputs", "split", "group", "weight"))
    own_fields = fields if part != "predict" else ()
    extra = [name for name in (split, group, weight) if name is not None] if part == "train" else []
    assert inputs is not None
    paths, *others = table.columns([inputs, *own_fields, *extra])
    root = Path(images_root).expanduser().absolute() if images_root is not None else table.path.parent
    targets = np.stack(others[: len(own_fields)], axis=1) if len(own_fields) > 1 else others[0] if own_fields else None
    found = dict(zip(extra, others[len(own_fields) :], strict=True))
    made = SampleTable.of_part(
        part,
        (os.path.normpath(root / path) for path in paths),
        targets,
        groups=found.get(group) if group else None,
        root=root,
        weights=_weights_in(found[weight], weight, table) if weight in found else None,
    )
    if split not in found:
        return made
    for name in set(found[split].tolist()):
        if (meant := part_in_name(name)) is None:
            raise BadDataError(
                f"{table.argument} {str(table.path)!r}: column {split!r} has {name!r}, which is not a part of the data",
                why="the parts are train, val and test",
            )
        made = made.with_part(np.flatnonzero(found[split] == name), meant)
    return made


def _weights_in(column: Column, field: str, table: Table) -> Column:
    """The numbers of a column of weights, float32.

    Raises:
        BadDataError: one is not a number of 0 or more.
    """
    weights = np.array([number_or_nan(cell) for cell in column], dtype=np.float32)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise BadDataError(
            f"{table.argument} {str(table.path)!r}: sample {bad[0] + 1} has the weight {str(column[bad[0]])!r} in "
            f"column {field!r}",
            why="a weight is a number of 0 or more",
        )
    return weights


def _checked_options(
    batch_size: int,
    val_split: float | int | None,
    split_seed: int,
    num_workers: int | None,
    augment: str | Callable[[Any], Any],
    transform: Callable[[Any], Any] | None,
    on_bad_image: str,
) -> dict[str, Any]:
    """The options that every constructor has, as a recipe holds them."""
    check_numbers(batch_size=batch_size, num_workers=num_workers, split_seed=split_seed)
    check_policy(on_bad_image)
    options: dict[str, Any] = {"batch_size": batch_size, "val_split": val_split, "split_seed": split_seed}
    return options | {
        "num_workers": num_workers,
        "augment": one_augment(augment, transform),
        "on_bad_image": on_bad_image,
    }


def _value_range(value_range: Sequence[float] | str | None) -> dict[str, Any]:
    ends = as_value_range(value_range)
    return {"value_range": list(ends) if isinstance(ends, tuple) else ends}


def _remarks(part: str, images: ImageSet) -> Iterator[str]:
    """What is worth saying of a folder that was listed."""
    if images.ignored:
        shown = ", ".join(repr(os.path.basename(file)) for file in images.ignored[:3])
        more = ", ..." if len(images.ignored) > 3 else ""
        what = f"{len(images.ignored)} file(s) without the extension of an image are not used"
        yield f"{part}_folder: {what}: {shown}{more}"
    if part == "train" and (inside := images.same_subfolders()):
        classes, folders = ", ".join(images.classes[:8]), ", ".join(inside[:8])
        yield f"warning: train_folder: every class has the same folders ({folders}); the classes are {classes}"


def _list_part(part: str, folder: Path) -> ImageSet:
    argument = f"{part}_folder"
    if part == "predict":
        return list_images(folder, argument)
    return list_class_folders(folder, argument, min_classes=2 if part == "train" else 1)
